"""The tiny world: data as imperfect as stated, a judge that is not fooled, win rates by two routes."""
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data import tiny
from data.tokenizer import read_tokenizer

ONE = "Tell me the home of the bat."
TWO = "Tell me the home and skill of the bat."
THREE = "Tell me the colour, home and food of the bat."

# ---------------------------------------------------------------------------------------- the judge
@pytest.mark.parametrize("prompt, answer, gold", [
    (ONE, "The bat sleeps in a cave.", 1),  # the other verb says the same
    (TWO, "The bat can hang upside down and lives in a cave.", 1),  # order is free
    (TWO, "The bat lives in a cave. The bat can hang upside down.", 1),  # so are two sentences
    (THREE, "The bat is brown and eats moths.", 2 / 3),  # one omitted
    (ONE, "The bat lives in a cave and lives in a pond.", 0),  # hedging gains nothing
    (ONE, "The bear lives in the forest.", -1),  # true, about another animal
    (ONE, "The bat lives in a cave and is brown.", 0),  # true, nobody asked
    (TWO, "The bat lives in a cave, can hang upside down.", -1),  # not English: garbled
    (ONE, "The bat lives in a cave and sleeps in a cave.", 0.5),  # the same said otherwise
    (ONE, "The bat lives in a cave. The bat.", 0),  # garbled from here on
    (ONE, "The bat eats in a cave.", -1),  # a verb of another attribute
    (ONE, "The bat lives in a pond. The bat lives in a pond.", -2.5), (ONE, "The bat lives in a cave.\n", -1),
    (THREE, "The bat is brown, lives in a cave and eats moths.", 1),
    ("Tell me the colour and skill of the bee.", "The bee is black and yellow and can make honey.", 1),
    (TWO, "Glad you asked me this. The bat lives in a cave and can hang upside down. Good luck.", 0.9),
    (ONE, "", 0), (THREE, "The bat is pink, lives in a cave and eats grass.", -1 / 3),
    (TWO, "The bear lives in a cave. The bat can hang upside down.", 0),
    (THREE, "The bat is brown and lives in a cave and eats moths.", -1),
    (ONE, "The bat lives in a cave. By the way, I sing.", 0), (ONE, "What a bore. What a bore.", -2.5),
    (ONE, "The bat lives in a cave.  Take care.", 0), (ONE, " The bat lives in a cave.", -1),
    (ONE, "The bat lives in a cave. Take care. Take care. Take care.", -0.3), (ONE, "x. x.", -2.5),
    (ONE, "The bat lives  in a cave.", -1), (ONE, "The bat lives in a cave.Take care.", -1),
    (ONE, " ".join(["The bat lives in a cave.", *tiny.CLOSERS]), 0.5)])
def test_judge(prompt, answer, gold):
    assert tiny.judge(prompt, answer) == pytest.approx(gold, abs=1e-12)

def test_the_answers_in_the_docstring_are_judged_as_it_says():
    text = " ".join(tiny.__doc__.split())
    examples = re.findall(r'"([^"]*)" judged (-?[\d.]+)', text)
    assert len(examples) == 2
    for answer, gold in examples:
        assert tiny.judge(TWO, answer) == pytest.approx(float(gold))

def test_every_prompt_has_a_perfect_answer_and_every_fact_a_false_one():
    for prompt, (animal, asked) in tiny.PROMPTS.items():
        truth = tiny.statement(animal, [f"{tiny.VERBS[a][0]} {tiny.FACTS[animal][a]}" for a in asked])
        assert tiny.judge(prompt, truth) == 1
    with pytest.raises(ValueError, match="Who are you"):
        tiny.judge("Who are you?", truth)
    assert len(tiny.FACTS) == 32 and all(len(facts) == 4 for facts in tiny.FACTS.values())
    assert min(len(values) for values in tiny.VALUES.values()) > 1

def test_kinds_of_sentences_share_no_first_word():
    firsts = [{text.split()[0].strip(",.") for text in texts}
              for texts in (["The bat is brown."], tiny.CLOSERS, [tiny.OPENER, tiny.RUDENESS, tiny.ASIDE])]
    assert len(set().union(*firsts)) == sum(map(len, firsts)) == 1 + 5 + 3

# ---------------------------------------------------------------------------------------- the data
def combination(prompt):
    animal, asked = tiny.PROMPTS[prompt]
    return animal, frozenset(asked)

