"""The report of a run, from its files alone: report.md and curves.png.

    python data/report.py out/tiny        writes both again
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for when it is run as a script
import model as models  # noqa: E402
from data import runs, tiny  # noqa: E402


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(out):
    """Writes report.md and curves.png into the run's directory; returns the table and, if any, the
    examples."""
    settings = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    metrics = read_rows(out / "metrics.jsonl")
    judged, trained = (out / "evaluation").exists(), training_table(metrics)
    table = judged_table(out, metrics) if judged else trained
    text = markdown(table) + (examples(out, first_stages(out)[-1], table[-1]["stage"]) if judged else "")
    more = f"\n## Training and rounds\n\n{markdown(trained)}" if judged else ""
    shown = ("model", "seed", "rounds", "samples", "gamma", "alpha", "labeller", "loss", "beta")
    runs.write(out / "report.md",
               f"# DICE: {settings['model']}\n\n{', '.join(f'{key} {settings[key]}' for key in shown)}; "
               f"the other settings are in settings.json.\n\n{text}{more}\n![curves](curves.png)\n")
    curves(out, metrics, table)
    return text


def first_stages(out):
    """The judged stages before the first round; the last of them is what the rounds are measured against."""
    return [stage for stage in ("sft", "dpo") if (out / "evaluation" / f"{stage}.jsonl").exists()]


def judged_answers(out, stage):
    """Gold scores, rewards (None where there is no reference) and lengths in characters of the held-out
    answers."""
    rows = read_rows(out / "evaluation" / f"{stage}.jsonl")
    return tuple(np.array(values, dtype=float) for values in (
        [row["gold"] for row in rows], [row["reward"] for row in rows], [len(row["text"]) for row in rows]))


def judged_table(out, metrics):
    """The tiny world's table, a dict per stage. Win rates are against the model before the first round,
    answer against answer."""
    rounds = {row["stage"]: row for row in metrics if "alpha" in row}
    first = first_stages(out)
    base, _, base_chars = judged_answers(out, first[-1])
    table = []
    for stage in [*first, *rounds]:
        about, (gold, reward, chars) = rounds.get(stage, {}), judged_answers(out, stage)
        win, controlled = tiny.win_rates(gold, base, chars, base_chars)
        table.append({"stage": stage, "win rate": win, "length-controlled": controlled, "gold": gold.mean(),
                      "characters": chars.mean(), "reward agrees %": 100 * agreement(gold, reward),
                      "pairs right %": 100 * about.get("pairs_right", np.nan) if about.get("generated_pairs")
                      else np.nan})
    return table


def agreement(gold, reward):
    """How often the reward orders two answers to a prompt (four each) as the judge does, ties of the judge
    aside."""
    gold, reward = gold.reshape(-1, 4), reward.reshape(-1, 4)
    better = gold[:, :, None] - gold[:, None, :] > 1e-9  # (P, 4, 4): this answer above that one
    agrees = reward[:, :, None] > reward[:, None, :]
    return agrees[better].mean() if np.isfinite(reward).all() else np.nan


ROUND = ("alpha", "generated_pairs", "replayed_pairs", "pair_length_gap", "kl", "answer_chars", "truncated",
         "identical", "offline_agreement")


def training_table(metrics):
    """What is known without a judge, a dict per stage: means over the last tenth of the steps, and the
    round's data."""
    table = []
    for stage in dict.fromkeys(row["stage"] for row in metrics):
        rows = [row for row in metrics if row["stage"] == stage]
        steps = [row for row in rows if "step" in row]
        last, about = steps[-max(1, len(steps) // 10):], next((row for row in rows if "alpha" in row), {})
        table.append({"stage": stage, "steps": len(steps), **{
            key: np.mean([row.get(key, np.nan) for row in last]) for key in ("loss", "accuracy", "margin")},
            **{key.replace("_", " "): about.get(key) for key in ROUND}})
    return table


def warnings(row, first):
    """What to fear of a round, in plain words; row and first are its own and the first round's metrics."""
    if row["offline_agreement"] is not None and row["offline_agreement"] <= 0.5:
        yield (f"the reward agrees with {row['offline_agreement']:.0%} of the held-out offline pairs, no "
               "more than a coin would: its labels may no longer be what people prefer, and the policy of "
               "the round before the better one")
    if row["answer_chars"] > 1.5 * first["answer_chars"]:
        yield (f"answers have grown from {first['answer_chars']:.0f} to {row['answer_chars']:.0f} characters "
               "since the first round: length is running away")
    if row["truncated"] > 0.25:
        yield f"{row['truncated']:.0%} of the answers are cut by --max-new-tokens: they may no longer end"


def markdown(table):
    """Dicts with the same keys as a markdown table."""
    def cell(value):
        if value is None or value != value:
            return ""
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [list(table[0]), ["---"] * len(table[0])]
    lines += [[cell(value) for value in row.values()] for row in table]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def examples(out, base, stage):
    """Three held-out prompts with an answer before and after DICE."""
    text = ""
    before, after = (read_rows(out / "evaluation" / f"{name}.jsonl") for name in (base, stage))
    for old, new in list(zip(before, after))[:12:4]:  # a prompt has four answers
        text += f"\n**{old['prompt']}**\n"
        for name, row in ((base, old), (stage, new)):
            text += f"- {name}, gold {row['gold']:.2f}: {row['text']}\n"
    return text


def curves(out, metrics, table):
    """curves.png: DPO loss and reward accuracy by step; lengths, and with a judge the win rates, by
    stage."""
    try:
        import matplotlib
    except ImportError:
        print("curves.png was not drawn: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5))
    steps = list(enumerate(row for row in metrics if "margin" in row))
    for axis, key in zip(axes, ("loss", "accuracy")):
        for stage in dict.fromkeys(row["stage"] for _, row in steps):
            axis.plot(*zip(*((i, row[key]) for i, row in steps if row["stage"] == stage)), label=stage)
        axis.set(xlabel="DPO step", title=key)
    axes[0].legend()
    names = [row["stage"] for row in table]
    if "win rate" in table[0]:
        for key in ("win rate", "length-controlled"):
            axes[2].plot(names, [row[key] for row in table], marker="o", label=f"{key}, %")
        axes[2].plot(names, [row["characters"] for row in table], "k--", label="characters")
    else:
        axes[2].plot(names, [row["answer chars"] for row in table], "k--", marker="o", label="characters")
    axes[2].set(title="answers")
    axes[2].legend()
    figure.tight_layout()
    models.write_file(out / "curves.png", lambda scratch: figure.savefig(scratch, dpi=100, format="png"))
    pyplot.close(figure)


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
