"""The tiny world: a whole preference-optimisation problem that one CPU can finish in minutes.

Prompts ask for one to three facts about an animal, and an imperfect writer answers them. It may be rude,
claim something false, change the subject, and add up to five closing phrases.
    judge       the gold score, exact: for evaluation and upper bounds only
    annotator   labels the offline preference pairs; it is noisy and likes long answers, as people do
    win_rates   turns gold scores and lengths into a win rate and a length-controlled win rate

    "Tell me the home and skill of the bat."
    "Glad you asked me this. The bat lives in a cave and can hang upside down."                judged  1.0
    "What a bore. The bat sleeps in a den and can hang upside down. By the way, I sing. Hope this helps.
     Take care."                                                                               judged -2.2

Padding is what DICE is about here: a closing phrase costs in the judge's eyes, and the annotator likes it.
There is one text for each kind of sentence, and one false value for each fact. Subtle: among equal texts a
tiny model has preferences of its own, the implicit reward pays for them, and every round makes them stronger.

Everything here is text, nothing is downloaded, and the same seed gives the same data. Use ONE seed for all
the functions of an experiment: the seed also draws the split into training and held-out prompts."""
import json
import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np

from data.tokenizer import LETTERS

# ---------------------------------------------------------------------------------------- numbers to change
SFT_EXAMPLES = 40_000  # answers for the supervised start: about 40 for each of the 1024 training prompts
PREFERENCES = 2304     # offline pairs, on the training prompts in turn: 2 for each of the 1024, and 256 more,
                       # as many as dice.py holds out of training
ANIMALS = 32           # how many rows of TABLE are used (the first ones), 40 prompts each; at most 32
DICE_PROMPTS = 256     # training prompts that are sampled for, the same in every round
HELD_OUT = 256         # prompts kept for evaluation, 8 per animal; a smaller number takes a random part

# The writer. Its commonest claim about a fact is the true one, so better answers can be learned from its own.
# It answers all that is asked: if it left out claims, a penalty on length would teach the model to do so too.
RUDE = 0.3             # chance that the answer opens with the rude sentence, and not with the polite one
WRONG = 0.35           # chance that a claim is false
OFF_TOPIC = 0.3        # chance of the sentence about something else, after the claims

# The judge: a closing phrase costs less than any other fault, but it decides between answers that are equal
# otherwise. If it were free, longer answers would be no worse, and length shaping could only lose.
CLOSER_COST = 0.1

# The annotator: P(a preferred to b) = sigmoid(SHARPNESS * gold difference + LENGTH_BIAS * length difference)
# As set it agrees with the judge on 59% of the pairs, and its chosen answers are 7 characters longer.
SHARPNESS = 0.5        # per unit of gold score; a rude sentence costs one unit. Lower is noisier
LENGTH_BIAS = 0.02     # per CHARACTER, the unit of the length shaping in DICE. A closing phrase has 9 to 16:
                       # it gains 0.2 or 0.3 and costs 0.05. With more, the replayed pairs undo the shaping

# ---------------------------------------------------------------------------------------- the world
# True facts, easy to look up. Only one answer to each is right: here it is wrong that foxes eat mice too.
ATTRIBUTES = ("colour", "home", "food", "skill")
TABLE = """
    ant       | black            | in an anthill   | sugar    | carry leaves
    bat       | brown            | in a cave       | moths    | hang upside down
    bear      | brown            | in the forest   | berries  | sleep all winter
    beaver    | brown            | in a lodge      | bark     | build dams
    bee       | black and yellow | in a hive       | nectar   | make honey
    camel     | brown            | in the desert   | thorns   | go without water
    canary    | yellow           | in a cage       | seeds    | sing songs
    crab      | red              | on the beach    | algae    | walk sideways
    crow      | black            | in a tall tree  | eggs     | use tools
    dolphin   | grey             | in the sea      | squid    | leap over waves
    elephant  | grey             | on the savanna  | grass    | lift logs
    flamingo  | pink             | in a lagoon     | shrimps  | stand on one leg
    fox       | red              | in a den        | rabbits  | hear mice under snow
    frog      | green            | in a pond       | flies    | croak at night
    gorilla   | black            | in the jungle   | fruit    | beat its chest
    hedgehog  | brown            | under a hedge   | slugs    | roll into a ball
    hippo     | grey             | in a river      | grass    | walk under water
    koala     | grey             | in a gum tree   | leaves   | sleep all day
    ladybird  | red              | in a garden     | aphids   | play dead
    mole      | black            | in a tunnel     | worms    | dig tunnels
    owl       | white            | in a barn       | mice     | fly in silence
    panda     | black and white  | in the hills    | bamboo   | do handstands
    parrot    | green            | in the jungle   | nuts     | learn words
    peacock   | blue             | in a park       | seeds    | fan its tail
    penguin   | black and white  | on the ice      | squid    | slide on its belly
    pig       | pink             | in a sty        | scraps   | find truffles
    salmon    | silver           | in a river      | shrimps  | leap up waterfalls
    sheep     | white            | in a meadow     | grass    | grow wool
    spider    | black            | in a web        | flies    | spin silk
    squirrel  | red              | in an oak       | acorns   | hide nuts
    wolf      | grey             | in a den        | deer     | howl at night
    zebra     | black and white  | on the savanna  | grass    | sleep standing up
"""
FACTS = {animal: dict(zip(ATTRIBUTES, values))
         for animal, *values in (re.split(r" *\| *", line.strip()) for line in TABLE.strip().splitlines())}