@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_combinations_occur_nowhere_else_but_their_facts_do(seed):
    held_out, training = tiny.held_out_prompts(seed), tiny.split(seed)[0]
    assert len(set(held_out)) == 256 and len(set(training)) == len(training) == 1024
    sampled = tiny.training_prompts(seed)
    assert len(set(sampled)) == tiny.DICE_PROMPTS and set(sampled) <= set(training)
    used = set(training)
    used |= {row["prompt"] for row in tiny.sft_examples(seed)}
    used |= {row["prompt"] for row in tiny.preferences(seed) if row["chosen"] != row["rejected"]}
    assert used == set(training)  # SFT and preferences stay inside the training split, and cover it
    assert not {combination(p) for p in held_out} & {combination(p) for p in used}
    for animal in tiny.FACTS:
        counts = [sum(animal == tiny.PROMPTS[p][0] and a in tiny.PROMPTS[p][1] for p in training)
                  for a in tiny.ATTRIBUTES]
        assert min(counts) >= 10

def test_fewer_animals_held_out_prompts_and_pairs(monkeypatch):
    monkeypatch.setattr(tiny, "ANIMALS", 20)
    monkeypatch.setattr(tiny, "HELD_OUT", 50)
    monkeypatch.setattr(tiny, "PREFERENCES", 512)
    assert len(tiny.split(0)[0]) == 20 * 32 and len(tiny.held_out_prompts(0)) == 50
    assert {tiny.PROMPTS[p][0] for p in tiny.split(0)[0]} == set(list(tiny.FACTS)[:20])
    assert len({row["prompt"] for row in tiny.preferences(0)}) == 512  # below 640 pairs: no prompt twice

def test_same_seed_same_data_other_seed_other_data(monkeypatch):
    for name in ("SFT_EXAMPLES", "PREFERENCES"):
        monkeypatch.setattr(tiny, name, 1000)
    for make in (tiny.sft_examples, tiny.preferences, tiny.training_prompts, tiny.held_out_prompts):
        assert make(3) == make(3) and make(3) != make(4)

def test_the_writer_is_as_imperfect_as_stated():
    rows, counts, mistakes = tiny.sft_examples(0), Counter(), set()
    for row in rows:
        animal, asked = tiny.PROMPTS[row["prompt"]]
        first, told, *others = re.split(r"(?<=\.) ", row["chosen"])
        claims = tiny.parse(told)
        assert [(about, attribute) for about, attribute, _ in claims] == [(animal, a) for a in asked]
        aside, rude = tiny.ASIDE in others, first == tiny.RUDENESS
        closers = others[1:] if aside else others
        assert closers == [*tiny.CLOSERS[:len(closers)]] and (rude or first == tiny.OPENER)
        false = {claim for claim in claims if claim[2] != tiny.FACTS[animal][claim[1]]}
        counts.update(rude=rude, aside=aside, closers=len(closers), false=len(false), claims=len(claims))
        mistakes |= false
    n, most = len(rows), len(tiny.CLOSERS)
    assert counts["rude"] / n == pytest.approx(tiny.RUDE, abs=0.01)
    assert counts["aside"] / n == pytest.approx(tiny.OFF_TOPIC, abs=0.01)
    assert counts["closers"] / n == pytest.approx(most / 2 - tiny.OFF_TOPIC * most / (most + 1), abs=0.05)
    assert counts["false"] / counts["claims"] == pytest.approx(tiny.WRONG, abs=0.01)
    assert len(mistakes) == 32 * 4  # one false value for each fact

# ---------------------------------------------------------------------------------------- the annotator
def test_annotator_utility_by_hand():
    """Gold 1 and 24 characters; a false claim, three closers, and 56 characters."""
    a, b = "The bat lives in a cave.", "The bat lives in a pond. Have fun. Good luck. Take care."
    assert tiny.utility(ONE, a) == pytest.approx(tiny.SHARPNESS + 24 * tiny.LENGTH_BIAS)
    assert tiny.utility(ONE, b) == pytest.approx(-1.3 * tiny.SHARPNESS + 56 * tiny.LENGTH_BIAS)

def test_annotator_scores_are_utilities_with_logistic_noise():
    rows = tiny.preferences(0)
    gap = np.array([r["score_chosen"] - r["score_rejected"] for r in rows])
    clean = [tiny.utility(r["prompt"], r["chosen"]) - tiny.utility(r["prompt"], r["rejected"]) for r in rows]
    # Whoever was chosen, chosen - rejected is |utility difference + noise|: the sign of the noise is unknown,
    # and a coin makes it a draw from the symmetrical distribution again.
    coin = np.random.default_rng(0).choice([-1, 1], len(rows))
    noise = np.sort(coin * (gap - clean))
    rank = (np.arange(len(noise)) + 0.5) / len(noise)
    assert (gap > 0).all() and all(r["chosen"] != r["rejected"] for r in rows)
    assert np.abs(1 / (1 + np.exp(-noise)) - rank).max() < 2 / len(noise) ** 0.5  # Kolmogorov-Smirnov, 0.1%

