"""The pictures: how a round shapes its rewards, how a run went, and what the study found.

They need matplotlib. Without it, or if a picture fails for another reason, a line says so, and no more."""
import math
import os
from functools import cache, partial

import numpy as np

from data import files
from data.processes import log_info, rank

# Colours that differ in lightness too, so that they can be told apart in grey print.
DARK, ORANGE, PALE, GREY = "#12355b", "#d95f02", "#c8c8c8", "#777777"
STYLES = ((DARK, "o", "-"), (ORANGE, "s", "--"), ("#7b2d8b", "^", "-."), ("#35a78a", "D", ":"),
          (GREY, "v", (0, (7, 2))), ("#b08900", "P", (0, (4, 1, 1, 1, 1, 1))), ("#3f8fc5", "X", (0, (1, 2))))

@cache  # it says so once
def available():
    """Can pictures be drawn here?"""
    # A notebook's MPLBACKEND may name a module that is not installed here. matplotlib refuses to start then.
    os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib  # noqa: F401
        return True
    except Exception as error:
        log_info(f"no pictures are drawn: pip install matplotlib ({' '.join(str(error).split())})")
        return False

def save(path, draw, *args):
    """Write the picture of draw(figure, *args). A picture that fails costs one line."""
    if rank() > 0 or not available():
        return
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a screen
        figure = Figure(layout="constrained")
        draw(figure, *args)
        files.write_file(path, lambda scratch: figure.savefig(scratch, dpi=100, format="png"))
    except Exception as error:
        log_info(f"{path}: was not drawn: {' '.join(str(error).split())}")

# ------------------------------------------------------------------------------------------------------------
# A round: DICE, section 3.2
def shaping(figure, stage, reward, length, unit, alpha, name, choose):
    """Best and worst answers before and after shaping, and their difference of length for every alpha.
    reward, length: tables (P, K), NaN where there is no answer. name: of alpha. choose: dice.choose_pairs."""
    figure.set_size_inches(11, 8.5)
    axes, gaps = figure.subplots(2, 2), []
    figure.suptitle(f"{stage}: answers are ranked by reward − alpha × length, alpha = {alpha:.4g}")
    for axis, when, value, a, colour in ((axes[0, 0], "1. Before shaping", "reward", 0.0, ORANGE),
                                         (axes[1, 0], "3. After", "reward − alpha × length", alpha, DARK)):
        prompt, best, worst = choose(reward - a * length)
        answers(axis, length, reward - a * length, prompt, best, worst, colour)
        gaps.append(length[prompt, best] - length[prompt, worst])
        gap = gaps[-1].mean()
        axis.set(xlabel=f"length, {unit}", ylabel=value)
        axis.set_title(f"{when}: the best answer ▲ of a prompt is on average\n{abs(gap):.1f} {unit} "
                       f"{'longer' if gap > 0 else 'shorter'} than its worst ▽ (arrow)", fontsize=10)
    staircase(axes[0, 1], reward, length, unit, alpha, name, choose)
    axis, bins = axes[1, 1], np.histogram_bin_edges(np.concatenate(gaps), 40)
    before, after = (f"{when}, mean {gap.mean():+.1f}" for when, gap in zip(("before", "after"), gaps))
    axis.hist(gaps[0], bins, color=ORANGE, alpha=0.6, label=before)
    axis.hist(gaps[1], bins, color=DARK, histtype="step", linewidth=2, label=after)
    axis.axvline(0, color=GREY, linewidth=0.8)
    axis.legend()
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel=f"length of the best answer minus length of the worst, {unit}", ylabel="prompts")
    axis.set_title("4. The difference of length, prompt by prompt", fontsize=10)

def answers(axis, length, value, prompt, best, worst, colour):
    """Answers as dots, at most 4,000; the worst and the best of at most 30 prompts, joined; their means."""
    shown = np.random.default_rng(0).permutation(value.size)[:4000]
    axis.plot(length.flat[shown], value.flat[shown], ".", color=PALE, markersize=3)
    x, y = (np.array([table[prompt, worst], table[prompt, best]]) for table in (length, value))  # (2, P)
    some = np.linspace(0, len(prompt) - 1, min(30, len(prompt))).astype(int)
    axis.plot(x[:, some], y[:, some], color=colour, linewidth=0.7)
    axis.plot(x[0, some], y[0, some], "v", color=colour, markerfacecolor="white", markersize=5)
    axis.plot(x[1, some], y[1, some], "^", color=colour, markersize=5)
    worst, best = zip(x.mean(axis=1), y.mean(axis=1))
    axis.annotate("", best, worst, arrowprops={"arrowstyle": "-|>", "linewidth": 2.5})

