"""The study on the tiny world: variants of DICE (arms), over several seeds, as tables and one picture.

    python data/ablations.py --seeds 10-19     writes table.md and table.png into out/ablations

Each seed's SFT and DPO models are trained once, and the answers of its first round are drawn once. Every arm
is a run that starts from them. There is one process for each core, with one thread. Finished arms are kept,
under a hash of the code and of the arm's settings: the same command goes on where it stopped, and other code
runs an arm again."""
import hashlib
import os
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dice  # noqa: E402
from data import files, jsonl, options, plots, report, runs  # noqa: E402

MAIN_ARMS = {  # name: what differs from the default settings. These are in the short table, round by round
    "DICE": {"rounds": 4},
    "no shaping": {"rounds": 3, "alpha": "0"},
    "no replay": {"rounds": 3, "gamma": 0.0},
    "offline pairs only": {"rounds": 4, "gamma": 1.0},
    "first model, gamma .75": {"rounds": 4, "reward_reference": "first", "gamma": 0.75},
    "gold labels": {"rounds": 3, "reward": "gold", "alpha": "0"},
    "iLR-DPO, gold labels": {"rounds": 3, "loss": "lr-dpo", "reward": "gold", "alpha": "0"}}
ARMS = MAIN_ARMS | {  # the others have the default of two rounds
    "twice alpha*": {"alpha": "2x"},
    "gamma .25": {"gamma": 0.25},
    "gamma .75": {"gamma": 0.75},
    "reward against the first model": {"reward_reference": "first"},
    "cDPO": {"loss": "cdpo"},
    "length margin, no shaping": {"loss": "lr-dpo", "alpha": "0"},
    "ODPO": {"loss": "odpo"},
    "TDPO1": {"loss": "tdpo1"},
    "TDPO2": {"loss": "tdpo2"},
    "IPO": {"loss": "ipo"},
    "SimPO": {"loss": "simpo"},
    "fDPO": {"data_filter": "fdpo"},
    "best against random": {"rejected": "random"},
    "length in tokens": {"length_unit": "tokens"}}
COMPARED = ("win rate", "length-controlled")  # columns that are also shown as differences to DICE
SHORT = (*COMPARED, *(f"{name} minus DICE's" for name in COMPARED), "gold", "characters", "pairs right %")
# Files that change no result
NO_RESULT = ("ablations.py", "plan.py", "plots.py", "hub.py", "ultrafeedback.py", "sample.py", "judge.py")

def work(out, seed, name):
    """One job: an arm of a seed. The arm DICE first makes what the others share."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # the progress bars of two processes would mix
    base = directory(out, seed, None)
    common = ["--seed", str(seed), "--device", "cpu"]
    if name == "DICE" and dice.main([*common, "--rounds", "0", "--out", str(base)]):
        raise SystemExit(f"seed {seed}: SFT or DPO has failed; run python dice.py --seed {seed} to see why")
    argv = [*common, "--start-from", str(base), "--out", str(directory(out, seed, name))]
    for key, value in ARMS[name].items():
        argv += ["--" + key.replace("_", "-"), str(value)]
    settings, _ = options.parse(dice.Settings, "", dice.LOSSES, argv)
    with dice.Run(settings) as run:
        shutil.copytree(base / "evaluation", run.out / "evaluation", dirs_exist_ok=True)
        first_models = dice.first_models(run)
        if name != "DICE":
            share_first_round(run, directory(out, seed, "DICE"))
        dice.run_rounds(run, *first_models)
        report.write(run.out)
        if name in MAIN_ARMS:
            files.write_json(run.out / "unlearned.json", unlearned(run, first_models[0]))

def unlearned(run, policy_dir):
    """{stage: mean sigmoid(-margin) of a round's pairs after its training}. This is the weight of a pair in
    DPO's gradient: 1/2 at first, it falls to 0 as pairs are learned. Is the offline data used up?"""
    found = {}
    for t in range(1, run.settings.rounds + 1):
        rows = jsonl.read_preferences(run.out / f"round-{t}/pairs.jsonl")
        samples = dice.answers_of(dice.load_pairs(rows, run.tokenizer, run.settings, run.config.context))
        new_dir, ratio = run.out / f"round-{t}/policy", np.zeros(len(samples))
        for sign, model_dir in ((1, new_dir), (-1, policy_dir)):
            for i, logprob in dice.answer_logprobs(run.load(model_dir), samples, run.settings.score_tokens):
                ratio[i] += sign * logprob
        margin = run.settings.beta * (ratio[0::2] - ratio[1::2])
        found[f"round-{t}"] = float((0.5 - 0.5 * np.tanh(margin / 2)).mean())
        policy_dir = new_dir
    return found

def share_first_round(run, source):
    """Put the first round's answers and log-probs of a finished run where run.map looks for kept ones. They
    are the same in all arms: the seed, pi_1 and pi_0 alone decide them."""
    if (run.out / "round-1").exists():  # this arm was interrupted later
        return
    rows, prompts = report.read_rows(source / "round-1" / "samples.jsonl"), {p.key: p for p in run.prompts}
    samples = [dice.Sample(prompts[row["prompt"]], row["tokens"], row["text"]) for row in rows]
    shutil.rmtree(run.out / "partial", ignore_errors=True)
    order, drawn = runs.longest_first(run.prompts), []  # run.map keeps them in this order
    for i in order:
        of_prompt = rows[i * run.settings.samples:(i + 1) * run.settings.samples]
        drawn += [(row["tokens"], row["finish"]) for row in of_prompt]
    for label, items, results in (
            ("samples", [run.prompts[i] for i in order], drawn),
            ("samples logprob", samples, [row["logprob"] for row in rows]),
            ("samples prev_logprob", samples, [row["prev_logprob"] for row in rows])):
        kept = {"items": runs.hash_of(items), "first": 0, "results": results}
        files.append_row(run.partial(f"round-1 {label}.0.jsonl"), kept)

def directory(out, seed, name):
    """Where the run of an arm is, or that of the models before the first round (name None)."""
    digest = hashlib.sha256(repr(ARMS.get(name)).encode())
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]):
        if path.name not in NO_RESULT:
            digest.update(path.read_bytes())
    label = "base" if name is None else name.translate(str.maketrans(" ,*", "-__"))
    return out / f"seed-{seed}" / f"{label}-{digest.hexdigest()[:8]}"

