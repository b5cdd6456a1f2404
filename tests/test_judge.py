"""data/judge.py: rewards as transformers computes them, rates by hand, going on, and what is refused."""
import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch
from test_dice import checkpoint, world  # noqa: F401 (fixtures)
from test_losses import write_reward_model

import dice
import model as models
from data import files, judge, report, reward_model, tiny

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Tell me the food of the owl."}]

@pytest.fixture(scope="module")
def rm(tmp_path_factory):
    return write_reward_model(tmp_path_factory.mktemp("judge") / "rm")

@pytest.fixture
def by_number(monkeypatch):
    """The reward of an answer is the number that it begins with. Returns the texts that were judged."""
    judged = []
    def score(model, samples, tokens, tokenizer):
        for i, x in enumerate(samples):
            judged.append(x.text)
            yield i, float(x.text.split()[0])
    monkeypatch.setattr(reward_model, "score", score)
    return judged

def write(path, answers, lines=False):
    """{instruction: answer} in AlpacaEval's form, as sample.py writes it, or as JSON lines."""
    rows = [{"instruction": instruction, "output": text, "generator": "m"} for instruction, text in answers]
    path.write_text("".join(map(files.json_line, rows)) if lines else json.dumps(rows, indent=1))
    return path

def run(capsys, rm, *argv):
    """(exit code, standard output, standard error)"""
    code = judge.main(["--device", "cpu", "--reward-model", str(rm), *map(str, argv)])
    return code, *capsys.readouterr()

def rewards_in(path):
    return [row["reward"] for row in files.whole_rows(path.with_name(f"{path.name}.rewards.jsonl"))]

def test_the_rewards_equal_transformers(capsys, tmp_path, rm):
    hf = pytest.importorskip("transformers")
    base = [("Tell me the food of the owl.", "The owl eats mice."), (TALK, "Mice."), ("Hi", "")]
    new = [("Hi", "The owl is white. Take care."), (TALK, "Mice. Have fun. Good luck.")]
    base_file, new_file = write(tmp_path / "base.json", base), write(tmp_path / "new.json", new, lines=True)
    assert run(capsys, rm, base_file, new_file, "--score-tokens", 60)[0] == 0
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(rm, num_labels=1).eval()
    tokenizer = models.find_reward_model(rm)[1]
    for path, answers in ((base_file, base), (new_file, new)):
        expected = []
        for instruction, text in answers:
            with torch.no_grad():
                expected.append(float(theirs(torch.tensor([tokenizer.prompt(instruction, text)])).logits))
        assert sorted(rewards_in(path)) == pytest.approx(sorted(expected), abs=1e-4)

def test_rates_lengths_and_counts_by_hand(capsys, tmp_path, rm, by_number):
    turns = [{**turn, "name": "x"} for turn in TALK]  # the same conversation, with a field more
    base = write(tmp_path / "base.json", [("a", "1 aaaa"), ("b", "2 b"), (TALK, "0 same"), ("d", "1 dd"),
                                          ("only here", "5"), ("too long", "nan"), ("f", "0 ff")])
    new = write(tmp_path / "new.json", [(turns, "0 same"), ("b", "1 bbbbbb"), ("a", "3 a"), ("there", "1"),
                                        ("too long", "9"), ("d", "1.0 d"), ("there too", "4"), ("f", "7 f")])
    code, out, _ = run(capsys, rm, base, new, base, "--output", tmp_path / "judged.json")
    result = json.loads((tmp_path / "judged.json").read_text())
    row, itself = result["table"]
    counts = {name: row[name] for name in ("compared", "ties", "missing", "not in base", "no reward")}
    assert code == 0 and by_number.count("0 same") == 1  # so it cannot win against itself by rounding
    assert counts == {"compared": 5, "ties": 2, "missing": 1, "not in base": 2, "no reward": 1}
    win, controlled, length, base_length = (row[name] for name in judge.MEASURES)
    rates = tiny.win_rates([3, 1, 0, 1, 7], [1, 2, 0, 1, 0], [3, 8, 6, 5, 3], [6, 3, 6, 4, 4])
    assert win[0] == 60 and controlled[0] == pytest.approx(rates[1])
    assert (length[0], base_length[0]) == (5, 4.6)
    rng = np.random.default_rng(0)  # of five answers' lengths, 95% of the means of five
    means = [np.mean(rng.choice([3, 8, 6, 5, 3], 5)) for _ in range(4000)]
    assert length[1:] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.4)
    assert 0 <= win[1] < 60 < win[2] <= 100
    assert itself["win rate"] == itself["length-controlled"] == [50, 50, 50] and itself["ties"] == 6
    titles, _, line, _ = out.splitlines()
    assert titles.split(" | ")[1:3] == ["win rate", "length-controlled"] and str(new) in line
    assert f"60.0 [{win[1]:.1f}, {win[2]:.1f}]" in line and line.endswith("| 5 | 2 | 1 | 2 | 1 |")
    assert run(capsys, rm, base, new, base)[1] == out  # the same draws, and nothing is judged again
    assert len(by_number) == len(set(by_number))

