"""What a run leaves for its reader: report.md and pictures, whatever the run has and its texts are."""
import html
import os
import re
import subprocess
import sys

import kill
import numpy as np
import pytest
from test_dice import settings

import dice
from data import files, plots, report, tiny

TEXTS = ["Hello <b>you</b> <img src=x onerror=alert(1)> &amp; <!-- gone -->", "![a](http://x/y.png) [b](c)",
         "| a | b |\n|---|---|\n| `c` | ``d |", "# A head\n\n- one\n1. two\n> *three* __four__ ~~five~~ $x$"]

def made(out, stages=("sft", "dpo", "round-1"), judged=("sft", "dpo", "round-1"), texts=TEXTS):
    """The directory of a run as far as it came: settings, rows of metrics, answers of the judged stages."""
    files.write_file(out / "settings.json", lambda scratch: files.write_json(scratch, {
        "model": texts[0], "seed": 0, "alpha": "auto", "beta": 0.1}))
    rng, rows = np.random.default_rng(0), []
    for stage in stages:
        if stage.startswith("round"):
            rows.append({"stage": stage, "alpha": 0.1, "prompts": 9, "prompts_with_pair": 8,
                         "prompts_all_equal": 1, "prompts_cut": 0, "prompts_too_few_valid": 0,
                         "generated_pairs": 8, "pairs_right": 0.75, "offline_agreement": None,
                         "answer_chars": 9.0, "truncated": 0.0})
        for step in range(1, 4):
            rows.append({"stage": stage, "step": step, "loss": 1 / step}
                        | ({} if stage == "sft" else {"accuracy": 0.5, "margin": 0.1 * step}))
    if rows:
        files.write_rows(out / "metrics.jsonl", rows)
    for stage in judged:
        files.write_rows(out / "evaluation" / f"{stage}.jsonl", [
            {"prompt": texts[i % len(texts)], "text": texts[(i + k + 1) % len(texts)], "sample": k,
             "gold": float(rng.normal()), "reward": float(rng.normal())} for i in range(6) for k in range(4)])
    return out

def one_line(capsys):
    [line] = capsys.readouterr().err.splitlines()
    return line

def test_text_from_data_goes_into_the_report_as_text(tmp_path):
    """Rendered, the report has no tag but its own, and every text can be read in it."""
    markdown_it = pytest.importorskip("markdown_it")
    report.write(made(tmp_path))
    page = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(
        (tmp_path / "report.md").read_text())
    kinds = {re.sub(r"[ /].*", "", tag.strip("/")) for tag in re.findall(r"<([^>]*)>", page)}
    assert kinds == {*"h1 h2 p ul li strong table thead tbody tr th td img".split()}
    assert page.count("<img") == 1 and page.count("<h1>") == 1 and page.count("<table>") == 2
    shown = html.unescape(re.sub(r"<[^>]*>", "", page))
    assert all(" ".join(text.split()) in shown for text in TEXTS)
    for text, written in (("- a", r"\- a"), ("12. a", r"12\. a"), ("\x1b[0m\ud800", r"\\x1b\[0m\\ud800"),
                          ("https://a.org", r"https\://a.org"), ("0.5 (d-e)!", "0.5 (d-e)!")):
        assert report.as_text(text) == written

def test_jupyters_backend_and_a_picture_that_fails_do_not_cost_the_table(tmp_path, monkeypatch, capsys):
    made(tmp_path)
    jupyter = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # it is not installed
    done = subprocess.run([sys.executable, report.__file__, tmp_path], capture_output=True, text=True,
                          env=os.environ | jupyter)
    assert done.returncode == 0 and "| round-1 |" in done.stdout and "drawn" not in done.stderr
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
    (tmp_path / "curves.png").unlink()
    def broken(*_):
        raise RuntimeError("a\nbug")
    monkeypatch.setattr(plots, "curves", broken)
    assert "| round-1 |" in report.write(tmp_path)
    assert one_line(capsys) == f"{tmp_path}/curves.png: was not drawn: a bug"
    plots.available.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    for _ in range(2):  # it is said once
        assert "| round-1 |" in report.write(tmp_path)
    assert "no pictures are drawn: pip install matplotlib" in one_line(capsys)
    plots.available.cache_clear()
    text = (tmp_path / "report.md").read_text()
    assert "| round-1 |" in text and "![" not in text  # no link to a picture that is not there