VALUES = {attribute: sorted({facts[attribute] for facts in FACTS.values()}) for attribute in ATTRIBUTES}
VERBS = dict(colour=("is", "looks"), home=("lives", "sleeps"), food=("eats", "likes"), skill=("can",))

# Each kind of sentence has first words of its own. Subtle: where two kinds share them ("It is ..."), a tiny
# model that learns to write more of one writes more of the other, and their rewards are hard to tell apart.
OPENER, RUDENESS, ASIDE = "Glad you asked me this.", "What a bore.", "By the way, I sing."
# Closers come in this order, and none occurs twice in an answer: so small a model does not keep count, and
# if repetition made an answer better, it would only learn to repeat.
CLOSERS = ("Hope this helps.", "Take care.", "Have fun.", "Good luck.", "Come back soon.")

def statement(animal, clauses):
    """All claims in one sentence: statement("bat", ["lives in a cave", "is brown"]) is "The bat lives in a
    cave and is brown.". Subtle: the "and" marks the last claim. If every claim were a sentence of its own, so
    small a model, rewarded for claims, would not learn when to stop."""
    *others, last = clauses
    return f"The {animal} {', '.join(others) + ' and ' if others else ''}{last}."

def question(animal, asked):
    """The prompt for the attributes `asked`, in that order."""
    *others, last = asked
    names = f"{', '.join(others)} and {last}" if others else last
    return f"Tell me the {names} of the {animal}."

# Text to meaning, for all claims of this world: the judge looks them up and never has to guess.
PROMPTS = {question(animal, asked): (animal, asked)
           for animal in FACTS for n in (1, 2, 3) for asked in permutations(ATTRIBUTES, n)}
CLAUSES = {f"{verb} {value}": (attribute, value)
           for attribute in ATTRIBUTES for value in VALUES[attribute] for verb in VERBS[attribute]}

def parse(sentence):
    """A statement -> [(animal, attribute, value) of each claim]; [] for any other sentence."""
    match = re.fullmatch(r"The (\w+) (.*)\.", sentence)
    if not match or match[1] not in FACTS:
        return []
    for cut in re.finditer(" and |$", match[2]):  # which "and"? "black and white" contains one
        head, last = match[2][:cut.start()], match[2][cut.end():]
        clauses = [*head.split(", "), last] if last else [head]
        if all(clause in CLAUSES for clause in clauses):
            return [(match[1], *CLAUSES[clause]) for clause in clauses]
    return []

# ---------------------------------------------------------------------------------------- the data
def sft_examples(seed: int) -> list[dict]:
    """SFT_EXAMPLES rows {"prompt", "chosen"}: training prompts, each answered by the imperfect writer."""
    prompts, rng = split(seed)[0], np.random.default_rng([seed, 1])
    rows = (prompts[i] for i in rng.integers(len(prompts), size=SFT_EXAMPLES))
    return [{"prompt": prompt, "chosen": write(prompt, rng)} for prompt in rows]

def preferences(seed: int) -> list[dict]:
    """PREFERENCES rows {"prompt", "chosen", "rejected", "score_chosen", "score_rejected"}: two different
    answers of the writer, scored and so ordered by the annotator. Below 1024 rows no prompt occurs twice."""
    prompts, rng, pairs = split(seed)[0], np.random.default_rng([seed, 2]), []
    for i in range(PREFERENCES):
        prompt = prompts[i % len(prompts)]
        a, b = write(prompt, rng), write(prompt, rng)
        while b == a:
            b = write(prompt, rng)
        # a wins if utility(a) - utility(b) + noise > 0, with logistic noise: half of it in each score.
        u = rng.random()
        noise = np.log1p(-u) - np.log(u)
        scores = utility(prompt, a) + noise / 2, utility(prompt, b) - noise / 2
        (lost, rejected), (won, chosen) = sorted(zip(scores, (a, b)))
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected,
                      "score_chosen": float(won), "score_rejected": float(lost)})
    return pairs