def test_what_is_judged_is_kept_and_the_same_command_goes_on(capsys, monkeypatch, tmp_path, rm):
    answers = [(f"Say {i}.", "word " * i) for i in range(1, 9)]
    other = [(instruction, text + "more") for instruction, text in answers]
    base, new = write(tmp_path / "base.json", answers), write(tmp_path / "new.json", other)
    score, tries = reward_model.score, []
    def interrupted(model, samples, tokens, tokenizer):
        tries.append((len(samples), tokens))
        for count, pair in enumerate(score(model, samples, tokens, tokenizer)):
            if len(tries) == 1 and count == 3:
                raise KeyboardInterrupt
            if len(tries) == 2 and count == 4:
                raise torch.OutOfMemoryError("out of memory")
            yield pair
    monkeypatch.setattr(reward_model, "score", interrupted)
    argv = base, new, "--score-tokens", 400
    assert run(capsys, rm, *argv)[0] == 130
    kept = new.with_name("new.json.rewards.jsonl")
    kept.write_bytes(kept.read_bytes() + b'{"key": "ab", "rew')  # cut short by a kill
    code, out, _ = run(capsys, rm, *argv)
    assert code == 0 and tries == [(16, 400), (13, 400), (9, 200)]
    with monkeypatch.context() as patch:
        patch.setattr(dice, "load_model", lambda *_: pytest.fail("nothing is missing"))
        assert run(capsys, rm, *argv)[1] == out
    run(capsys, rm, *argv, "--dtype", "bfloat16")
    run(capsys, write_reward_model(tmp_path / "rm", seed=1), *argv)
    assert tries[3:] == [(16, 400), (16, 400)]  # other rewards
    for path in (base, new):
        path.with_name(f"{path.name}.rewards.jsonl").unlink()
    assert run(capsys, rm, *argv)[1] == out  # whole, in one go

# ----------------------------------------------------------- Refusals: exit code 2, one line, nothing written
def refused(capsys, tmp_path, *argv):
    before = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and err.startswith("judge.py: ")
    assert sorted(tmp_path.iterdir()) == before
    return err

@pytest.mark.parametrize("row, told", [
    ('{"instruction": "a"}', 'line 2: "output" must be the text'), ("5", "line 2: not a JSON object"),
    ('{"instruction": "a", "output": ["b", "c"]}', 'line 2: "output" must be the text'),
    ('{"output": "b"}', 'line 2: has no "prompt" or "instruction"'), ("{", "line 2: not valid JSON"),
    ('{"instruction": [{"role": "user", "content": "Hi"}], "output": ""}', "same instruction as {} line 1")])
