"""Prompts and preferences in the field's forms, read from JSON lines (or one JSON array, as AlpacaEval's
set is).

A prompt is the text of one user turn, or a list of {"role", "content"} that ends before the assistant's
answer.
"""

import json
from pathlib import Path
from typing import NamedTuple

from model import InputError, parse_json

ROLES = ("system", "user", "assistant")


def read_rows(path):
    """Yields (where, row) of each JSON object in the file; where = "FILE line N", for messages."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})")
    if text.lstrip().startswith("["):
        rows = [(f"{path} entry {i + 1}", row) for i, row in enumerate(parse(text, path))]
    else:
        rows = ((f"{path} line {i + 1}", line) for i, line in enumerate(text.split("\n")) if line.strip())
        rows = [(where, parse(line, where)) for where, line in rows]
    if not rows:
        raise InputError(f"{path}: holds no rows")
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: not a JSON object")
        yield where, row


def parse(text, where):
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}")


def read_prompts(path):
    """A list of (where, prompt), each prompt once, from rows with "prompt" or "instruction", or with the
    conversations "chosen" and "rejected" that begin with it."""
    prompts = {}
    for where, row in read_rows(path):
        prompt = prompt_of(row, where)
        prompts.setdefault(json.dumps(prompt), (where, prompt))
    return list(prompts.values())


class Preference(NamedTuple):
    where: str  # file and line, for messages
    prompt: object
    chosen: str
    rejected: str
    scores: tuple | None = None  # (score_chosen, score_rejected), which ODPO needs
    steps: str | None = None  # Step-DPO: the correct steps that both answers go on from


def read_preferences(path):
    """A list of Preference: TRL's rows, plain or conversational, with or without the prompt repeated in the
    answers, and the DICE repository's {"prompt" or "instruction", "output": [chosen, rejected]}. A row may
    have "score_chosen" and "score_rejected", and "initial_reason_steps" as Step-DPO's rows do."""
    return [preference(row, where) for where, row in read_rows(path)]


def preference(row, where):
    prompt = prompt_of(row, where)
    if "output" in row and "chosen" not in row:
        if not (isinstance(row["output"], list) and len(row["output"]) == 2):
            raise InputError(f'{where}: "output" must be a list of two, chosen and rejected')
        chosen, rejected = row["output"]
    elif "chosen" in row and "rejected" in row:
        chosen, rejected = row["chosen"], row["rejected"]
    else:
        raise InputError(f'{where}: has no "chosen" and "rejected" (nor "output"), but {sorted(row)[:8]}')
    scores = tuple(row.get(key) for key in ("score_chosen", "score_rejected"))
    if scores == (None, None):
        scores = None
    elif not all(type(score) in (int, float) and abs(score) < 1e30 for score in scores):
        raise InputError(f'{where}: "score_chosen" and "score_rejected" must both be numbers, not {scores}')
    chosen, rejected = (answer_of(answer, prompt, where) for answer in (chosen, rejected))
    steps = row.get("initial_reason_steps")
    if steps is not None and not (isinstance(steps, str) and chosen and rejected):
        raise InputError(f'{where}: "initial_reason_steps" must be text, and the steps after it not empty')
    return Preference(where, prompt, chosen, rejected, scores, steps)


def prompt_of(row, where):
    for key in ("prompt", "instruction"):
        if key in row:
            break
    else:
        if not isinstance(row.get("chosen"), list) or not isinstance(row.get("rejected"), list):
            raise InputError(f'{where}: has no "prompt" or "instruction", but {sorted(row)[:8]}')
        key, row = "chosen", {"chosen": row["chosen"][:-1]}
    prompt = row[key]
    if isinstance(prompt, str):
        return prompt
    check_turns(prompt, f'{where}: "{key}"')
    if prompt[-1]["role"] == "assistant":
        raise InputError(f'{where}: "{key}" ends with an assistant turn; it must end before the answer')
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return prompt[0]["content"]
    return [{"role": turn["role"], "content": turn["content"]} for turn in prompt]  # equal prompts are equal


def answer_of(answer, prompt, where):
    """The text of an answer: itself, or the last turn of a conversation that may begin with the prompt."""
    if isinstance(answer, str):
        return answer
    check_turns(answer, f"{where}: an answer")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if answer[-1]["role"] != "assistant" or (len(answer) > 1 and plain(answer[:-1]) != plain(turns)):
        raise InputError(f"{where}: an answer must be one assistant turn, alone or after the prompt's turns")
    return answer[-1]["content"]


def plain(turns):
    return [(turn["role"], turn["content"]) for turn in turns]


def check_turns(turns, where):
    ok = isinstance(turns, list) and turns and all(
        isinstance(t, dict) and t.get("role") in ROLES and isinstance(t.get("content"), str) for t in turns)
    if not ok:
        raise InputError(f'{where} must be text or a list of {{"role", "content"}}, roles {", ".join(ROLES)}')