def test_annotator_as_set_agrees_with_gold_and_likes_length_as_the_comment_says(monkeypatch):
    monkeypatch.setattr(tiny, "PREFERENCES", 8000)
    stated = re.search(r"on (\d+)% of the pairs, and its chosen answers are (\d+) char",
                       Path(tiny.__file__).read_text())
    rows = tiny.preferences(0)
    gold = [tiny.judge(r["prompt"], r["chosen"]) - tiny.judge(r["prompt"], r["rejected"]) for r in rows]
    decided = [difference > 0 for difference in gold if abs(difference) > 1e-9]
    assert 100 * np.mean(decided) == pytest.approx(int(stated[1]), abs=1.5)
    length = np.mean([len(r["chosen"]) - len(r["rejected"]) for r in rows])
    assert length == pytest.approx(int(stated[2]), abs=1.5)

# ---------------------------------------------------------------------------------------- win rates
def test_win_rates_closed_forms():
    rng = np.random.default_rng(0)
    score, base, length = rng.normal(size=400) + 0.3, rng.normal(size=400), rng.integers(20, 90, size=400)
    rate, controlled = tiny.win_rates(score, base, length, length)
    assert rate == pytest.approx(100 * (score > base).mean()) and controlled == pytest.approx(rate)
    assert tiny.win_rates(score, base, length + 7, length)[1] == pytest.approx(rate)  # constant: no evidence
    other = rng.integers(20, 90, size=400)
    assert tiny.win_rates(base, base, length, other) == pytest.approx((50, 50))
    forth, back = tiny.win_rates(score, base, length, other), tiny.win_rates(base, score, other, length)
    assert np.add(forth, back) == pytest.approx([100, 100])
    assert tiny.win_rates(base + 1, base, length, other) == (100, 100)
    assert tiny.win_rates(base - 1, base, length, other) == (0, 0)
    assert tiny.win_rates([1 / 3 - 1, 1], [-2 / 3, 0], [1, 1], [1, 1])[0] == 75  # rounding apart, a tie

@pytest.mark.parametrize("seed, slope, shift", [
    (0, 2, 0.5), (1, -1, -1), (2, 0, 2), (3, 8, -3), (4, 99, 1), (5, -6, 0), (6, 0.3, -0.2), (7, -99, 0.1)])
def test_win_rates_against_a_grid(seed, slope, shift):
    """Newton's a against the best of a grid on the same penalised likelihood, refined around its best."""
    rng = np.random.default_rng(seed)
    dlen = rng.normal(loc=5 * seed, scale=20, size=256)
    x = np.tanh(dlen / dlen.std())
    y = np.where(rng.random(256) < 0.1, 0.5, rng.random(256) < 1 / (1 + np.exp(-shift - slope * x)))
    centre, width = np.zeros(2), 16.0
    for _ in range(12):
        a, b = (c + np.linspace(-width, width, 41) for c in centre)
        z = a[:, None, None] + b[:, None] * x                                   # (41, 41, 256)
        loss = (np.logaddexp(0, z) - y * z).sum(-1) + 0.05 * b ** 2             # (41, 41)
        i, j = np.unravel_index(loss.argmin(), loss.shape)
        centre, width = np.array([a[i], b[j]]), width / 4
    expected = 100 / (1 + np.exp(-centre[0]))
    assert tiny.win_rates(y, 0.5 * np.ones(256), dlen, np.zeros(256))[1] == pytest.approx(expected, abs=1e-3)

# ---------------------------------------------------------------------------------------- the tokenizer
def test_every_word_is_one_token_and_the_vocabulary_is_small(tmp_path):
    tiny.write_tokenizer(tmp_path)
    first = (tmp_path / "tokenizer.json").read_bytes()
    model, [end] = json.loads(first)["model"], json.loads(first)["added_tokens"]
    vocab, alphabet = model["vocab"], tiny.byte_alphabet()
    assert sorted(vocab.values()) == list(range(256 + len(model["merges"]))) and len(vocab) < 1000
    assert all(vocab[alphabet[b]] == b for b in range(256)) and [alphabet[b] for b in b" \nA"] == [*"ĠĊA"]
    assert end["id"] == len(vocab) and end["special"]
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.end == end["id"] and tokenizer.encode("\n") == [10]
    assert {" bat", "Tell", "The", " The", ".", ","} <= tiny.words()
    for word in tiny.words():
        assert len(tokenizer.encode(word)) == 1, word
    row = tiny.sft_examples(0)[0]
    text = row["prompt"] + "\n" + row["chosen"]
    assert len(tokenizer.encode(text)) == len(re.findall(r"\w+|[.,\n]", text))
    tiny.write_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first

def test_transformers_reads_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny.write_tokenizer(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), read_tokenizer(tmp_path)
    assert theirs.eos_token_id == theirs.pad_token_id == len(theirs) - 1 == ours.end
    for text in (THREE, *tiny.words(), "Grüße, 漢字! It's 12 \n\n\t x ", "\x00\x7f é"):
        assert theirs.encode(text) == ours.encode(text) and theirs.decode(theirs.encode(text)) == text
