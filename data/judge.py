"""Did it get better? A local reward model compares answers that sample.py has written with those of a base.

    python data/judge.py --reward-model skywork-8b BASE.json NEW.json ...        a table, a row for each NEW
    python data/judge.py --reward-model DIR --output judged.json BASE.json NEW.json       also as JSON

The files are in AlpacaEval's form, and answers are matched by their instruction. The answer of higher reward
wins; a tie counts half. length-controlled: the win rate at equal length. In brackets: a 95% interval, by a
bootstrap over instructions. missing: not answered in NEW; not in base: answered in NEW alone; no reward: one
of the two answers is too long for the reward model. These do not count. Each reward is kept in
FILE.rewards.jsonl when it is known: interrupted, the same command goes on from there."""
import hashlib
import json
import math
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # needed as a script
import dice  # noqa: E402
import model as models  # noqa: E402
from data import jsonl, options, processes, report, reward_model, runs, tiny  # noqa: E402
from data.files import append_row, require, whole_rows, write_file, write_json  # noqa: E402

RESAMPLES = 1000  # of the bootstrap
MEASURES = ("win rate", "length-controlled", "characters", "base's characters")

def parse(argv):
    """Command line -> (what to do, dice.Settings)."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("base", metavar="BASE.json", help="answers to compare with")
    add("new", metavar="NEW.json", nargs="+", help="answers to the same instructions")
    add("--reward-model", metavar="NAME", required=True, help="name or directory, as for --reward of dice.py")
    add("--output", metavar="FILE", help="where the table goes as JSON: a new file")
    known = options.all_options(dice.Settings)
    shown = {name: known[name] for name in ("device", "dtype", "score_tokens")}
    options.add_arguments(parser, shown)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in shown and value is not None}
    settings = options.build(dice.Settings, given)
    options.resolve(settings)
    return args, settings

def check_output(path):
    if path:
        require(not os.path.lexists(path), f"{path}: exists already; choose another --output")
        require(Path(path).parent.is_dir(), f"{path}: its directory does not exist")

def read_answers(path):
    """{instruction as JSON: dice.Sample} of a file in AlpacaEval's form. No token ids yet."""
    answers, places = {}, {}
    for where, row in jsonl.read_rows(path):
        content, text = jsonl.prompt_of(row, where), row.get("output")
        require(isinstance(text, str), f'{where}: "output" must be the text of one answer')
        key = json.dumps(content)
        first = places.setdefault(key, where)
        require(first == where, f"{where}: has the same instruction as {first}; remove one of them")
        answers[key] = dice.Sample(dice.Prompt(content, []), [], text)
    return answers

def add_rewards(files, directory, tokenizer, settings):
    """Give all answers their reward. files: [(path, {instruction: answer})]."""
    # key -> (where its reward is kept, the answers with this text). Subtle: the same text in two files is
    # judged once. In two batches its rewards could differ by rounding, and one would win.
    texts, rewards = {}, {}
    depends_on = [models.hash_of(directory), settings.dtype]
    for path, answers in files:
        part = Path(f"{path}.rewards.jsonl")
        for row in whole_rows(part):
            rewards[row.get("key")] = math.nan if row.get("reward") is None else row["reward"]
        for x in answers.values():
            told = json.dumps([*depends_on, x.prompt.content, x.text])
            key = hashlib.sha256(told.encode()).hexdigest()
            texts.setdefault(key, (part, []))[1].append(x)
    missing = [same[0] for key, (_, same) in texts.items() if key not in rewards]
    if missing:
        for path, _ in files:  # before any work is done: perhaps it cannot be written there
            Path(f"{path}.rewards.jsonl").touch()
        for x in missing:  # their lengths tell how much memory one alone needs
            x.prompt.ids, x.tokens = tokenizer.prompt(x.prompt.content), tokenizer.answer(x.text)
        device = processes.join_processes(settings.device)
        model = dice.load_model(directory, device, getattr(torch, settings.dtype))
        runs.Run.again({"score_tokens": settings.score_tokens}, "score_tokens", max(map(len, missing)),
                       "rewards", missing, judge, model, texts, rewards, tokenizer)
    for key, (_, same) in texts.items():
        for x in same:
            x.reward = rewards[key]

def judge(tokens, model, texts, rewards, tokenizer):
    """Put the rewards that are missing into `rewards`. Each is kept as soon as it is known."""
    missing = [key for key in texts if key not in rewards]
    samples = [texts[key][1][0] for key in missing]
    scored = reward_model.score(model, samples, tokens, tokenizer)
    with processes.Progress("rewards", len(texts), "answer", initial=len(texts) - len(missing)) as bar:
        for i, reward in scored:
            append_row(texts[missing[i]][0], {"key": missing[i], "reward": reward})
            rewards[missing[i]] = reward
            bar.advance(len(samples[i]))

def compare(base_file, new_file):
    """A row of the table: each of MEASURES as [value, low, high], and counts."""
    (base_path, base), (path, new) = base_file, new_file
    both = [key for key in base if key in new]
    judged = [key for key in both if math.isfinite(base[key].reward) and math.isfinite(new[key].reward)]
    require(judged, f"{path}: no answer can be compared with {base_path}: of {len(new)} instructions "
            f"{len(both)} are in both files, and the reward model has read both answers to none")
    rows = np.array([(new[key].reward, base[key].reward, len(new[key].text), len(base[key].text))
                     for key in judged])                                                       # (N, 4)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn.append(measure(rows[rng.integers(len(rows), size=len(rows))]))
    bounds = np.percentile(drawn, [2.5, 97.5], axis=0)                                         # (2, 4)
    measures = np.stack([measure(rows), *bounds], axis=1).tolist()                             # (4, 3)
    ties = int((np.abs(rows[:, 0] - rows[:, 1]) < 1e-9).sum())  # as in win_rates
    return {"answers": path, **dict(zip(MEASURES, measures)), "compared": len(judged), "ties": ties,
            "missing": len(base) - len(both), "not in base": len(new) - len(both),
            "no reward": len(both) - len(judged)}

def measure(rows):
    """The values of MEASURES, from the rewards and lengths (N, 4) of a model's and the base's answers."""
    reward, base_reward, length, base_length = rows.T
    rates = tiny.win_rates(reward, base_reward, length, base_length)
    return [*rates, length.mean(), base_length.mean()]

def shown(row):
    """A row of the table with its intervals as text."""
    intervals = {name: "{:.1f} [{:.1f}, {:.1f}]".format(*row[name]) for name in MEASURES}
    return row | intervals

@options.command("judge.py")
def main(argv=None):
    args, settings = parse(argv)
    check_output(args.output)
    files = [(path, read_answers(path)) for path in (args.base, *args.new)]
    directory, tokenizer = models.find_reward_model(args.reward_model)
    require(directory, f"--reward-model {args.reward_model}: give the directory of a reward model")
    add_rewards(files, directory, tokenizer, settings)
    table = [compare(files[0], file) for file in files[1:]]
    print(report.markdown([shown(row) for row in table]), end="")
    if args.output:
        check_output(args.output)  # it may have been made by another process meanwhile
        result = {"reward model": args.reward_model, "dtype": settings.dtype, "base": args.base,
                  "intervals": "[value, low, high], 95%, bootstrap over instructions", "table": table}
        write_file(Path(args.output), lambda scratch: write_json(scratch, result))

if __name__ == "__main__":
    sys.exit(main())
