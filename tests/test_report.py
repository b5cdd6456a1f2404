"""What a run leaves for its reader: report.md, whatever the run has and whatever its texts are."""
import html
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from data import files, report

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
                         "prompts_all_equal": 1, "generated_pairs": 8, "pairs_right": 0.75})
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
                          ("https://a.org", r"https\://a.org"), ("0.5", "0.5"), ("Plain, d-e (f)!", "Plain, d-e (f)!")):
        assert report.as_text(text) == written

def test_jupyters_backend_and_a_picture_that_fails_do_not_cost_the_table(tmp_path, monkeypatch, capsys):
    made(tmp_path)
    for backend in ("module://matplotlib_inline.backend_inline", "nonsense"):  # both are not installed
        done = subprocess.run([sys.executable, report.__file__, tmp_path], capture_output=True, text=True,
                              env=os.environ | {"MPLBACKEND": backend})
        assert done.returncode == 0 and "| round-1 |" in done.stdout and done.stderr == ""
        assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
        (tmp_path / "curves.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert "| round-1 |" in report.write(tmp_path) and "(it needs matplotlib)" in one_line(capsys)
    (tmp_path / "report.md").unlink()
    def broken(*_):
        raise RuntimeError("a\nbug")
    monkeypatch.setattr(report, "curves", broken)
    assert "| round-1 |" in report.write(tmp_path) and "a bug" in one_line(capsys)
    assert "| round-1 |" in (tmp_path / "report.md").read_text()

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