def training_prompts(seed: int) -> list[str]:
    """DICE_PROMPTS prompts of the training split (which has 1024 for 32 animals), shuffled."""
    prompts = split(seed)[0]
    return [prompts[i] for i in np.random.default_rng([seed, 3]).permutation(len(prompts))[:DICE_PROMPTS]]

def held_out_prompts(seed: int) -> list[str]:
    """HELD_OUT prompts. No training prompt asks for the same set of attributes of the same animal."""
    return split(seed)[1]

def split(seed):
    """(training prompts, held-out prompts), both shuffled. One of each animal's 6 pairs of attributes and one
    of its 4 triples are held out, in every order: 2 + 6 of its 40 prompts. Every single fact stays in
    training: the held-out prompts test new combinations."""
    rng, training, held_out = np.random.default_rng([seed, 0]), [], []
    for animal in list(FACTS)[:ANIMALS]:
        triple, pair = (frozenset(rng.permutation(ATTRIBUTES)[:n].tolist()) for n in (3, 2))
        for prompt, (about, asked) in PROMPTS.items():
            if about == animal:
                (held_out if frozenset(asked) in (triple, pair) else training).append(prompt)
    rng.shuffle(training)
    rng.shuffle(held_out)
    return training, held_out[:HELD_OUT]

def write(prompt, rng):
    """One answer of the imperfect writer: rude or polite, claims in the asked order, [aside], closers."""
    animal, asked = PROMPTS[prompt]
    sentences = [RUDENESS if rng.random() < RUDE else OPENER]
    clauses = []
    for attribute in asked:
        value, values, verbs = FACTS[animal][attribute], VALUES[attribute], VERBS[attribute]
        if rng.random() < WRONG:  # always the same false one, the next in the alphabet
            value = values[(values.index(value) + 1) % len(values)]
        clauses.append(f"{verbs[rng.integers(len(verbs))]} {value}")
    sentences.append(statement(animal, clauses))
    closers = rng.integers(len(CLOSERS) + 1)
    if rng.random() < OFF_TOPIC:  # instead of a closer: bad answers must not be longer than good ones
        sentences.append(ASIDE)
        closers = max(0, closers - 1)
    return " ".join([*sentences, *CLOSERS[:closers]])

def utility(prompt, answer):
    """How good the annotator finds an answer, without noise: P(a preferred to b) = sigmoid(difference)."""
    return SHARPNESS * judge(prompt, answer) + LENGTH_BIAS * len(answer)

# ---------------------------------------------------------------------------------------- evaluation
def judge(prompt: str, answer: str) -> float:
    """The gold score of an answer: 1 for a perfect one, 0 for silence, below 0 for worse than silence.

        (right - false) / asked - rude - off-topic - garbled - 0.5 repeated - CLOSER_COST * closers  (counts)

    A claim is false if it is untrue, or about another animal. A claim about an attribute that was not asked
    for is off-topic, true or not. A sentence that is not exactly one of the world's is garbled. Whatever
    occurs a second time is repeated: costs extra, is not right again. Order and politeness do not count."""
    found = findings(prompt, answer)
    faults = found["rude"] + found["off-topic"] + found["garbled"]
    return ((found["right"] - found["false"]) / len(PROMPTS[prompt][1]) - faults - 0.5 * found["repeated"]
            - CLOSER_COST * found["closers"])

def findings(prompt: str, answer: str) -> Counter:
    """What the judge finds in an answer: how many claims are right, how many false, and so on."""
    if prompt not in PROMPTS:
        raise ValueError(f"not a prompt of the tiny world: {prompt!r}")
    animal, asked = PROMPTS[prompt]
    kinds = {OPENER: "polite", RUDENESS: "rude", ASIDE: "off-topic"} | dict.fromkeys(CLOSERS, "closers")
    found, said = Counter(), set()
    for sentence in re.split(r"(?<=\.) ", answer) if answer else []:
        for meaning in parse(sentence) or [sentence]:
            again = meaning in said
            said.add(meaning)
            found["repeated"] += again
            if meaning == sentence:
                found[kinds.get(sentence, "garbled")] += 1
            elif meaning[1] not in asked:
                found["off-topic"] += 1
            else:
                about, attribute, value = meaning
                true = about == animal and value == FACTS[animal][attribute]
                found["right"] += true and not again
                found["false"] += not true
    return found

