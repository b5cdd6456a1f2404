"""The study on the tiny world: variants of DICE (arms), over several seeds, as one table and one picture.

    python data/ablations.py --seeds 10        writes out/ablations/table.md and table.png

Each seed's SFT and DPO models are trained once; every arm is a run that starts from them (--start-from).
There is one process for each core, with one thread. Finished arms are kept, under a hash of the code and of
the arm's settings: the same command goes on where it stopped, and other code runs an arm again."""
import hashlib
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ARMS = {  # name: what differs from the default settings
    "DICE": {"rounds": 3},
    "no shaping": {"rounds": 3, "alpha": "0"},
    "twice alpha*": {"rounds": 3, "alpha": "2x"},
    "no replay": {"rounds": 3, "gamma": 0.0},
    "gamma .25": {"rounds": 3, "gamma": 0.25},
    "gamma .75": {"rounds": 3, "gamma": 0.75},
    "gamma 1, offline pairs only": {"rounds": 3, "gamma": 1.0},
    "reward against the first model": {"rounds": 3, "reward_reference": "first"},
    "gold labels": {"rounds": 3, "reward": "gold", "alpha": "0"},
    "cDPO": {"loss": "cdpo"},
    "length margin, no shaping": {"loss": "lr-dpo", "alpha": "0"},
    "iLR-DPO, gold labels": {"loss": "lr-dpo", "reward": "gold", "alpha": "0"},
    "ODPO": {"loss": "odpo"},
    "TDPO1": {"loss": "tdpo1"},
    "TDPO2": {"loss": "tdpo2"},
    "IPO": {"loss": "ipo"},
    "SimPO": {"loss": "simpo"},
    "fDPO": {"data_filter": "fdpo"},
    "best against random": {"rejected": "random"},
    "length in tokens": {"length_unit": "tokens"}}
COLUMNS = ("win rate", "length-controlled", "gold", "characters", "reward agrees %", "pairs right %")
NO_RESULT = ("ablations.py", "plan.py", "hub.py", "ultrafeedback.py", "sample.py")  # they change no result

def work(out, seed, name):
    """One job: the models of a seed before the first round (name None), or one of its arms."""
    import torch
    import dice
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # the progress bars of two processes would mix
    argv = ["--seed", str(seed), "--out", str(directory(out, seed, name)), "--device", "cpu"]
    argv += ["--rounds", "0"] if name is None else ["--start-from", str(directory(out, seed, None))]
    for key, value in ARMS.get(name, {}).items():
        argv += ["--" + key.replace("_", "-"), str(value)]
    if dice.main(argv):
        raise SystemExit(f"python dice.py {' '.join(argv)} has failed; run it to see why")

def directory(out, seed, name):
    """Where the run of an arm is, or that of the models before the first round (name None)."""
    digest = hashlib.sha256(repr(ARMS.get(name)).encode())
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]):
        if path.name not in NO_RESULT:
            digest.update(path.read_bytes())
    label = "base" if name is None else name.translate(str.maketrans(" ,*", "-__"))
    return out / f"seed-{seed}" / f"{label}-{digest.hexdigest()[:8]}"

def run_jobs(out, seeds, workers):
    """First the models of each seed before the first round, then its arms. A finished job ends at once."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(work, out, seed, None): (seed, None) for seed in seeds}
        while jobs:
            job = next(as_completed(list(jobs)))
            seed, name = jobs.pop(job)
            job.result()
            print(f"seed {seed}: {name or 'SFT and DPO'} done; {len(jobs)} jobs to go", file=sys.stderr)
            if name is None:
                jobs |= {pool.submit(work, out, seed, arm): (seed, arm) for arm in ARMS}

def collect(out, seeds):
    """{(arm, stage): {column: values (seeds,)}}. SFT and DPO are the same in all arms: once, with arm ""."""
    from data import report
    values = {}
    for seed in seeds:
        for name in ARMS:
            run = directory(out, seed, name)
            for row in report.judged_table(run, report.read_rows(run / "metrics.jsonl")):
                before = row["stage"] in ("sft", "dpo")
                if name == "DICE" or not before:
                    key = "" if before else name, row["stage"]
                    for column in COLUMNS:
                        values.setdefault(key, {}).setdefault(column, []).append(row[column])
    return values

def mean_and_error(numbers):
    """Mean and standard error of the mean."""
    error = np.std(numbers, ddof=1) / len(numbers) ** 0.5 if np.size(numbers) > 1 else np.nan
    return np.mean(numbers), error

def table(values):
    """One row for each arm and stage. The last column is paired: minus DICE of the same seed and round."""
    names = [*COLUMNS, "length-controlled minus DICE's"]
    lines = ["| arm | stage | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for (name, stage), columns in values.items():
        if stage == "round-1" and name != "DICE":
            continue
        if name not in ("", "DICE"):
            mine, theirs = (np.array(values[arm, stage]["length-controlled"]) for arm in (name, "DICE"))
            columns = {**columns, names[-1]: mine - theirs}
        cells = []
        for column in names:
            mean, error = mean_and_error(columns.get(column, np.nan))
            digits = 3 if column == "gold" else 1
            cells.append("" if np.isnan(mean) else f"{mean:.{digits}f} ± {error:.{digits}f}")
        lines.append(f"| {name} | {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"

def picture(path, values):
    """Left: the arms of three rounds, round by round. Middle and right: every arm after two rounds."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5.5), width_ratios=(3, 2, 2))
    for name in ARMS:
        stages = [("", "dpo"), *((name, f"round-{t}") for t in (1, 2, 3))]
        if stages[-1] in values:
            points = [mean_and_error(values[key]["length-controlled"]) for key in stages]
            axes[0].errorbar(range(4), *zip(*points), marker="o", markersize=3, capsize=2, label=name)
    axes[0].set(title="length-controlled win rate, %", xlabel="round (0: DPO)", xticks=range(4))
    axes[0].legend(fontsize=8)
    names = list(ARMS)[::-1]
    for axis, column in zip(axes[1:], ("length-controlled", "characters")):
        means, errors = zip(*(mean_and_error(values[name, "round-2"][column]) for name in names))
        axis.errorbar(means, range(len(names)), xerr=errors, fmt="o", markersize=4, capsize=2)
        axis.axvline(np.mean(values["", "dpo"][column]), color="grey", linestyle=":", label="DPO")
        axis.set_yticks(range(len(names)), names if axis is axes[1] else [""] * len(names), fontsize=8)
        axis.set_title(f"{column} after two rounds")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)

def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 .. this - 1 (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("out/ablations"), help="default: out/ablations")
    options = parser.parse_args()
    seeds = range(options.seeds)
    run_jobs(options.out, seeds, workers=os.cpu_count())
    values = collect(options.out, seeds)
    (options.out / "table.md").write_text(table(values), encoding="utf-8")
    print(table(values))
    try:
        picture(options.out / "table.png", values)
    except ImportError:
        print("table.png was not drawn: pip install matplotlib", file=sys.stderr)

if __name__ == "__main__":
    main()
