"""What comes out of a run: the files of a round, its lines and warnings, and report.md. Pictures: plots.py.

    python data/report.py out/tiny        writes report.md and curves.png again, from the files of the run"""
import html
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # needed as a script
from data import files, options, plots, tiny  # noqa: E402
from data.processes import log_info, rank  # noqa: E402

# ---------------------------------------------------------------------------------------- during a run
def log_round(run, s, alpha, samples, pairs, lost, groups, choose):
    """Write samples.jsonl, pairs.jsonl (TRL's form of a preference set), shaping.png and the round's row of
    metrics.jsonl, and log the round. lost: reason -> prompts that gave no pair. groups: the usable answers of
    the others. choose: dice.choose_pairs."""
    stage = run.stage_name
    run.write_rows(f"{stage}/samples.jsonl", [
        {"prompt": x.prompt.content, "sample": x.number, "tokens": x.tokens, "text": x.text,
         "finish": x.finish, "logprob": x.logprob, "prev_logprob": x.prev_logprob, "reward": x.reward,
         "shaped_reward": x.shaped} for x in samples])
    run.write_rows(f"{stage}/pairs.jsonl", [
        {"prompt": p.prompt.content, "chosen": p.chosen.text, "rejected": p.rejected.text, "source": p.source}
        | ({} if p.prompt.steps is None else {"initial_reason_steps": p.prompt.steps}) for p in pairs])
    new = [p for p in pairs if p.source == "generated"]
    gaps = [len(p.chosen.text) - len(p.rejected.text) for p in new]
    prompts = len({x.prompt.key for x in samples})
    # The KL of pi_t to the model that the reward compares it with: not always pi_{t-1}.
    kl = "kl_to_previous" if s.reward_reference == "previous" else "kl_to_first"
    row = {"stage": stage, "alpha": alpha, "generated_pairs": len(new),
           "replayed_pairs": len(pairs) - len(new), "answer_chars": fmean(len(x.text) for x in samples),
           "truncated": fmean(x.finish == "length" for x in samples),
           "identical": 1 - len({(x.prompt.key, x.text) for x in samples}) / len(samples),
           kl: fmean(x.logprob - x.prev_logprob for x in samples),
           **held_out_columns(run, s),
           "rank_agreement": rank_agreement(samples, s),
           "pair_length_gap": fmean(gaps or [0]),
           "prompts": prompts, "prompts_with_pair": prompts - sum(lost.values()),
           **{column(reason): lost[reason] for reason in REASONS}}
    if run.is_tiny and not s.prompts:  # only for the report: the share of pairs that the judge agrees with
        gold = [[tiny.judge(p.prompt.content, x.text) for x in (p.chosen, p.rejected)] for p in new]
        gap = np.array([chosen - rejected for chosen, rejected in gold])
        untied = np.abs(gap) > 1e-9
        row["pairs_right"] = float((gap > 0)[untied].mean()) if untied.any() else None
        row["pairs_tied"] = float(1 - untied.mean()) if new else None
    run.log(row)
    unit = {"chars": "character", "tokens": "token"}[s.length_unit]
    longer = "shorter" if row["pair_length_gap"] < 0 else "longer"
    log_info(f"{stage}: alpha {alpha:.4g} nats per {unit}; {len(new)} generated pairs, chosen "
             f"{abs(row['pair_length_gap']):.1f} characters {longer}; {len(pairs) - len(new)} replayed pairs")
    log_info(f"{stage}: {prompts_line(row)}")
    other = "pi_{t-1}" if kl == "kl_to_previous" else "the first model"
    kl = "not known" if math.isnan(row[kl]) else f"{row[kl]:.2f} nats"
    agreed = f"{row['offline_agreement']:.0%}" if run.held_out else "not known"
    log_info(f"{stage}: KL of pi_t to {other} {kl}; answers of {row['answer_chars']:.0f} characters, "
             f"{row['truncated']:.1%} cut, {row['identical']:.1%} the same as another; agreement with the "
             f"held-out offline pairs {agreed}")
    if groups and s.rejected == "worst":  # a random answer shows nothing of the length bias
        reward, length = np.full((2, len(groups), s.samples), np.nan)
        for i, group in enumerate(groups):
            reward[i, :len(group)] = [x.reward for x in group]
            length[i, :len(group)] = [len(x.text if s.length_unit == "chars" else x.tokens) for x in group]
        plots.save(run.out / stage / "shaping.png", plots.shaping, stage, reward, length, f"{unit}s", alpha,
                   "alpha*" if s.alpha == "auto" else "alpha", choose)
    said = list(held_out_warnings(row))  # by check_held_out, before the round sampled
    for warning in warnings(row, next(old for old in run.metrics if "alpha" in old)):
        if warning not in said:
            log_info(f"{stage}: WARNING: {warning}")