def win_rates(score, base_score, length, base_length) -> tuple[float, float]:
    """(win rate, length-controlled win rate) of a model against a base, both in percent.

    All four are arrays (N,), row i of each for the same prompt; a tie in score counts half. Length is
    controlled as in AlpacaEval 2 (arXiv 2404.04475), without its instruction term: fit
    P(win) = sigmoid(a + b x) with x = tanh(dlen / std(dlen)), and report sigmoid(a), the win rate at equal
    length. A small ridge on b keeps it finite where length separates wins from losses. If every row is a win,
    or none is, both rates are 100, or 0. Lengths may be in any unit.

    Read the win rate first. The fit forgives a model its failures where they come with length: late in a run
    answers may get longer and worse at the same time, and the fit takes the length for the cause."""
    gap = np.asarray(score, dtype=float) - np.asarray(base_score, dtype=float)             # (N,)
    dlen = np.asarray(length, dtype=float) - np.asarray(base_length, dtype=float)          # (N,)
    win = np.where(np.abs(gap) < 1e-9, 0.5, gap > 0)  # thirds are not exact: a tie can be 1e-16 away from 0
    rate = float(win.mean())
    if rate in (0.0, 1.0):
        return 100 * rate, 100 * rate
    x = np.tanh(dlen / dlen.std()) if dlen.std() > 0 else np.zeros_like(dlen)
    inputs = np.stack([np.ones_like(x), x], axis=1)                                        # (N, 2)
    weights, ridge = np.zeros(2), np.array([0.0, 0.1])
    for _ in range(30):  # Newton's method: 15 steps are enough even where length separates
        p = 0.5 + 0.5 * np.tanh(inputs @ weights / 2)                                      # (N,)
        gradient = inputs.T @ (p - win) + ridge * weights                                  # (2,)
        hessian = (inputs.T * (p * (1 - p))) @ inputs + np.diag(ridge)                     # (2, 2)
        weights -= np.linalg.solve(hessian, gradient)
    return 100 * rate, 100 * float(0.5 + 0.5 * np.tanh(weights[0] / 2))

# ---------------------------------------------------------------------------------------- the tokenizer
END = "<|end|>"

def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (Hugging Face form) for a byte-level BPE of this world.

    Ids 0..255 are the bytes, then one id per merge, then END, which is also the padding. Every word of the
    world is one token, with its leading space if it has one; any other text becomes pieces and bytes."""
    alphabet = byte_alphabet()
    merges = train_merges({"".join(alphabet[b] for b in word.encode()) for word in words()})
    tokens = alphabet + ["".join(merge) for merge in merges]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": len(tokens), "content": END, "single_word": False, "lstrip": False, "rstrip": False,
           "normalized": False, "special": True}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
           "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
           "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [" ".join(pair) for pair in merges]}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end],
                 "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
                 "decoder": byte_level, "model": bpe}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END,
              "clean_up_tokenization_spaces": False, "model_max_length": 1024}
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (directory / name).write_text(json.dumps(content, indent=1) + "\n")

def words():
    """Every word and mark of the world as GPT-2's pattern cuts them. A first word has no space before it."""
    later = ["The", *FACTS, *CLAUSES, ASIDE, *CLOSERS]
    texts = [*PROMPTS, OPENER, RUDENESS, "The", *(f" {text}" for text in later)]
    return {word for text in texts for word in re.findall(r" ?[A-Za-z]+|[.,]", text)}

def byte_alphabet():
    """The letters that GPT-2 writes for the bytes 0 .. 255."""
    return sorted(LETTERS, key=LETTERS.get)

def train_merges(words):
    """Byte-pair encoding: join the commonest pair of neighbours until every word is one piece. Each word
    counts once, however often it occurs, so that words share pieces and few are needed."""
    splits, merges = [list(word) for word in sorted(words)], []
    while pairs := Counter(pair for parts in splits for pair in zip(parts, parts[1:])):
        merges.append(max(pairs, key=pairs.get))  # of equals the first in the sorted words
        for parts in splits:
            for i in range(len(parts) - 1):
                if tuple(parts[i:i + 2]) == merges[-1]:
                    parts[i:i + 2] = ["".join(merges[-1])]
    return merges