def staircase(axis, reward, length, unit, alpha, name, choose):
    """How much longer the best answers are than the worst, for every alpha."""
    def gap(a):
        prompt, best, worst = choose(reward - a * length)
        return (length[prompt, best] - length[prompt, worst]).mean()
    end = 2 * alpha or np.nanstd(reward) / (np.nanstd(length) or 1)
    for _ in range(40):  # so far that the gap is no longer above 0
        end *= 1 + (gap(end) > 0)
    grid = np.linspace(0, 1.2 * end, 300)
    axis.step(grid, [gap(a) for a in grid], color=DARK, where="post")
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.axvline(alpha, color=ORANGE, linestyle="--")
    axis.plot(alpha, gap(alpha), "o", color=ORANGE)
    axis.margins(y=0.15)
    axis.text(alpha, 0.98, f" {name} = {alpha:.4g}", color=ORANGE, va="top",
              transform=axis.get_xaxis_transform())
    axis.set(xlabel=f"alpha, per {unit[:-1]}", ylabel=f"length of best minus worst, mean, {unit}")
    axis.set_title("2. The larger alpha, the shorter the best answers.\nalpha* brings the difference of "
                   "length nearest to 0", fontsize=10)

# ------------------------------------------------------------------------------------------------------------
# A run
def curves(figure, metrics, table):
    """Trainings by step and rounds by stage. table: of report.judged_table, or one without win rates."""
    sft = [row for row in metrics if "step" in row and "margin" not in row]
    dpo = [row for row in metrics if "margin" in row]
    rounds = [row for row in metrics if "alpha" in row]
    panels = [
        ("SFT: loss, −log-prob of a token", by_step, sft, ["loss"]),
        ("loss on pairs", by_step, dpo, ["loss"]),
        ("accuracy: share of pairs with margin > 0", by_step, dpo, ["accuracy"]),
        ("margin: beta × difference of log-ratios", by_step, dpo, ["margin"]),
        ("log-prob of the answers. Chosen ones may fall\ntoo: DPO trains the difference only", by_step, dpo,
         ["chosen_logprob", "rejected_logprob"]),
        ("gradient norm before clipping", by_step, dpo or sft, ["grad_norm"]),
        ("tokens of the answers in the pairs", by_step, dpo, ["chosen_tokens", "rejected_tokens"]),
        ("KL of the sampled policy, nats an answer", by_stage, rounds, ["kl_to_previous", "kl_to_first"]),
        ("characters of the sampled answers", by_stage, rounds, ["answer_chars"]),
        ("the reward agrees with offline pairs that\nwere never trained on (0.5 is chance)",
         partial(by_stage, top=1), rounds, ["offline_agreement"]),
        ("win rate against the model before round 1, %", partial(by_stage, top=100), table,
         ["win rate", "length-controlled"])]
    panels = [panel for panel in panels if any(is_known(panel[2], key) for key in panel[3])]
    lines = max(1, math.ceil(len(panels) / 3))
    figure.set_size_inches(12, 2.8 * lines)
    axes = figure.subplots(lines, 3).ravel()
    for axis, (title, draw, rows, keys) in zip(axes, panels):
        axis.set_title(title, fontsize=10)
        for key, (colour, marker, _) in zip(keys, STYLES):
            if is_known(rows, key):
                stages, name = [row["stage"] for row in rows], key.replace("_", " ")
                draw(axis, stages, column(rows, key), name, colour, marker)
        if len(keys) > 1:
            axis.legend(fontsize=8)
    for axis in axes[len(panels):]:
        axis.set_axis_off()

def column(rows, key):
    return np.array([row.get(key) for row in rows], dtype=float)  # None becomes NaN

def is_known(rows, key):
    return np.isfinite(column(rows, key)).any()

