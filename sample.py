"""Talk to any checkpoint, or write its answers to a file of prompts for AlpacaEval.

    python sample.py --model out/tiny/round-2/policy                    a chat, turn by turn; Ctrl-D ends it
    python sample.py --model DIR --prompt "Why is the sky blue?"        the answer alone, on standard output
    python sample.py --model DIR --raw --prompt "Once upon a time"      the text goes on; no chat format
    python sample.py --model DIR --prompts alpaca_eval.json --output answers.json     one answer for each row

The sampler is dice.generate. Its options have the same meaning and defaults as in dice.py. The same seed and
prompt give the same answer. Each turn of a chat rereads the whole conversation: simple, and fast enough."""
import hashlib
import json
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch

import dice
import model as models
from data import jsonl, memory, options, processes, runs
from data.files import InputError, append_row, json_line, require, whole_rows, write_file

def parse(argv):
    """Command line -> (what to do, dice.Settings)."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="answer this and exit; with neither this nor --prompts: a chat")
    add("--raw", action="store_true", help="continue the text itself, without a chat format")
    add("--prompts", metavar="FILE", help="JSON lines, or one JSON array: answer each prompt")
    add("--output", metavar="FILE", help="where the answers to --prompts go: AlpacaEval's form, a new file")
    shown = options.all_options(dice.Sampling)
    for name in ("model", "chat", "system", "seed", "device", "dtype", "rows"):
        shown[name] = options.all_options(dice.Settings)[name]
    options.add_arguments(parser, shown)
    args = options.read_arguments(parser, argv)
    require(args.model, "--model NAME: give a name or a Hugging Face directory")
    values = dict(models.PRESETS[args.model].settings) if args.model in models.PRESETS else {}
    values |= {name: value for name, value in vars(args).items() if value is not None}
    settings = options.build(dice.Settings, {name: values[name] for name in shown if name in values})
    options.resolve(settings)
    return args, settings

def check(args):
    """Refuse impossible options before any work is done."""
    require(args.prompt is None or not args.prompts, "--prompt and --prompts: give one of them")
    require(bool(args.prompts) == bool(args.output), "--prompts FILE and --output FILE go together")
    require(not args.raw or args.prompt is not None or args.prompts,
            "--raw: needs --prompt or --prompts; a chat needs a chat format")
    if args.output:
        require(not os.path.lexists(args.output), f"{args.output}: exists already; choose another --output")
        require(Path(args.output).parent.is_dir(), f"{args.output}: its directory does not exist")

def load(settings):
    """The model and its tokenizer, on the device that the settings name."""
    directory = models.resolve(settings.model)  # refuses "tiny", which dice.py makes itself
    *_, tokenizer = models.find_models(settings, out=None)
    device = processes.join_processes(settings.device)
    return dice.load_model(directory, device, getattr(torch, settings.dtype)), tokenizer

def encode(prompt, raw, model, tokenizer, where):
    """Token ids of a prompt, which leave room for an answer."""
    require(isinstance(prompt, str) or not raw, f"{where}: --raw takes a text, not a conversation")
    ids = tokenizer.raw(prompt) if raw else tokenizer.prompt(prompt)
    require(ids, f"{where}: the prompt is empty")
    require(len(ids) < model.config.context, f"{where}: {len(ids)} tokens leave no room for an answer in the "
            f"model's context of {model.config.context}; shorten it")
    return ids

class Stream:
    """Prints an answer token by token. It is called with each token as it is drawn."""
    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], 0

    def __call__(self, token):
        # Subtle: a token may end in the middle of a character, so all tokens are decoded together. A text
        # that ends in U+FFFD, the mark of a broken character, waits for the next token.
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            print(text[self.shown:], end="", flush=True)
            self.shown = len(text)

def answer(model, tokenizer, ids, settings):
    """Print the answer to one prompt, on a terminal token by token. Returns its text."""
    stream = Stream(tokenizer)
    [(_, _, drawn, finish_reason)] = dice.generate(
        model, [ids], 1, settings.sampling, stop_ids=tokenizer.stop_ids, seed=settings.seed, rows=1,
        on_token=stream if sys.stdout.isatty() else None)
    text = tokenizer.decode(drawn)
    print(text[stream.shown:], flush=True)
    if finish_reason == "length":
        context = model.config.context
        full = settings.sampling.max_new_tokens >= context - len(ids)
        limit = f"the context of {context} tokens is full" if full else "--max-new-tokens"
        print(f"[cut: {limit}]", file=sys.stderr)
    return text

def chat(model, tokenizer, settings):
    """A conversation, turn by turn, until the input ends or the context is full."""
    turns, terminal = [], sys.stdin.isatty() and sys.stdout.isatty()
    try:
        while True:
            text = input("> " if terminal else "")
            if not text.strip():
                continue
            turns.append({"role": "user", "content": text})
            ids = encode(turns, False, model, tokenizer, "this conversation")
            turns.append({"role": "assistant", "content": answer(model, tokenizer, ids, settings)})
    except (EOFError, KeyboardInterrupt):
        print(end="\n" if terminal else "")
    except UnicodeDecodeError:
        raise InputError("standard input: not UTF-8 text") from None

def write_answers(args, model, tokenizer, settings, rows):
    """Write an answer in AlpacaEval's form for each (where, row) of the prompts file, in its order. What is
    drawn is kept in OUTPUT.part, and the same command goes on from there."""
    prompts, table = [], []
    for where, row in rows:
        content = jsonl.prompt_of(row, where)
        prompts.append(dice.Prompt(content, encode(content, args.raw, model, tokenizer, where)))
    part = Path(f"{Path(args.output)}.part")
    drawn = open_part(part, tokenizer, settings, [prompt.ids for prompt in prompts])
    runs.Run.again({"rows": settings.rows}, "rows", 1, args.output, prompts, draw, model, prompts, drawn,
                   part, tokenizer, settings)
    for i, (_, row) in enumerate(rows):
        dataset = {"dataset": row["dataset"]} if "dataset" in row else {}
        table.append({**dataset, "instruction": prompts[i].content, "output": tokenizer.decode(drawn[i]),
                      "generator": args.model})
    check(args)  # the output may have been made by another process meanwhile
    text = json.dumps(table, indent=1) + "\n"
    write_file(Path(args.output), lambda scratch: scratch.write_text(text, encoding="utf-8"))
    part.unlink()
    cut = sum(ids[-1] not in tokenizer.stop_ids for ids in drawn.values())
    processes.log_info(f"{args.output}: {len(drawn)} answers, {cut} of them cut by the length limit")

def open_part(part, tokenizer, settings, prompts):
    """{index: ids} of the answers in `part`. Its first line is a hash of all that they depend on."""
    told = [models.hash_of(models.resolve(settings.model)), options.as_dict(settings.sampling),
            settings.seed, settings.dtype, tokenizer.stop_ids, prompts]
    head = json_line({"hash": hashlib.sha256(json.dumps(told).encode()).hexdigest()})
    if not part.exists():  # before any work is done: perhaps it cannot be written there
        write_file(part, lambda scratch: scratch.write_text(head))
    with open(part, "rb") as file:
        require(file.readline() == head.encode(), f"{part}: keeps answers of another model, or to other "
                "prompts or settings; give the same ones to go on, or remove it to begin again")
    return {row["index"]: row["ids"] for row in whole_rows(part)[1:]}

def draw(rows, model, prompts, drawn, part, tokenizer, settings):
    """Draw the answers that are missing in `drawn`. Each is kept as soon as it ends."""
    missing = [i for i in range(len(prompts)) if i not in drawn]
    if not missing:
        return
    rows = memory.rows_in_flight(model, [prompts[i] for i in missing], 1, settings.sampling, rows)
    answers = dice.generate(model, [prompts[i].ids for i in missing], 1, settings.sampling,
                            stop_ids=tokenizer.stop_ids, seed=settings.seed, rows=rows)
    with processes.Progress("answers", len(prompts), "answer", initial=len(drawn)) as bar:
        for index, _, ids, _ in answers:
            append_row(part, {"index": missing[index], "ids": ids})
            drawn[missing[index]] = ids
            bar.advance(len(ids))

@options.command("sample.py")
def main(argv=None):
    args, settings = parse(argv)
    check(args)
    rows = list(jsonl.read_rows(args.prompts)) if args.prompts else []
    model, tokenizer = load(settings)
    if rows:
        write_answers(args, model, tokenizer, settings, rows)
    elif args.prompt is not None:
        answer(model, tokenizer, encode(args.prompt, args.raw, model, tokenizer, "--prompt"), settings)
    else:
        chat(model, tokenizer, settings)

if __name__ == "__main__":
    sys.exit(main())