def rank_agreement(samples, s):
    """Do the rewards of this round and of the round before rank the answers alike? Kendall's tau, 1 for the
    same order and -1 for the reverse, its mean over the prompts; as in CREAM, arXiv 2410.12735. It needs no
    judge. None in the first round, and with other rewards than the implicit one."""
    if s.reward != "implicit" or not all(math.isfinite(x.older_logprob) for x in samples):
        return None
    # r_t and r_{t-1} of each answer. With --reward-reference first both compare with the first model, whose
    # log-prob is prev_logprob then.
    sign = 1 if s.reward_reference == "previous" else -1
    now = np.array([x.logprob - x.prev_logprob for x in samples]).reshape(-1, s.samples)  # (P, K)
    before = np.array([sign * (x.prev_logprob - x.older_logprob) for x in samples]).reshape(-1, s.samples)
    signs = [np.sign(reward[:, :, None] - reward[:, None, :]) for reward in (now, before)]  # (P, K, K)
    alike = signs[0] * signs[1]
    pairs = np.abs(alike).sum(axis=(1, 2))  # twice the pairs of answers without a tie
    return float((alike.sum(axis=(1, 2))[pairs > 0] / pairs[pairs > 0]).mean()) if pairs.any() else None

# Why a prompt gives no pair, and what to do.
REASONS = {
    "cut": "answers were cut: raise --max-new-tokens, or take a model that ends its answers (--sft-steps)",
    "too few valid": "too few answers have a reward and a length between --min-chars and --max-chars",
    "all equal": "its answers are all the same or have the same reward: raise --temperature"}

def column(reason):
    """The name in metrics.jsonl of the number of prompts that were lost for this reason."""
    return f"prompts_{reason.replace(' ', '_')}"

def prompts_line(row):
    """How many prompts gave a pair, and why the others did not."""
    line = f"{row['prompts_with_pair']} of {row['prompts']} prompts gave a pair"
    reasons = [f"{row[column(reason)]} {reason}" for reason in REASONS if row.get(column(reason))]
    return f"{line} (the others: {', '.join(reasons)})" if reasons else line

def check_samples(s, label, prompts, drawn):
    """Called after the first chunk of samples, (ids, finish reason) each: warns if most prompts will give no
    pair. The exact number is known later, when the texts have their rewards: dice.usable_answers."""
    if label != "samples":
        return
    count, lost = len(drawn) // len(prompts), Counter()
    for i in range(len(prompts)):
        answers = drawn[i * count:(i + 1) * count]
        stopped = [tuple(ids) for ids, finish in answers if finish == "stop"]
        if len(stopped) < s.min_valid * count:
            lost["cut"] += 1
        elif len(set(stopped)) < 2:
            lost["all equal"] += 1
    if 2 * sum(lost.values()) > len(prompts):
        reason = max(lost, key=lost.get)
        log_info(f"WARNING: {sum(lost.values())} of the {len(prompts)} longest prompts will give no pair; of "
                 f"{lost[reason]}, {REASONS[reason]}")

def check_held_out(run, s):
    """Called before a round samples, when the held-out offline pairs have their rewards: to warn early."""
    for warning in held_out_warnings(held_out_columns(run, s)):
        log_info(f"{run.stage_name}: WARNING: {warning}")

def held_out_columns(run, s):
    """Columns of the round's row of metrics.jsonl, on offline pairs that are never trained on."""
    margins = s.beta * np.array([p.chosen.reward - p.rejected.reward for p in run.held_out])
    # sigmoid(-margin), the weight of a pair in the gradient of DPO, falls to 0 as the pairs are learned.
    measures = {"agreement": margins > 0, "tied": margins == 0, "unlearned": 0.5 - 0.5 * np.tanh(margins / 2)}
    columns = {f"offline_{name}": float(x.mean()) if run.held_out else None for name, x in measures.items()}
    return {"held_out_pairs": len(margins), **columns}

def held_out_warnings(row):
    """What may be wrong with the reward, by the held-out offline pairs."""
    count, agreed = row.get("held_out_pairs"), row["offline_agreement"]
    if not count:
        return
    # A coin agrees with half of the pairs, give or take one standard error. A reward within it may be one.
    error = 0.5 / math.sqrt(count)
    if row["offline_tied"] == 1:
        yield (f"the two answers of each of {count} held-out offline pairs have the same reward; check "
               "--reward and the two models: they may be the same")
    elif agreed <= 0.5 + error:
        yield (f"the reward agrees with {agreed:.0%} of {count} held-out offline pairs: not better than a "
               f"coin (50% ± {error:.0%}); its pairs may be wrong as often as right")

