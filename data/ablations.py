"""The study on the tiny world: arms of the experiment, over several seeds, as one table and one picture.

    python data/ablations.py --seeds 10        writes out/ablations/table.md and table.png

A seed's SFT and DPO models are trained once; every arm starts from them. One process a core, one thread each.
What is finished is kept: the same command goes on where it stopped.
"""

import argparse
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
ARMS = {  # name: what differs from the default settings
    "DICE": {"rounds": 3},
    "no shaping": {"rounds": 3, "alpha": "0"},
    "twice alpha*": {"rounds": 3, "alpha": "2x"},
    "no replay": {"rounds": 3, "gamma": 0.0},
    "gamma .25": {"rounds": 3, "gamma": 0.25},
    "gamma .75": {"rounds": 3, "gamma": 0.75},
    "gamma 1, offline pairs only": {"rounds": 3, "gamma": 1.0},
    "reward against the first model": {"rounds": 3, "reward_reference": "first"},
    "gold labels": {"rounds": 3, "labeller": "gold", "alpha": "0"},
    "cDPO": {"loss": "cdpo"},
    "length margin, no shaping": {"loss": "lr-dpo", "alpha": "0"},
    "iLR-DPO, gold labels": {"loss": "lr-dpo", "labeller": "gold", "alpha": "0"},
    "ODPO": {"loss": "odpo"},
    "TDPO1": {"loss": "tdpo1"},
    "TDPO2": {"loss": "tdpo2"},
    "IPO": {"loss": "ipo"},
    "SimPO": {"loss": "simpo"},
    "fDPO": {"filter": "fdpo"},
    "best against random": {"rejected": "random"},
    "length in tokens": {"length": "tokens"},
}
COLUMNS = ("win rate", "length-controlled", "gold", "characters", "reward agrees %", "pairs right %")


def base(directory, seed):
    """SFT and DPO of one seed, evaluated, in directory."""
    import dice

    work = directory.with_name("base.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    settings, _ = dice.parse_settings(["--seed", str(seed), "--out", str(work), "--device", "cpu"])
    run = dice.Run(settings)
    run.open()
    policy, reference = dice.first_models(run)
    dice.evaluate(run, "sft", reference)
    dice.evaluate(run, "dpo", policy, reference)
    work.rename(directory)


def arm(directory, base, seed, changes):
    """The DICE rounds of one arm, from the models in base, in directory."""
    import dice

    work = directory.with_name(directory.name + ".unfinished")
    shutil.rmtree(work, ignore_errors=True)
    given = [word for key, value in changes.items() for word in ("--" + key.replace("_", "-"), str(value))]
    settings, _ = dice.parse_settings(["--seed", str(seed), "--out", str(work), "--device", "cpu", *given])
    run = dice.Run(settings)
    run.open()
    shutil.copytree(base / "evaluation", work / "evaluation")
    dice.run_rounds(run, base / "dpo", base / "sft")
    work.rename(directory)


def work(out, seed, name):
    """One job: the base of a seed (name None) or one of its arms."""
    import torch

    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # the progress bars of two processes would only overwrite each other
    directory = out / f"seed-{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    if name is None:
        base(directory / "base", seed)
    else:
        arm(directory / path_of(name), directory / "base", seed, ARMS[name])


def path_of(name):
    return name.translate(str.maketrans(" ,*", "-__"))


def run_jobs(out, seeds, workers):
    """All bases, each followed by its arms, those that are not there yet."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = {}

        def submit(seed, name):
            jobs[pool.submit(work, out, seed, name)] = seed, name

        def submit_arms(seed):
            for name in ARMS:
                if not (out / f"seed-{seed}" / path_of(name)).exists():
                    submit(seed, name)

        for seed in seeds:
            submit_arms(seed) if (out / f"seed-{seed}" / "base").exists() else submit(seed, None)
        while jobs:
            for job in as_completed(list(jobs)):
                seed, name = jobs.pop(job)
                job.result()
                print(f"seed {seed}: {name or 'SFT and DPO'} done; {len(jobs)} jobs to go", file=sys.stderr)
                if name is None:
                    submit_arms(seed)
                break


def collect(out, seeds):
    """{(arm, stage): {column: values (seeds,)}}; SFT and DPO stand once, under their own names."""
    from data import report

    values = {}
    for seed in seeds:
        for name in ARMS:
            directory = out / f"seed-{seed}" / path_of(name)
            for row in report.judged_table(directory, report.read_rows(directory / "metrics.jsonl")):
                first = row["stage"] in ("sft", "dpo")
                if first and name != next(iter(ARMS)):
                    continue
                key = "" if first else name, row["stage"]
                for column in COLUMNS:
                    values.setdefault(key, {}).setdefault(column, []).append(
                        np.nan if row[column] is None else row[column]
                    )
    return values


def mean_and_error(numbers):
    """Mean and standard error of the mean."""
    error = np.std(numbers, ddof=1) / len(numbers) ** 0.5 if np.size(numbers) > 1 else np.nan
    return np.mean(numbers), error


def table(values):
    """One row per arm and stage; the last column is paired: on the same seeds, at the same round."""
    first = next(iter(ARMS))
    names = [*COLUMNS, f"length-controlled minus {first}'s"]
    lines = ["| arm | stage | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for (name, stage), columns in values.items():
        if stage == "round-1" and name != first:
            continue
        if name not in ("", first):
            mine, theirs = (np.array(values[arm, stage]["length-controlled"]) for arm in (name, first))
            columns = {**columns, names[-1]: mine - theirs}
        cells = []
        for column in names:
            mean, error = mean_and_error(columns.get(column, np.nan))
            digits = 3 if column == "gold" else 1
            cells.append("" if np.isnan(mean) else f"{mean:.{digits}f} ± {error:.{digits}f}")
        lines.append(f"| {name} | {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(path, values):
    """Left: the arms that go on for three rounds, by round. Middle and right: every arm after two."""
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
        points = [mean_and_error(values[name, "round-2"][column]) for name in names]
        means, errors = zip(*points)
        axis.errorbar(means, range(len(names)), xerr=errors, fmt="o", markersize=4, capsize=2)
        axis.axvline(np.mean(values["", "dpo"][column]), color="grey", linestyle=":", label="DPO")
        axis.set_yticks(range(len(names)), names if axis is axes[1] else [""] * len(names), fontsize=8)
        axis.set_title(f"{column} after two rounds")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 .. this - 1 (default: 10)")
    parser.add_argument("--out", type=Path, default=Path("out/ablations"), help="default: out/ablations")
    options = parser.parse_args()
    seeds = range(options.seeds)
    run_jobs(options.out, seeds, workers=os.cpu_count())
    values = collect(options.out, seeds)
    text = table(values)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    try:
        picture(options.out / "table.png", values)
    except ImportError:
        print("table.png was not drawn: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