def run_jobs(out, seeds, workers):
    """The arm DICE of all seeds, then the main arms, then the others. A finished job ends at once."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        others = [name for name in ARMS if name not in MAIN_ARMS]
        for arms in (["DICE"], list(MAIN_ARMS)[1:], others):
            jobs = {pool.submit(work, out, seed, name): (seed, name) for seed in seeds for name in arms}
            for left, job in enumerate(as_completed(jobs)):
                job.result()
                seed, name = jobs[job]
                print(f"seed {seed}: {name} done; {len(jobs) - left - 1} of this kind to go", file=sys.stderr)

def collect(out, seeds):
    """{(arm, stage): {column: values (seeds,)}}. SFT and DPO are the same in all arms: once, with arm ""."""
    values = {}
    for seed in seeds:
        for name in ARMS:
            run = directory(out, seed, name)
            more = files.read_json(run / "unlearned.json")
            for row in report.judged_table(run, report.read_rows(run / "metrics.jsonl"), full=True):
                stage = row.pop("stage")
                row["trained pairs unlearned"] = more.get(stage, np.nan)
                before = stage in ("sft", "dpo")
                if name == "DICE" or not before:
                    columns = values.setdefault(("" if before else name, stage), {})
                    for column, value in row.items():
                        columns.setdefault(column, []).append(value)
    for columns in values.values():
        for column, numbers in columns.items():
            columns[column] = np.array(numbers, dtype=float)
    return values

def full_table(values):
    """All arms and all columns of report.judged_table, and the differences to DICE."""
    differences = [f"{column} minus DICE's" for column in COMPARED]
    return table(values, [*values["DICE", "round-1"], *differences])

def short_table(values):
    """For the README: the main arms, and the DPO model. A row for each round, 25 in all."""
    main = {}
    for (name, stage), columns in values.items():
        if name in MAIN_ARMS or stage == "dpo":
            main[name, stage] = columns
    return table(main, SHORT)

def table(values, names):
    """A row for each arm and stage, with these columns: mean and standard error over the seeds. Differences
    to DICE are paired: minus DICE of the same seed and round."""
    lines = ["| arm | stage | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for (name, stage), columns in values.items():
        if name not in ("", "DICE"):
            for column in COMPARED:
                difference = columns[column] - values["DICE", stage][column]
                columns = columns | {f"{column} minus DICE's": difference}
        cells = []
        for column in names:
            mean, error = plots.mean_and_error(columns.get(column, [np.nan]))
            digits = 1 if column in SHORT and column != "gold" or "%" in column else 3
            cells.append("" if np.isnan(mean) else f"{mean:.{digits}f} ± {error:.{digits}f}")
        lines.append(f"| {name} | {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

def seed_range(text):
    """"10-19" -> the seeds 10 to 19."""
    first, last = text.split("-")
    return range(int(first), int(last) + 1)

def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=seed_range, default="10-19", help="first and last (default: 10-19)")
    parser.add_argument("--out", type=Path, default=Path("out/ablations"), help="default: out/ablations")
    args = parser.parse_args()
    run_jobs(args.out, args.seeds, workers=os.cpu_count())
    values = collect(args.out, args.seeds)
    (args.out / "table.md").write_text(full_table(values), encoding="utf-8")
    print(short_table(values))
    plots.study(args.out / "table.png", values, MAIN_ARMS)

if __name__ == "__main__":
    main()