def warnings(row, first):
    """What may be wrong with a round. row and first: the metrics of this round and of the first one."""
    if row["prompts_with_pair"] < row["prompts"] / 2:
        reason = max(REASONS, key=lambda reason: row[column(reason)])
        yield (f"only {row['prompts_with_pair']} of {row['prompts']} prompts gave a pair; of "
               f"{row[column(reason)]}, {REASONS[reason]}")
    yield from held_out_warnings(row)
    if row["answer_chars"] > 1.5 * first["answer_chars"]:
        yield (f"answers have grown from {first['answer_chars']:.0f} to {row['answer_chars']:.0f} characters "
               "since the first round; a larger --alpha may help")
    if row["truncated"] > 0.25:
        yield f"{row['truncated']:.0%} of the answers are cut by --max-new-tokens: they may no longer end"

def keep_evaluation(run, name, samples):
    """Write evaluation/NAME.jsonl: answers with the judge's score ("gold") and their implicit reward. With no
    judge: the held-out answers (chosen and rejected in turn) with their log-prob. NaN becomes null."""
    rows = []
    for x in samples:
        row = {"prompt": x.prompt.content, "sample": x.number, "text": x.text}
        known = {"logprob": x.logprob}
        if run.judge_prompts:
            known = {"reward": x.logprob - x.prev_logprob, "gold": x.reward}
        rows.append(row | known)
    if rows:
        run.write_rows(f"evaluation/{name}.jsonl", rows)
    run.end_stage()

# ---------------------------------------------------------------------------------------- after a run
def read_rows(path):
    """The rows of a file of JSON lines; [] if there is no such file. The run may just be writing the last."""
    data = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in data[:data.rfind(b"\n") + 1].splitlines()]

def as_text(value):
    """Text from data, or a name, as a line of markdown that shows it as it is: no tag, link, list, code."""
    line = html.escape(" ".join(str(value).split()), quote=False)
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda c: ascii(c[0])[1:-1], line)
    line = re.sub(r"[\\`*_\[\]|~$#]|:(?=//)|(?<=www)\.", r"\\\g<0>", line)
    return re.sub(r"^(\d*)([-+=.)])(?!\d)", r"\1\\\2", line)

def write(out):
    """Write report.md and curves.png into the run's directory. Returns the table, with examples if judged."""
    settings, metrics = files.read_json(out / "settings.json"), read_rows(out / "metrics.jsonl")
    files.require("model" in settings, f"{out}: no settings.json in it; give the directory of a run")
    table, more = training_table(metrics), ""
    text = markdown(table)
    if judged_stages(out):
        more = ("\n## Training and rounds\n\nOf a round: the pairs that it trained on, and the answers that "
                f"they are from. The model before its training gave these.\n\n{text}")
        table = judged_table(out, metrics)
        text = markdown(table) + examples(out, judged_stages(out)[-1], table[-1]["stage"])
    text += verdict(out, metrics)
    shown = ("model", "seed", "rounds", "samples", "gamma", "alpha", "reward", "loss", "beta")
    about = ", ".join(f"{key} {as_text(settings[key])}" for key in shown if key in settings)
    rounds = [row for row in metrics if "alpha" in row]
    if rounds:
        more += "\n" + "".join(f"- {row['stage']}: {prompts_line(row)}\n" for row in rounds)
        more += generated_pairs(out, rounds[-1]["stage"])
    pictures = [f"{row['stage']}/shaping.png" for row in rounds]
    pictures = [name for name in pictures if (out / name).exists()]
    if metrics and plots.available():
        pictures.append("curves.png")
    if rank() == 0:
        files.write_file(out / "report.md", lambda scratch: scratch.write_text(
            f"# DICE: {as_text(settings['model'])}\n\n{about}; the other settings are in settings.json.\n\n"
            f"{text}{more}" + "".join(f"\n![{name}]({name})\n" for name in pictures), encoding="utf-8"))
        if metrics:
            plots.save(out / "curves.png", plots.curves, metrics, table)
    return f"{text}\nThe report, with pictures and pairs: {out / 'report.md'}"

def judged_stages(out, rounds=(), column="gold"):
    """The judged stages among SFT, DPO and the rounds. Rounds are compared with the last before them. column
    "logprob": the stages with log-probs of held-out pairs instead."""
    stages = []
    for stage in ("sft", "dpo", *rounds):
        rows = read_rows(out / "evaluation" / f"{stage}.jsonl")
        if rows and column in rows[0]:
            stages.append(stage)
    return stages