@pytest.mark.parametrize("stages, judged, first", [
    ((), (), "nothing was trained"),
    (("sft",), (), "| stage | steps |"),
    (("sft",), ("sft",), "| stage | win rate |"),
    (("sft", "dpo", "round-1"), ("sft", "dpo"), "| stage | win rate |")])
def test_the_report_of_an_unfinished_run_is_a_table_of_what_is_there(stages, judged, first, tmp_path, capsys):
    made(tmp_path, stages, judged)
    (tmp_path / "evaluation").mkdir(exist_ok=True)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "round-1", "st')  # the run is just writing it
    assert report.main([str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(first) and told.err == ""
    text = (tmp_path / "report.md").read_text()
    assert all(f"| {stage} |" in text for stage in stages)

def test_a_round_that_has_only_begun_to_train_is_in_the_report(tmp_path, recwarn):
    made(tmp_path, ("dpo", "round-1"), ())
    rows = report.read_rows(tmp_path / "metrics.jsonl")
    files.write_rows(tmp_path / "metrics.jsonl", rows[:4])
    assert "| round-1 | 0 |" in report.write(tmp_path) and not recwarn.list

def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert report.main([str(path)]) == 2
        assert one_line(capsys) == f"report.py: {path}: no settings.json in it; give the directory of a run"

# ------------------------------------------------------------------------------------------------- examples
def test_examples_are_the_first_three_prompts_whose_gold_has_changed(tmp_path):
    made(tmp_path, texts=["a"])
    for stage, golds in (("dpo", [0, 0, 0, 0, 0, 0]), ("round-1", [0, 1, 1e-12, -1, 2, 3])):
        files.write_rows(tmp_path / "evaluation" / f"{stage}.jsonl", [
            {"prompt": f"prompt {i}", "text": f"{stage} {i} {k}", "sample": k, "reward": k,
             "gold": gold if k == 0 else 9 - gold} for i, gold in enumerate(golds) for k in range(4)])
    text = report.write(tmp_path)
    assert "The first three held-out prompts on which dpo and round-1 differ in gold, by the first" in text
    assert re.findall(r"\*\*(.*)\*\*\n- (.*)\n- (.*)\n", text) == [
        (f"prompt {i}", f"dpo, gold 0.00: dpo {i} 0", f"round-1, gold {gold:.2f}: round-1 {i} 0")
        for i, gold in ((1, 1), (3, -1), (4, 2))]

def test_a_real_models_report_shows_the_first_three_generated_pairs(tmp_path):
    made(tmp_path, judged=())
    turns = [{"role": "user", "content": "Sum <b>?"}]
    prompts = ["P", turns, "Q", "R"]
    files.write_rows(tmp_path / "round-1" / "samples.jsonl", [
        {"prompt": prompt, "text": f"{i} {k} " + "x" * 999 * k, "finish": "stop", "reward": float(i + k),
         "shaped_reward": i - k / 4} for i, prompt in enumerate(prompts) for k in (2, 0, 1)])
    pairs = [{"prompt": prompt, "chosen": f"{i} 1 " + "x" * 999, "rejected": f"{i} 0 ", "source": "generated"}
             for i, prompt in enumerate(prompts)]
    files.write_rows(tmp_path / "round-1" / "pairs.jsonl", [{**pairs[0], "source": "replayed"}, *pairs])
    report.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "The first three generated pairs of round-1/pairs.jsonl." in text and "**R**" not in text
    assert text.index("**P**") < text.index("**user: Sum &lt;b&gt;?**") < text.index("**Q**")
    assert f"- chosen, reward 2, shaped reward 0.75, 1003 characters: 1 1 {'x' * 596} ...\n" in text
    assert "- rejected, reward 1, shaped reward 1, 4 characters: 1 0\n" in text

# ------------------------------------------------------------------------------------------------- pictures
def tables(prompts, seed=0):
    """Rewards that like length, and lengths, (P, 6), with holes."""
    rng = np.random.default_rng(seed)
    length = rng.gamma(4, 50, (prompts, 6)).round()
    reward = 0.02 * length + rng.normal(size=length.shape)
    length[rng.random(length.shape) < 0.1] = np.nan
    return reward + 0 * length, length

def drawn(draw, *args):
    figure = pytest.importorskip("matplotlib.figure").Figure(layout="constrained")
    draw(figure, *args)
    return figure

def test_the_picture_of_a_round_shows_the_gaps_that_dice_computes():
    reward, length = tables(40)
    alpha = dice.search_alpha(reward, length)
    figure = drawn(plots.shaping, "round-1", reward, length, "characters", alpha, "alpha*", dice.choose_pairs)
    before, stairs, after, both = figure.axes
    grid, gaps = stairs.lines[0].get_data()
    for a, gap in list(zip(grid, gaps))[::50]:
        assert gap == pytest.approx(dice.length_gap(reward, length, dice.choose_pairs, a))
    assert gaps[0] > 0 > gaps[-1] and f"alpha* = {alpha:.4g}" in stairs.texts[0].get_text()
    assert f"{gaps[0]:.1f} characters longer" in before.get_title()
    assert sum(patch.get_height() for patch in both.patches if hasattr(patch, "get_height")) == 40
    assert len(after.lines[1:31]) == 30  # joined prompts: all 40 would be too many

ROUNDS = [f"round-{t}" for t in range(1, 11)]

@pytest.mark.parametrize("name, draw, args", [
    *[(name, plots.shaping, ("round-1", *values, "tokens", alpha, "alpha", dice.choose_pairs))
      for name, values, alpha in (("alpha 0", tables(9), 0.0), ("given alpha", tables(9), 0.5),
                                  ("one prompt", tables(1), 0.01), ("equal", np.ones((2, 3, 4)), 0.0),
                                  ("short wins", -np.array(tables(9)), 0.0))],
    *[(name, plots.curves, (stages, steps)) for name, stages, steps in (
        ("3 steps", ["sft", "dpo", "round-1"], 3), ("sft", ["sft"], 40), ("10 rounds", ["dpo", *ROUNDS], 300),
        ("half way", ["dpo", "round-1"], 0))]])
def test_no_picture_fails_and_no_two_labels_overlap(name, draw, args, tmp_path, recwarn, capsys):
    if draw is plots.curves:
        stages, steps = args
        rows = []
        for stage in stages:
            more = {} if stage == "sft" else dict.fromkeys(
                ("accuracy", "margin", "chosen_logprob", "rejected_logprob", "chosen_tokens"), 1.0)
            if stage.startswith("round"):
                rows.append({"stage": stage, "alpha": 0.1, "kl_to_previous": None, "answer_chars": 9.0,
                             "offline_agreement": 0.55})
            row = {"stage": stage, "grad_norm": 1.0} | more
            rows += [{**row, "step": i + 1, "loss": i % 7} for i in range(steps)]
        args = rows, report.training_table(rows)
    pytest.importorskip("matplotlib")
    plots.save(tmp_path / "picture.png", draw, *args)
    assert (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG"
    assert capsys.readouterr().err == "" and not recwarn.list
    figure = drawn(draw, *args)
    figure.draw_without_rendering()
    for axis in figure.axes:
        apart([label for label in axis.get_xticklabels() if label.get_text()])
        assert "(0.5 is chance)" not in axis.get_title() or axis.get_ylim() == (0, 1)

def apart(texts):
    """No two texts of a drawn figure overlap."""
    from matplotlib.text import Text
    boxes = [Text.get_window_extent(text) for text in texts]  # without the line of an annotation
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])

def test_the_studys_picture_labels_lines_and_sorts_siblings(tmp_path, capsys, recwarn):
    rng, values = np.random.default_rng(0), {}
    main = ["DICE", "no shaping", "first model", "gold", "no replay"]
    for arm in [*main, *(f"sibling {i}" for i in range(14))]:
        for t in range(1, 4 + (arm == "DICE")):
            values[arm, f"round-{t}"] = {key: list(55 + 0.1 * len(values) + rng.normal(size=10))
                                         for key in ("win rate", "length-controlled")}
    values["", "dpo"] = {"win rate": [50.0] * 10, "length-controlled": [50.0] * 10}
    plots.study(tmp_path / "study.png", values, main)
    assert (tmp_path / "study.png").exists() and capsys.readouterr().err == "" and not recwarn.list
    figure = drawn(plots.draw_study, values, main)
    figure.draw_without_rendering()
    by_round, siblings, _ = figure.axes
    assert {text.get_text() for text in by_round.texts} == set(main)
    apart(by_round.texts)
    def effect(arm):
        return np.mean(np.subtract(*(values[name, "round-2"]["win rate"] for name in (arm, "DICE"))))
    names = [label.get_text() for label in siblings.get_yticklabels()]
    assert len(names) == 14 and names == sorted(names, key=effect)

def test_a_run_draws_its_rounds_and_its_report_shows_them(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for name, value in kill.WORLD.items():
        monkeypatch.setattr(tiny, name, value)
    argv = "--rounds 2 --dpo-steps 2 --sft-steps 20 --steps 2 --samples 4 --batch 4 --min-valid 0".split()
    argv += ["--max-new-tokens", "48", "--sft-lr", "0.01", "--device", "cpu", "--out", str(tmp_path)]
    assert dice.main(argv) == 0 and "drawn" not in capsys.readouterr().err
    shown = re.findall(r"!\[(.*)\]\(\1\)", (tmp_path / "report.md").read_text())
    assert shown == ["round-1/shaping.png", "round-2/shaping.png", "curves.png"]
    assert all((tmp_path / name).read_bytes()[1:4] == b"PNG" for name in shown)

def test_rank_agreement_is_kendalls_tau_of_two_rewards_without_ties():
    """Counted pair by pair. With --reward-reference first, both rewards compare with the first model."""
    rng, samples, taus = np.random.default_rng(0), [], {"previous": [], "first": []}
    for _ in range(6):
        group = [dice.Sample(None, [], "", logprob=a, prev_logprob=b, older_logprob=c)
                 for a, b, c in rng.integers(-3, 4, size=(8, 3))]
        samples += group
        for name in taus:
            signs = []
            for x in group:
                for y in group:
                    now = (x.logprob - x.prev_logprob) - (y.logprob - y.prev_logprob)
                    before = [x.prev_logprob - x.older_logprob, y.prev_logprob - y.older_logprob]
                    if name == "first":
                        before = [x.older_logprob - x.prev_logprob, y.older_logprob - y.prev_logprob]
                    if now * (before[0] - before[1]) != 0:
                        signs.append(np.sign(now * (before[0] - before[1])))
            taus[name].append(np.mean(signs))
    for name, expected in taus.items():
        s = settings(samples=8, reward_reference=name)
        assert report.rank_agreement(samples, s) == pytest.approx(np.mean(expected))
    assert report.rank_agreement(samples, settings(samples=8, reward="gold")) is None
    samples[0].older_logprob = np.nan  # the first round
    assert report.rank_agreement(samples, settings(samples=8)) is None