def by_step(axis, stages, values, name, colour, marker):
    """Running means, with the raw values behind them. Dotted lines separate the stages."""
    middles, names = [], list(dict.fromkeys(stages))
    for stage in names:
        step = np.flatnonzero(np.array(stages) == stage)
        window = np.ones(max(1, len(step) // 20, min(len(step) // 4, 15)))
        mean = np.convolve(values[step], window, "same") / np.convolve(np.ones(len(step)), window, "same")
        axis.plot(step + 1, values[step], color=colour, alpha=0.25, linewidth=0.8, zorder=1)
        axis.plot(step + 1, mean, color=colour, marker=marker if len(step) < 10 else "", markersize=3,
                  zorder=3, label=name if stage == stages[0] else "_")
        axis.axvline(step[0] + 0.5, color=GREY, linewidth=0.6, linestyle=":")
        middles.append(step.mean() + 1)
    axis.set_xticks(middles, names)
    finish(axis, len(names))
    axis.set_xlabel(f"training steps, {len(stages):,} in all", fontsize=8)

def by_stage(axis, stages, values, name, colour, marker, top=None):
    """From 0 up, so that a small change looks small."""
    axis.plot(stages, values, color=colour, marker=marker, label=name)
    finish(axis, len(stages))
    axis.set_ylim(min(0, axis.dataLim.y0), top or 1.1 * axis.dataLim.y1 or 1)

def finish(axis, stages):
    axis.tick_params(labelsize=8)
    axis.tick_params("x", rotation=90 if stages > 4 else 0)
    axis.margins(x=0.07, y=0.1)

# ------------------------------------------------------------------------------------------------------------
# The study
def study(path, values, main_arms):
    """values: {(arm, stage): {column: values (seeds,)}}, of data/ablations.py. main_arms: shown by round."""
    save(path, draw_study, values, main_arms)

def draw_study(figure, values, main_arms):
    """Left: the main arms by round. Right: the other arms after two rounds, against DICE of the same seed."""
    figure.set_size_inches(9, 7)
    axes = figure.subplot_mosaic([["win rate", "siblings"], ["length-controlled", "siblings"]],
                                 width_ratios=(5, 4))
    for measure in ("win rate", "length-controlled"):
        ends = []
        for arm, (colour, marker, line) in zip(main_arms, STYLES):
            stages = [("", "dpo")]
            while (arm, f"round-{len(stages)}") in values:
                stages.append((arm, f"round-{len(stages)}"))
            means, errors = zip(*(mean_and_error(values[stage][measure]) for stage in stages))
            axes[measure].errorbar(range(len(stages)), means, errors, color=colour, marker=marker, capsize=2,
                                  markersize=4, linestyle=line, linewidth=2.2 if arm == "DICE" else 1.2)
            ends.append((means[-1], len(stages) - 1, arm, colour))
        axes[measure].set_title(f"{measure}, % (50: the DPO model)", fontsize=10)
        label_ends(axes[measure], ends)
    axes["length-controlled"].set_xlabel("rounds")
    others = [arm for arm, stage in values if stage == "round-2" and arm not in main_arms]
    siblings(axes["siblings"], values, others)

def label_ends(axis, ends):
    """Names of lines at their right ends, (y, x, name, colour) each, moved apart where they would overlap."""
    ends = sorted(ends)
    low, high = axis.get_ylim()
    gap, last = 0.075 * (high - low), max(x for _, x, _, _ in ends)
    places = np.array([y for y, *_ in ends])
    for _ in range(200):  # push neighbours apart, a little at a time
        for i in range(1, len(places)):
            overlap = max(0, gap - (places[i] - places[i - 1]))
            places[i - 1:i + 1] += -overlap / 2, overlap / 2
    for (y, x, name, colour), place in zip(ends, places):
        axis.annotate(name, (x, y), (last + 0.25, place), color=colour, va="center", annotation_clip=False,
                      fontsize=9, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5})
    axis.set_xticks(range(last + 1))
    axis.set_xlim(-0.15, last + 0.15)

def siblings(axis, values, arms):
    """A row for each arm, the best on top."""
    effects = {}
    for arm in arms:
        ours, theirs = values[arm, "round-2"], values["DICE", "round-2"]
        effects[arm] = [mean_and_error(np.subtract(ours[measure], theirs[measure]))
                        for measure in ("win rate", "length-controlled")]
    arms = sorted(arms, key=effects.get)
    for i, name, shift, face in ((0, "win rate", 0.12, None), (1, "length-controlled", -0.12, "white")):
        means, errors = zip(*(effects[arm][i] for arm in arms))
        colour, marker, _ = STYLES[i]
        axis.errorbar(means, np.arange(len(arms)) + shift, xerr=errors, color=colour, marker=marker,
                      linestyle="", markersize=5, markerfacecolor=face, capsize=2, label=name)
    axis.axvline(0, color=GREY, linewidth=0.8)
    axis.set_yticks(range(len(arms)), arms, fontsize=9)
    axis.grid(axis="y", linewidth=0.4)
    axis.set_title("after two rounds,\nminus DICE of the same seed", fontsize=10)
    axis.set_xlabel("percentage points")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, frameon=False)

def mean_and_error(numbers):
    """Mean and standard error of the mean."""
    error = np.std(numbers, ddof=1) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0
    return np.mean(numbers), error