def verdict(out, metrics):
    """One line: is the last round better than the model before the first one? And its warnings again."""
    rounds = [row for row in metrics if "alpha" in row]
    names = [row["stage"] for row in rounds]
    judged, scored = judged_stages(out, names), judged_stages(out, names, "logprob")
    text = ""
    if judged and judged[-1] in names:
        base, last = judged_stages(out)[-1], judged[-1]
        gap = judged_answers(out, last)[0] - judged_answers(out, base)[0]
        gap = np.where(np.isnan(gap), 0, gap).reshape(-1, 4)  # a judge that could not read an answer: a tie
        wins = np.where(np.abs(gap) < 1e-9, 0.5, gap > 0).mean(axis=1)  # of each prompt
        text = (f"\n{last} is {compared(wins - 0.5, 'better', 'worse')} than {base}: it wins "
                f"{interval(wins)} of the comparisons, on {len(wins)} prompts (± two standard errors; 50% "
                "is chance).\n")
    elif len(scored) > 1 and scored[-1] in names:
        base, last = judged_stages(out, column="logprob")[-1], scored[-1]
        right = [agrees(out, scored[0], stage) for stage in (base, last)]
        differ = compared(right[1] - right[0], "more", "less")
        text = (f"\nNo judge has compared the answers (--judge, or data/judge.py). Of {len(right[0])} pairs "
                f"that were kept from training, {last} prefers the chosen answer in {interval(right[1])}, "
                f"{base} in {interval(right[0])}: {differ} often (± two standard errors; 50% is chance).\n")
    for row in rounds:
        text += "".join(f"\n{row['stage']}: WARNING: {warning}\n" for warning in warnings(row, rounds[0]))
    return text

def agrees(out, first, stage):
    """Of each held-out pair: has the model, compared with the first one, become likelier to give the chosen
    answer than to give the rejected one? (N,) of 0, 0.5 and 1; a tie is a half."""
    now, before = [np.array([row["logprob"] for row in read_rows(out / "evaluation" / f"{name}.jsonl")])
                   for name in (stage, first)]
    reward = (now - before).reshape(-1, 2)
    return 0.5 + 0.5 * np.sign(reward[:, 0] - reward[:, 1])

def interval(values):
    return f"{100 * values.mean():.1f} ± {200 * values.std(ddof=1) / math.sqrt(len(values)):.1f}%"

def compared(gaps, more, less):
    """In words: is the mean of the gaps more than two standard errors away from 0?"""
    error = 2 * gaps.std(ddof=1) / math.sqrt(len(gaps))
    if abs(gaps.mean()) <= error:
        return f"no {more} and no {less}"
    return more if gaps.mean() > 0 else less

def fault_shares(out, stage):
    """The share of held-out answers with each fault, in percent, and their mean number of closing phrases."""
    rows = read_rows(out / "evaluation" / f"{stage}.jsonl")
    found = [tiny.findings(row["prompt"], row["text"]) for row in rows]
    shares = {}
    for fault in ("false", "rude", "off-topic", "garbled", "repeated"):
        shares[f"{fault} %"] = 100 * fmean(counts[fault] > 0 for counts in found)
    return shares | {"closers": fmean(counts["closers"] for counts in found)}

def judged_answers(out, stage):
    """Gold scores, rewards (NaN where there is none) and lengths in characters of the held-out answers."""
    rows = read_rows(out / "evaluation" / f"{stage}.jsonl")
    return np.array([(row["gold"], row["reward"], len(row["text"])) for row in rows], dtype=float).T

def judged_table(out, metrics, full=False):
    """The tiny world's table, a dict per stage. Win rates: against the model before round 1, same prompts.
    full: with the faults of the answers, and more of what a round has logged."""
    rounds = {row["stage"]: row for row in metrics if "alpha" in row}
    first, table = judged_stages(out), []
    base, _, base_chars = judged_answers(out, first[-1])
    for stage in judged_stages(out, rounds):
        gold, reward, chars = judged_answers(out, stage)
        known = np.isfinite(gold) & np.isfinite(base)  # a reward model may find an answer too long
        win, controlled = tiny.win_rates(*(x[known] for x in (gold, base, chars, base_chars)))
        row = {"stage": stage, "win rate": win, "length-controlled": controlled, "gold": np.nanmean(gold),
               "characters": chars.mean(), "reward agrees %": 100 * agreement(gold, reward)}
        for name, (key, factor) in SHOWN.items():
            value = rounds.get(stage, {}).get(key)
            if full or ("pairs" in name and any(key in row for row in metrics)):
                row[name] = np.nan if value is None else factor * value
        table.append(row | (fault_shares(out, stage) if full else {}))
    return table

