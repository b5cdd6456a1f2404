"""Prompts and preferences in the usual forms, from JSON lines or one JSON array (AlpacaEval's set is one).

A prompt is the text of one user turn, or a list of {"role", "content"} up to the assistant's answer."""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import InputError, parse_json, require
from data.processes import is_first, log_info

ROLES = ("system", "user", "assistant")
# Fields that make a prompt another one. prompt_of() reads two of them, and refuses what it does not read.
PROMPT_FIELDS = ("input", "system", "system_prompt", "history", "context", "documents", "tools", "images",
                 "image", "videos", "audios", "chat_template_kwargs")
# The two files that data/ultrafeedback.py makes: the paper's prompts and offline pairs.
PAPER = dict(prompts="data/uf-10k/prompt.json", preferences="data/uf-10k/preference.json")
STAND_IN_PAIRS = 10000  # as many as the paper has
# Of stand-in data. They have as many letters as words of English text: 4 to 5, in the mean.
WORDS = """the of and a to in is you that it for on are with as they be this have from or one by but not what
all were when your can said there use each which she do how their will other about many then them these people
write different question answer important example language information between country number""".split()

@dataclass
class Data:
    prompts: list  # of (where, prompt)
    judge_prompts: list  # of the same
    preferences: list  # of Preference
    contents: dict  # path -> hash of what was read from it

def read_data(settings, tiny, dry_run=False):
    """The data that the settings of a run name; without files, that of the tiny world (data/tiny.py).

    A dry run and --weights dummy need sizes and times only. Where the user has named no files, and the
    paper's are not there, random words stand in for them."""
    s, data = settings, Data([], [], [], {})
    if dry_run and is_first():
        log_info("reading the data")
    paths, missing = (s.prompts, s.preferences), ()
    if s.model != "tiny" and (dry_run or s.weights == "dummy"):
        missing = [path for path in paths if path in PAPER.values() and not Path(path).exists()]
        missing = missing if any(paths) else paths
    stand_in = random_pairs() if missing else []
    if s.prompts in missing:
        data.prompts = [(pair.where, pair.prompt) for pair in stand_in]
    elif s.prompts:
        data.prompts = read_prompts(s.prompts, data.contents)
    elif s.model == "tiny":
        data.prompts = [("tiny", text) for text in tiny.training_prompts(s.seed)]
    if s.judge_prompts:
        data.judge_prompts = read_prompts(s.judge_prompts, data.contents)
    elif s.model == "tiny":
        data.judge_prompts = [("tiny", text) for text in tiny.held_out_prompts(s.seed)]
    if s.preferences in missing:
        data.preferences = stand_in
    elif s.preferences:
        data.preferences = read_preferences(s.preferences, data.contents)
    elif s.model == "tiny":
        data.preferences = [preference(row, "tiny") for row in tiny.preferences(s.seed)]
    return data