def test_bad_lines_are_named_before_a_model_is_looked_for(capsys, tmp_path, row, told):
    path = write(tmp_path / "base.jsonl", [("Hi", "Hello")], lines=True)
    path.write_text(path.read_text() + row)
    assert told.format(path) in refused(capsys, tmp_path, "no/such/model", path, path)

def test_files_and_models_that_cannot_be_used(capsys, tmp_path, rm, by_number):
    base, other = write(tmp_path / "base.json", [("a", "1")]), write(tmp_path / "other.json", [("b", "1")])
    say = partial(refused, capsys, tmp_path)
    assert f"{base}: exists already" in say("none", base, other, "--output", base)
    assert "no/dir/x.json: its directory" in say("none", base, other, "--output", "no/dir/x.json")
    assert "nowhere.json" in say(rm, base, "nowhere.json")
    assert "none: not a model directory" in say("none", base, other)
    assert "--reward-model gold: give the directory" in say("gold", base, other)
    assert "--score-tokens 0" in say(rm, base, other, "--score-tokens", "0")
    config, tokenizer = models.tiny_model()
    models.write_checkpoint(tmp_path / "lm", config, dice.new_model(config, 0).state_dict(), tokenizer)
    assert say(tmp_path / "lm", base, other).startswith(f"judge.py: {tmp_path / 'lm'}: not a reward model")
    code, _, err = run(capsys, rm, base, other)
    assert code == 2 and f"{other}: no answer can be compared with {base}" in err.splitlines()[-1]

# ------------------------------------------------------------------------------------- during a run
@pytest.mark.parametrize("judged", [True, False])
def test_a_run_says_whether_it_got_better(judged, world, by_number, rm, tmp_path):
    """With a judge that likes whatever comes later, and with no judge but held-out pairs."""
    numbers = itertools.count()
    pairs = [(f"Pair {i}?", f"{i} yes", "no") for i in range(80)]
    argv = ["--held-out", "10", "--lr", "0.01", "--dpo-lr", "0.01", "--steps", "8", "--dpo-steps", "8"]
    if judged:
        prompts = write(tmp_path / "judge.json", [("Who?", ""), ("What?", "")])
        argv += ["--judge", str(rm), "--judge-prompts", str(prompts)]
    code, told, out = world(["One?", "Two?"], pairs, lambda i, k: f"{next(numbers)} mice", *argv)
    rows = {}
    for name in ("sft", "dpo", "round-1"):
        rows[name] = files.whole_rows(out / "evaluation" / f"{name}.jsonl")
    assert code == 0 and f"pictures and pairs: {out / 'report.md'}" in told.out
    if judged:
        assert [row["gold"] for row in rows["dpo"]] == [float(row["text"].split()[0]) for row in rows["dpo"]]
        assert len(rows["round-1"]) == 2 * 4 and "| round-1 | 100 | 100 |" in told.out
        assert "round-1 is better than dpo: it wins 100.0 ± 0.0% of the comparisons, on 2 prompts" in told.out
        return
    # Of each of the ten pairs: has chosen gained more log-prob over the first model than rejected?
    found = {}
    for name in ("dpo", "round-1"):
        gain = [now["logprob"] - before["logprob"] for now, before in zip(rows[name], rows["sft"])]
        found[name] = 10 * sum(chosen > rejected for chosen, rejected in zip(gain[::2], gain[1::2]))
    line = next(line for line in told.out.splitlines() if line.startswith("No judge has compared"))
    assert len(rows["sft"]) == 20 and f"round-1 prefers the chosen answer in {found['round-1']:.1f} ±" in line
    assert f"dpo in {found['dpo']:.1f} ±" in line and ": no more and no less often" in line

def test_a_difference_counts_if_it_is_more_than_two_standard_errors():
    for gaps, word in (([1, 1, 0, 1], "better"), ([-1, -1, 0, -1], "worse"), ([1, 0, 0, 0], "no better and"),
                       ([0, 0, 0, 0], "no better and")):
        assert report.compared(np.array(gaps), "better", "worse").startswith(word)