SHOWN = {  # columns that a round has logged: key and factor
    "pairs right %": ("pairs_right", 100), "pairs tied %": ("pairs_tied", 100), "alpha": ("alpha", 1),
    "KL to previous": ("kl_to_previous", 1), "KL to first": ("kl_to_first", 1),
    "rank agreement": ("rank_agreement", 1), "offline agreement %": ("offline_agreement", 100),
    "offline unlearned": ("offline_unlearned", 1)}

def agreement(gold, reward):
    """How often the reward orders two answers to a prompt as the judge does, if the judge has no tie."""
    gold, reward = gold.reshape(-1, 4), reward.reshape(-1, 4)
    better = gold[:, :, None] - gold[:, None, :] > 1e-9  # (P, 4, 4): four answers a prompt
    return (reward[:, :, None] > reward[:, None, :])[better].mean() if np.isfinite(reward).all() else np.nan

ROUND = ("alpha", "prompts_with_pair", "generated_pairs", "replayed_pairs", "pair_length_gap",
         "kl_to_previous", "kl_to_first", "answer_chars", "truncated", "identical", "offline_agreement")

def training_table(metrics):
    """What is known without a judge, a dict per stage: means over the last tenth of its steps, and ROUND."""
    table, shown = [], [key for key in ROUND if any(key in row for row in metrics)]
    for stage in dict.fromkeys(row["stage"] for row in metrics):
        rows = [row for row in metrics if row["stage"] == stage]
        steps = [row for row in rows if "step" in row]
        last = steps[-max(1, len(steps) // 10):] or [{}]
        about = next((row for row in rows if "alpha" in row), {})
        means = {key: np.mean([x.get(key, np.nan) for x in last]) for key in ("loss", "accuracy", "margin")}
        of_round = {key.replace("_", " "): about.get(key) for key in shown}
        table.append({"stage": stage, "steps": len(steps), **means, **of_round})
    return table

def markdown(table):
    """A markdown table from dicts with the same keys."""
    def cell(value):
        if value is None or value != value:
            return ""
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    if not table:
        return "nothing was trained\n"
    rows = [[cell(value) for value in row.values()] for row in table]
    lines = [list(table[0]), ["---"] * len(table[0]), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)

def examples(out, base, stage):
    """Held-out prompts with an answer before and after DICE."""
    before, after = (read_rows(out / "evaluation" / f"{name}.jsonl") for name in (base, stage))
    firsts = zip(before[::4], after[::4])  # a prompt has four answers
    differ = [(old, new) for old, new in firsts if abs(old["gold"] - new["gold"]) > 1e-9]
    text = ""
    if differ:
        text = (f"\nThe first three held-out prompts on which {base} and {stage} differ in gold, by the "
                "first sample of each (three answers prove nothing; the table does):\n")
    for old, new in differ[:3]:
        text += f"\n**{as_text(old['prompt'])}**\n"
        for name, row in ((base, old), (stage, new)):
            text += f"- {name}, gold {row['gold']:.2f}: {shortened(row['text'])}\n"
    return text

def generated_pairs(out, stage):
    """Three generated pairs of a round, with what its samples.jsonl says about their answers."""
    pairs = [row for row in read_rows(out / stage / "pairs.jsonl") if row["source"] == "generated"][:3]
    if not pairs:
        return ""
    text = f"\n## Generated pairs\n\nThe first three generated pairs of {stage}/pairs.jsonl.\n"
    samples, prompts = {}, [row["prompt"] for row in pairs]
    with open(out / stage / "samples.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):  # there may be too many rows for memory
            if row["prompt"] in prompts and row["finish"] == "stop":
                samples.setdefault((str(row["prompt"]), row["text"]), row)
    for pair in pairs:
        text += f"\n**{shortened(pair['prompt'])}**\n"
        for name in ("chosen", "rejected"):
            row = samples[str(pair["prompt"]), pair[name]]
            text += (f"- {name}, reward {row['reward']:.4g}, shaped reward {row['shaped_reward']:.4g}, "
                     f"{len(row['text'])} characters: {shortened(row['text'])}\n")
    return text

def shortened(content):
    """The beginning of a text, or of messages, for markdown."""
    if not isinstance(content, str):
        content = " ".join(f"{message['role']}: {message['content']}" for message in content)
    return as_text(content if len(content) <= 600 else content[:600] + " ...")

@options.command("report.py")
def main(argv=None):
    print(write(Path(*(argv or sys.argv[1:]))))

if __name__ == "__main__":
    raise SystemExit(main())