def random_pairs():
    """Preferences of random words, as many as the paper's and about as long."""
    words, rng, pairs = np.array(WORDS), np.random.default_rng(0), []
    for i in range(STAND_IN_PAIRS):
        texts = []
        for mean in (60, 250, 250):  # words of the prompt, and of the two answers
            count = rng.integers(mean // 3, 2 * mean - mean // 3 + 1)
            texts.append(" ".join(words[rng.integers(len(words), size=count)]))
        pairs.append(Preference(f"stand-in pair {i}", *texts, scores=(1.0, 0.0)))
    if is_first():
        log_info(f"no data files: {STAND_IN_PAIRS} prompts of about 60 random words, and pairs of answers of "
                 "about 250, stand in for them; name your own (--prompts FILE, --preferences FILE), or fetch "
                 "the paper's (python data/ultrafeedback.py)")
    return pairs

def read_rows(path, contents=None):
    """Yields (where, row) for each JSON object in the file; where is "FILE line N", for messages. The hash of
    the file is put into contents[path]."""
    try:
        content = Path(path).read_bytes()  # once: a pipe cannot be read again
        text = content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError as error:
        hint = "; python data/ultrafeedback.py makes it" if "uf-10k" in str(path) else ""
        raise InputError(f"{path}: {error.strerror}{hint}")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})")
    if contents is not None:
        contents[path] = hashlib.sha256(content).hexdigest()
    if text.lstrip().startswith("["):
        rows = [(f"{path} entry {i}", row) for i, row in enumerate(parse_json(text, path), 1)]
    else:
        lines = [(f"{path} line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(where, parse_json(line, where)) for where, line in lines]
    require(rows, f"{path}: holds no rows")
    for where, row in rows:
        require(isinstance(row, dict), f"{where}: not a JSON object")
        yield where, row

def read_prompts(path, contents=None):
    """A list of (where, prompt), each prompt once. Rows have "prompt" or "instruction", or the conversations
    "chosen" and "rejected", which begin with it."""
    prompts = {}
    for where, row in read_rows(path, contents):
        prompt = prompt_of(row, where)
        prompts.setdefault(json.dumps(prompt), (where, prompt))
    return list(prompts.values())

def draw(items, count, seed):
    """At most `count` of the items, drawn at random, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(items))[:count]
    return [items[i] for i in sorted(chosen)]

class Preference(NamedTuple):
    where: str  # file and line, for messages
    prompt: str | list
    chosen: str
    rejected: str
    scores: tuple | None = None  # (score_chosen, score_rejected), which ODPO needs
    steps: str | None = None  # Step-DPO: the correct steps before both answers

def read_preferences(path, contents=None):
    """A list of Preference, from TRL's rows, plain or conversational, with or without the prompt in the
    answers, or the DICE repository's {"prompt" or "instruction", "output": [chosen, rejected]}. A row may
    have "score_chosen" and "score_rejected", and Step-DPO's "initial_reason_steps"."""
    return [preference(row, where) for where, row in read_rows(path, contents)]

def preference(row, where):
    prompt = prompt_of(row, where)
    if "output" in row and "chosen" not in row:
        require(isinstance(row["output"], list) and len(row["output"]) == 2,
                f'{where}: "output" must be a list of two, chosen and rejected')
        chosen, rejected = row["output"]
    else:
        require("chosen" in row and "rejected" in row,
                f'{where}: has no "chosen" and "rejected" (nor "output"), but {sorted(row)[:8]}')
        chosen, rejected = row["chosen"], row["rejected"]
    scores = tuple(row.get(key) for key in ("score_chosen", "score_rejected"))
    scores = None if scores == (None, None) else scores
    require(scores is None or all(type(score) in (int, float) and abs(score) < 1e30 for score in scores),
            f'{where}: "score_chosen" and "score_rejected" must both be numbers, not {scores}')
    chosen, rejected = (answer_of(answer, prompt, where) for answer in (chosen, rejected))
    steps = row.get("initial_reason_steps")
    require(steps is None or (isinstance(steps, str) and chosen and rejected),
            f'{where}: "initial_reason_steps" must be text, and the steps after it must not be empty')
    return Preference(where, prompt, chosen, rejected, scores, steps)

def prompt_of(row, where):
    """The prompt of a row. Alpaca's "input" follows its "instruction" after a blank line, as it does in
    Alpaca's own template. "system" becomes a system message."""
    key = next((key for key in ("prompt", "instruction") if key in row), "chosen")
    prompt, fields = row.get(key), {name: row[name] for name in PROMPT_FIELDS if row.get(name)}
    if key == "chosen":  # two conversations, of which all turns but the last are the prompt
        require(isinstance(prompt, list) and isinstance(row.get("rejected"), list),
                f'{where}: has no "prompt" or "instruction", but {sorted(row)[:8]}')
        prompt = prompt[:-1]
    if isinstance(prompt, str):
        if key == "instruction" and isinstance(fields.get("input"), str):
            prompt += "\n\n" + fields.pop("input")
        prompt = [{"role": "user", "content": prompt}]
    prompt = plain_turns(prompt, f'{where}: "{key}"')
    require(prompt[-1]["role"] != "assistant",
            f'{where}: "{key}" ends with an assistant turn; it must end before the answer')
    if isinstance(fields.get("system"), str) and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": fields.pop("system")}, *prompt]
    require(not fields, f"{where}: {', '.join(fields)} would be left out of the prompt; put what it says "
            f'into "{key}", and remove it')
    return prompt[0]["content"] if len(prompt) == 1 and prompt[0]["role"] == "user" else prompt

def answer_of(answer, prompt, where):
    """The text of an answer: itself, or the last turn of a conversation that may begin with the prompt."""
    if isinstance(answer, str):
        return answer
    *before, last = plain_turns(answer, f"{where}: an answer")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    require(last["role"] == "assistant" and before in ([], turns),
            f"{where}: an answer must be one assistant turn, alone or after the prompt's turns")
    return last["content"]

def plain_turns(turns, where):
    """The turns without other fields, so that equal prompts are equal. InputError if they are none."""
    good = isinstance(turns, list) and turns and all(
        isinstance(t, dict) and t.get("role") in ROLES and isinstance(t.get("content"), str) for t in turns)
    require(good, f'{where} must be text or a list of {{"role", "content"}}, roles {", ".join(ROLES)}')
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
