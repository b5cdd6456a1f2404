"""Talk to any checkpoint, or write its answers to a file of prompts for AlpacaEval.

    python sample.py --model out/tiny/round-2/policy                    a chat, turn by turn; Ctrl-D ends it
    python sample.py --model DIR --prompt "Why is the sky blue?"        the answer alone, on standard output
    python sample.py --model DIR --raw --prompt "Once upon a time"      the text goes on; no chat format
    python sample.py --model DIR --prompts alpaca_eval.json --output answers.json     one answer for each row

The sampler is dice.generate, and its knobs mean and default to what they do there. The same seed and prompt
give the same answer. Each turn of a chat prefills the whole conversation again: simple, and quick enough to
type against.
"""

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

import dice
import model as models
from data import jsonl
from model import InputError

# The knobs of dice.Settings that mean something here
KNOBS = ("model", "chat", "temperature", "top_p", "max_new_tokens", "seed", "device", "dtype", "rows")


def parse(argv):
    """Command line -> (what to do, dice.Settings)."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="a name or a Hugging Face directory")
    add("--prompt", metavar="TEXT", help="answer this and exit; with neither this nor --prompts: a chat")
    add("--raw", action="store_true", help="go on with the text as it stands, without a chat format")
    add("--prompts", metavar="FILE", help="JSON lines, or one JSON array: answer each prompt")
    add("--output", metavar="FILE", help="where the answers to --prompts go: AlpacaEval's form, a new file")
    for f in fields(dice.Settings):
        if f.name in KNOBS and f.name != "model":
            add("--" + f.name.replace("_", "-"), type=f.type, metavar=f.type.__name__.upper(),
                help=f"{f.metadata['help']} (default: {f.default})")
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in KNOBS and value is not None}
    own = {name: value for name, value in models.SETTINGS.get(args.model, {}).items() if name in KNOBS}
    settings = dice.Settings(**{**own, **given})
    settings.settle()
    return args, settings


def check(args):
    """Refuse what cannot end well before any work is done."""
    if args.prompt is not None and args.prompts:
        raise InputError("--prompt and --prompts: give one of them")
    if bool(args.prompts) != bool(args.output):
        raise InputError("--prompts FILE and --output FILE go together")
    if args.raw and args.prompt is None and not args.prompts:
        raise InputError("--raw: needs --prompt or --prompts; a chat has a chat format")
    if args.output and os.path.lexists(args.output):
        raise InputError(f"{args.output}: already exists and is not overwritten; choose another --output")
    if args.output and not Path(args.output).parent.is_dir():
        raise InputError(f"{args.output}: its directory does not exist")


def load(settings):
    """The model and its tokenizer, on the device that the settings name."""
    directory = models.resolve(settings.model)
    tokenizer = models.read_tokenizer(directory, settings.chat)
    if models.read_config(directory).vocab_size < tokenizer.vocab_size:
        raise InputError(f"{directory}: has fewer embeddings than its tokenizer has ids")
    return dice.load_model(directory, settings.device, getattr(torch, settings.dtype)), tokenizer


def encode(prompt, raw, model, tokenizer, where):
    """Token ids of a prompt, with room for an answer behind them."""
    if raw and not isinstance(prompt, str):
        raise InputError(f"{where}: --raw takes a text, not a conversation")
    ids = tokenizer.raw(prompt) if raw else tokenizer.prompt(prompt)
    if not ids:
        raise InputError(f"{where}: the prompt is empty")
    if len(ids) >= model.config.context:
        raise InputError(f"{where}: {len(ids)} tokens leave no room for an answer in the model's context of "
                         f"{model.config.context}; shorten it")
    return ids


def sample(model, tokenizer, prompts, settings, on_token=None):
    """Yields (prompt index, text, finish) as the answers end."""
    s = settings
    for index, _, ids, finish in dice.generate(
            model, prompts, 1, stop_ids=tokenizer.stop_ids, seed=s.seed, temperature=s.temperature,
            top_p=s.top_p, max_new_tokens=s.max_new_tokens, rows=s.rows, on_token=on_token):
        yield index, tokenizer.decode(ids), finish


class Stream:
    """Prints an answer token by token. Called with each token as it is drawn."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def __call__(self, token):
        # Subtle: a token may end in the middle of a character, so tokens are not decoded one by one. All of
        # them are, and what ends in U+FFFD, the mark of a broken character, waits for the next token.
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            print(text[self.shown:], end="", flush=True)
            self.shown = len(text)


def say(model, tokenizer, ids, settings):
    """Print the answer to one prompt, as it comes where somebody watches: its text and its finish."""
    stream = Stream(tokenizer)
    (_, text, finish), = sample(model, tokenizer, [ids], settings, stream if sys.stdout.isatty() else None)
    print(text[stream.shown:], flush=True)
    return text, finish


def chat(model, tokenizer, settings):
    """Turn by turn, the whole conversation kept, until the input ends or the context is full."""
    turns, watched = [], sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            text = input("> " if watched else "")
        except (EOFError, KeyboardInterrupt):
            if watched:
                print()
            return
        except UnicodeDecodeError:
            raise InputError("standard input: not UTF-8 text")
        if not text.strip():
            continue
        turns.append({"role": "user", "content": text})
        ids = encode(turns, False, model, tokenizer, "this conversation")
        try:
            answer, finish = say(model, tokenizer, ids, settings)
        except KeyboardInterrupt:
            return print()
        turns.append({"role": "assistant", "content": answer})
        if finish == "length":
            full = settings.max_new_tokens >= model.config.context - len(ids)
            limit = f"the context of {model.config.context} tokens is full" if full else "--max-new-tokens"
            print(f"[cut: {limit}]", file=sys.stderr)


def write_answers(args, model, tokenizer, settings, rows):
    """An answer in AlpacaEval's form for each (where, row) of the prompts file, in its order."""
    prompts = [jsonl.prompt_of(row, where) for where, row in rows]
    ids = [encode(prompt, args.raw, model, tokenizer, where) for prompt, (where, _) in zip(prompts, rows)]
    answers = [None] * len(rows)
    with tqdm(total=len(rows), unit="answer") as bar:
        for index, text, _ in sample(model, tokenizer, ids, settings):
            answers[index] = text
            bar.update()
    table = [{**({"dataset": row["dataset"]} if "dataset" in row else {}),
              "instruction": prompt, "output": answer, "generator": args.model}
             for (_, row), prompt, answer in zip(rows, prompts, answers)]
    # All of it or nothing: written beside its final place, then renamed.
    scratch = Path(f"{args.output}.{os.getpid()}.tmp")
    try:
        scratch.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        check(args)  # has somebody else made that file meanwhile?
        scratch.rename(args.output)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def main(argv=None):
    """Do what was asked; the exit code."""
    try:
        args, settings = parse(argv)
        check(args)
        rows = list(jsonl.read_rows(args.prompts)) if args.prompts else []
        model, tokenizer = load(settings)
        if rows:
            write_answers(args, model, tokenizer, settings, rows)
        elif args.prompt is not None:
            say(model, tokenizer, encode(args.prompt, args.raw, model, tokenizer, "--prompt"), settings)
        else:
            chat(model, tokenizer, settings)
    except InputError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
