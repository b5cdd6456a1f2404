"""What an interrupted, crowded or unlucky run does: it loses nothing, and ends as one that was left alone."""
import errno
import fcntl
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from contextlib import chdir
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import kill
import numpy as np
import pytest
import torch
from kill import contents, differences
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_dice import (  # noqa: F401 (checkpoint is a fixture)
    LLAMA, Bench, checkpoint, network, random_pairs, random_samples, rows_of, settings, train_dpo)
from torch.distributed.tensor import DTensor

import dice
import model as models
from data import ablations, files, memory, plan, plots, processes, runs, tiny
from data.files import InputError

ARGV = ("--sft-steps 20 --sft-batch 16 --sft-lr 0.01 --dpo-steps 6 --steps 16 --samples 4 --batch 8 "
        "--gamma 0.9 --rounds 1 --min-valid 0 --save-steps 4 --chunk 6 --epochs 2 --max-new-tokens 48 "
        "--data-filter fdpo").split()

@pytest.fixture(scope="module", autouse=True)
def small_world():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in kill.WORLD.items():
            patch.setattr(tiny, name, value)
        patch.setattr(plots, "save", lambda *_: None)  # half a second each
        patch.setattr(models, "tiny_model", cache(models.tiny_model))
        yield

def small(directory, *argv):
    """A run in directory/run, in this process; its exit code."""
    with chdir(directory):
        return dice.main([*ARGV, "--out", "run", "--device", "cpu", *map(str, argv)])

@pytest.fixture(scope="module")
def alone_2(tmp_path_factory):
    """The directory of a run of two rounds that nothing disturbed."""
    directory = tmp_path_factory.mktemp("alone-2")
    assert small(directory, "--rounds", 2) == 0
    return directory / "run"

@pytest.fixture(scope="module")
def alone(alone_2, tmp_path_factory):
    """The same with one round."""
    run = before("round-1", alone_2, tmp_path_factory.mktemp("alone"))
    assert small(run.parent) == 0
    return run

def before(stage, whole, directory):
    """directory/run as it was when a whole run came to this stage."""
    run, stages = shutil.copytree(whole, directory / "run"), ["sft", "dpo", "round-1", "round-2"]
    undone = stages[stages.index(stage):]
    for name in undone:
        shutil.rmtree(run / name, ignore_errors=True)
        (run / "evaluation" / f"{name}.jsonl").unlink(missing_ok=True)
    done = [row for row in rows_of(run / "metrics.jsonl") if row["stage"] not in undone]
    files.write_rows(run / "metrics.jsonl", done)
    return run

class Killed(BaseException):
    """In the place of SIGKILL: nobody catches it."""

def fails_at(number, real, error):
    """The function, but its call of this number raises the error."""
    calls = []
    def function(*args, **about):
        calls.append(args)
        if len(calls) == number:
            raise error
        return real(*args, **about)
    function.calls = calls
    return function

def tokens_of(run):
    return [row["tokens"] for row in rows_of(run / "round-1/samples.jsonl")]

# --------------------------------------------------------------------------------------------- Interrupted
def wait_until(reached, started, directory):
    while not reached():
        assert all(p.is_alive() for p in started), (directory / "log.txt").read_text()[-2000:]
        time.sleep(0.002)  # leave the processor to them

def kept(run, pattern):
    """What is in partial/ of a run at work, which may remove it at any moment."""
    try:
        return list(run.glob(f"partial/{pattern}"))
    except FileNotFoundError:
        return []

def exit_codes(processes):
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]

def test_killed_at_any_moment_it_ends_as_if_left_alone(alone, tmp_path):
    """SIGKILL in supervised training, in sampling, in a round's training, and in the middle of a line."""
    run = tmp_path / "run"
    for pattern in ("sft.*-of-1", "round-1-samples.*.jsonl", "round-1.*-of-1"):
        [process] = kill.start_small(tmp_path, ARGV)
        wait_until(lambda: kept(run, pattern), [process], tmp_path)
        process.kill()
        process.join()
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"stage": "sft", "st')
    (run / ".policy.0123abcd.tmp").mkdir()  # what SIGKILL leaves of a checkpoint
    (run / ".policy.0123abcd.tmp" / "model.safetensors").write_bytes(b"half")
    assert exit_codes(kill.start_small(tmp_path, ARGV)) == [0] and differences(alone, run) == []
    log = (tmp_path / "log.txt").read_text()
    assert log.count("goes on where it stopped") == 3 and "sft: goes on after step" in log
    assert not (run / "partial").exists()

@pytest.mark.parametrize("number, moment", [(signal.SIGINT, "sampling"), (signal.SIGTERM, "training")])
def test_ctrl_c_and_sigterm_stop_at_a_safe_point(number, moment, alone, tmp_path, monkeypatch, capsys):
    log, draw, chunks, run = dice.Run.log, dice.draw_answers, [], before("round-1", alone, tmp_path)
    def stop_in_training(self, row):
        if row["stage"] == "round-1" and row.get("step") in (2, 5):
            os.kill(os.getpid(), number)
        log(self, row)
    def stop_in_sampling(*args, **about):
        chunks.append(1)
        if len(chunks) == 2:
            os.kill(os.getpid(), number)
        return draw(*args, **about)
    with monkeypatch.context() as patch:
        if moment == "training":
            patch.setattr(dice.Run, "log", stop_in_training)
        else:
            patch.setattr(dice, "draw_answers", stop_in_sampling)
        for _ in range(2 if moment == "training" else 1):  # from a state to a state, with moments that travel
            assert small(tmp_path, "--offload", "moments") == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert signal.getsignal(number) not in (None, signal.SIG_IGN) and not processes.STOP
    left = {path.name for path in (run / "partial").iterdir()}  # the state after the step it was stopped in
    assert ("round-1.5.0-of-1" if moment == "training" else "round-1-samples.0.jsonl") in left
    assert small(tmp_path) == 0 and differences(alone, run) == []

def test_1_10_fdpo_killed_after_round_1_keeps_the_same_pairs_in_round_2(
        alone, alone_2, tmp_path, monkeypatch):
    """Killed again right after the first chunk of round 2's filter. And a finished run of one round that is
    asked for two ends with the same bytes as one that was asked for two from the start."""
    run, append = shutil.copytree(alone, tmp_path / "run"), files.append_row
    def killed(path, row):
        append(path, row)
        if path.name.startswith("round-2-fdpo-epoch-1."):
            raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files, "append_row", killed)
        small(tmp_path, "--rounds", 2)
    assert len(rows_of(run / "partial/round-2-fdpo-epoch-1.0.jsonl")) == 1
    assert small(tmp_path, "--rounds", 2) == 0 and differences(alone_2, run) == []

def test_a_finished_run_is_told_again_at_once(alone, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(alone, tmp_path / "run")
    monkeypatch.setattr(dice, "generate", None)
    monkeypatch.setattr(dice, "train", None)
    assert small(tmp_path) == 0 and "round-1" in capsys.readouterr().out and differences(alone, run) == []
    assert small(tmp_path, "--rounds", 0) == 0 and "run: is finished" in capsys.readouterr().err

def test_10_other_settings_data_or_processes_are_refused_in_one_line(
        checkpoint, tmp_path, monkeypatch, capsys):
    row, data = '{"prompt": "Hi", "chosen": "Good.", "rejected": "Go."}\n', tmp_path / "pairs.jsonl"
    argv = ["--model", checkpoint, "--preferences", data, "--rounds", 0, "--dpo-steps", 1, "--sft-steps", 1]
    data.write_text(row)
    assert small(tmp_path, *argv) == 0
    assert "not given are the paper's, for a model of 8B" in capsys.readouterr().err
    run, left = tmp_path / "run", contents(tmp_path / "run")
    monkeypatch.setattr(type(models.tiny_model()[1]), "template_system", lambda _: "Be nice.")
    assert small(tmp_path, *argv, "--preset", "smollm2-135m", "--dry-run") == 0
    told = capsys.readouterr().err
    assert "the paper's, for" not in told and "template is not used ('Be nice.'); --system TEXT" in told
    def refused(*more):
        capsys.readouterr()
        assert small(tmp_path, *argv, *more) == 2
        [about_fdpo, line] = capsys.readouterr().err.splitlines()
        assert "--data-filter fdpo: does nothing with --rounds 0" in about_fdpo
        return line
    assert "--beta 0.1, now 0.2; --seed 0, now 5" in refused("--beta", "0.2", "--seed", "5")
    assert "--system '', now 'Be brief.'" in refused("--system", "Be brief.")
    data.write_text(row + row)
    assert "contents of --preferences have changed" in refused()
    data.write_text(row)
    with open(run / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process is at work" in refused()
    assert contents(run) == left
    (run / "settings.json").unlink()
    assert "holds files already" in refused()

def test_10_a_run_goes_on_with_other_settings_of_the_machine_and_defaults_for_absent_ones(
        alone, tmp_path, monkeypatch, capsys):
    """It stops in the second chunk of its samples. The answers are those of the run that was left alone."""
    run = before("round-1", alone, tmp_path)
    known = files.read_json(run / "settings.json")
    assert known.pop("reward_reference") == "previous" and known.pop("beta") == 0.1
    files.write_json(run / "settings.json", known)
    cut = fails_at(2, dice.draw_answers, Killed())
    monkeypatch.setattr(dice, "draw_answers", cut)
    with pytest.raises(Killed):
        small(tmp_path)
    machine = ["--rows", 3, "--save-steps", 7, "--chunk", 4, "--score-tokens", 200, "--train-tokens", 900]
    assert small(tmp_path, *machine) == 0 and [len(args[1]) for args in cut.calls[:4]] == [6, 4, 4, 2]
    assert tokens_of(run) == tokens_of(alone)
    capsys.readouterr()
    assert small(tmp_path, "--gamma", "0.5", "--loss", "cdpo") == 2
    assert "--gamma 0.9, now 0.5; --loss 'dpo', now 'cdpo'" in capsys.readouterr().err

FULL = errno.ENOSPC, "No space left on device"

@pytest.mark.parametrize("where, name, number, error", [
    (files, "json_line", 60, OSError(*FULL)), (os, "replace", 3, OSError(*FULL)),  # of the second state
    (runs, "save_file", 10, SafetensorError("I/O error: No space left on device"))],  # of the first
    ids=["append", "replace", "tensors"])
def test_15_a_full_disk_ends_the_run_and_what_is_done_is_kept(
        where, name, number, error, alone, tmp_path, monkeypatch, capsys):
    run, until_full = before("round-1", alone, tmp_path), fails_at(number, getattr(where, name), error)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, until_full)
        assert small(tmp_path) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("dice.py: run/") and "No space left on device; make room there" in told
    assert len(until_full.calls) == number
    assert list((run / "partial").iterdir()) and not list(run.rglob("*.tmp"))
    assert small(tmp_path) == 0 and differences(alone, run) == []

def test_a2_what_models_and_data_contain_decides_and_not_their_paths(from_files, tmp_path, capsys):
    """Other weights or rows under the same path are refused. Moved, all goes on, also from a pipe."""
    place = tmp_path / "place"
    place.mkdir()
    for name, path in zip(("dpo", "sft", "pairs.jsonl", "prompts.jsonl"), from_files[1:8:2]):
        (shutil.copytree if Path(path).is_dir() else shutil.copy)(path, place / name)
    def go(here, *more):
        argv = f"--model {here}/dpo --reference {here}/sft/ --prompts {here}/prompts.jsonl".split()
        argv += ["--preferences", here / "pairs.jsonl", "--sft-steps", 0, *more]
        return small(here.parent, *from_files[8:], *argv)
    assert go(place, "--out", place / "run") == 0
    whole = contents(place / "run")
    for name, option in (("sft/model.safetensors", "reference"), ("pairs.jsonl", "preferences")):
        path = place / name
        kept = path.read_bytes()
        path.write_bytes(b"\n" + kept if name == "pairs.jsonl" else kept[:-1] + bytes([kept[-1] ^ 1]))
        capsys.readouterr()
        assert go(place, "--out", place / "run") == 2
        assert f"contents of --{option} have changed" in capsys.readouterr().err
        path.write_bytes(kept)
    new = place.rename(tmp_path / "elsewhere")
    pipe, rows = new / "pipe", (new / "pairs.jsonl").read_bytes()
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=[rows], daemon=True).start()
    assert go(new, "--out", "elsewhere/run/", "--preferences", pipe) == 0
    assert contents(new / "run").keys() == whole.keys()

def test_a3_weights_that_are_not_finite_are_never_saved(tmp_path, capsys):
    assert small(tmp_path, "--sft-steps", 0, "--dpo-steps", 1, "--dpo-lr", 1e39) == 2
    assert "dpo: embed.weight is not finite after the last step; it is not saved" in capsys.readouterr().err
    run = tmp_path / "run"
    shutil.rmtree(run)
    assert small(tmp_path, "--sft-steps", 0, "--dpo-steps", 3, "--dpo-lr", 1e39, "--save-steps", 1) == 2
    assert "dpo, step 2: loss nan" in capsys.readouterr().err
    assert not list(run.rglob("dpo.*")) and not (run / "dpo").exists()

def test_b8_the_rows_of_a_stage_are_on_the_disk_before_its_checkpoint(alone, tmp_path, monkeypatch):
    run, flush, write, flushed = before("dpo", alone, tmp_path), files.flush, models.write_checkpoint, []
    def recorded(path):
        flushed.append((path, os.path.getsize(path)))
        flush(path)
    def checked(*args, **about):
        assert (Path("run/metrics.jsonl"), os.path.getsize(run / "metrics.jsonl")) in flushed
        write(*args, **about)
        flushed.append("a checkpoint")
    monkeypatch.setattr(files, "flush", recorded)
    monkeypatch.setattr(models, "write_checkpoint", checked)
    assert small(tmp_path) == 0 and flushed.count("a checkpoint") == 2

def test_b10_files_of_others_are_kept_and_links_are_not_followed(tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    other.write_text("mine")
    (run / ".cache").mkdir(parents=True)
    for name in (".x.tmp", ".y.01234567.tmp"):
        (run / ".cache" / name).write_text("mine")
    (run / ".lock").symlink_to(other)
    assert small(tmp_path) == 2 and "run/.lock: Too many levels of symbolic links" in capsys.readouterr().err
    (run / ".lock").unlink()
    with dice.Run(settings(out=str(run), dpo_steps=1)):
        assert sorted(os.listdir(run / ".cache")) == [".x.tmp", ".y.01234567.tmp"]
    (run / ".y.0123abcd.tmp").symlink_to(tmp_path)
    with dice.Run(settings(out=str(run), dpo_steps=1)):
        assert not os.path.lexists(run / ".y.0123abcd.tmp")
    assert other.read_text() == (run / ".cache" / ".x.tmp").read_text() == "mine"

def test_b11_what_is_damaged_in_partial_is_made_again(alone, tmp_path, monkeypatch, capsys):
    """After a power loss: a chunk of zeros, one cut short, and a half file of the training's state."""
    run, log = before("round-1", alone, tmp_path), dice.Run.log
    def killed(self, row):
        log(self, row)
        if row.get("step") == 5:
            raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(dice.Run, "log", killed)
        small(tmp_path)
    chunks = run / "partial/round-1-samples.0.jsonl"
    lines = chunks.read_bytes().splitlines(keepends=True)
    chunks.write_bytes(lines[0] + b"\0" * 40 + b"\n" + lines[1][:40])
    state = run / "partial/round-1.4.0-of-1/embed.weight.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    capsys.readouterr()
    assert small(tmp_path) == 0 and differences(alone, run) == []
    told = capsys.readouterr().err
    assert "round-1-samples.0.jsonl: lines that were cut short or damaged are removed: 2" in told
    assert "round-1: the state after step 4 is damaged and thrown away" in told

@pytest.mark.parametrize("argv, told", [
    (["--out", "file/run"], "Not a directory"), (["--out", "x" * 300], "File name too long"),
    (["--out", "file"], "holds files already"), (["--prompts", "."], ".: Is a directory"),
    (["--model", "~nobody-of-this-name/x", "--preferences", "file"], "not a model directory"),
    (["--dry-run", "--preferences", "x" * 300], "File name too long")])
def test_d15_ordinary_trouble_is_one_line(argv, told, tmp_path, capsys):
    (tmp_path / "file").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    assert small(tmp_path, *argv) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("dice.py: ") and told in line

@pytest.mark.parametrize("where, argv", [("find_models", []), ("free_last_model", ["--dry-run"])])
def test_d15_ctrl_c_while_loading_and_in_the_dry_run_is_one_line(where, argv, tmp_path, monkeypatch, capsys):
    owner = models if hasattr(models, where) else plan
    monkeypatch.setattr(owner, where, fails_at(1, None, KeyboardInterrupt()))
    assert small(tmp_path, *argv) == 130 and capsys.readouterr().err.endswith("dice.py: interrupted\n")

def test_d15_closed_streams_and_a_reader_that_has_gone(alone, tmp_path):
    """Of a finished run that prints its table again; and of bad input, with nowhere to say so."""
    shutil.copytree(alone, tmp_path / "run")
    argv = [sys.executable, kill.DICE, *ARGV, "--device", "cpu", "--out"]
    gone = subprocess.Popen([*argv, "run"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    gone.stdout.close()
    told = gone.stderr.read().decode()
    assert told.startswith("run: is finished\n1 x cpu, 1 thread(s); float32; training takes ")
    assert told.count("\n") == 2 and gone.wait() == 141
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "", *argv, "new", "--prompts", "nowhere"]
    assert subprocess.run(closed, cwd=tmp_path).returncode == 2 and not (tmp_path / "new").exists()

def test_a_run_killed_while_its_settings_were_written_begins_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".settings.json.0123abcd.tmp").write_text('{"model": "ti')
    for _ in range(2):
        with dice.Run(settings(out=str(tmp_path / "run"), dpo_steps=1)):
            pass
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "settings.json"}

def test_a_dry_run_writes_nothing_and_says_what_is_too_small_for_a_run(tmp_path, monkeypatch, capsys):
    assert small(tmp_path, "--dry-run") == 0
    out, told = capsys.readouterr()
    assert "reading the data" in told and "stand in" not in told
    for word in ("42 offline pairs and 6 held out", "parameters", "stages", "time", "disk", "memory", "GB",
                 "24 rows are sampled at once"):
        assert word in out
    files.write_rows(tmp_path / "long.jsonl", [{"prompt": "x " * 500}])
    assert small(tmp_path, "--dry-run", "--prompts", "long.jsonl") == 2
    assert "context of 128" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert small(tmp_path, "--dry-run") == 2 and "of disk; 0.0 GB are free\n" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    for argv in ["--dry-run"], []:  # before anything is sampled
        assert small(tmp_path, *argv) == 2
        out, told = capsys.readouterr()
        line = "to train 0 million parameters takes main memory: 0.0 GB with --offload no"
        assert line in told.splitlines()[-1]
        assert out.count(": TOO LITTLE") == 2 * len(argv)
        assert not argv or "time     not known: this machine lacks the memory" in out
    assert not (tmp_path / "run").exists()

# --------------------------------------------------------- run.map, --start-from, and what a round reports
def test_9_map_computes_the_missing_chunks_alone_and_gives_results_in_order(tmp_path):
    """Of a function that yields its results backwards; with any --chunk; and no model is loaded in vain. The
    longest prompts, which come last here, are done first."""
    prompts, seen, loaded = [dice.Prompt(str(i), [i] * (20 - i)) for i in reversed(range(11))], [], []
    def backwards(network, items, budget):
        for i in reversed(range(len(items))):
            seen.append(items[i].ids[0])
            if seen == [1, 0, 3, 2, 5]:
                raise Killed
            yield from ((i * 2 + k, ([items[i].ids[0]], k)) for k in (1, 0))
    def answers(chunk, items=prompts, label="answers"):
        run = Bench(tmp_path, chunk=chunk)
        run.load = loaded.append
        return run.map(label, backwards, items, Path("a model"), "rows", 2)
    with pytest.raises(Killed):
        answers(2)
    expected = [[[i], k] for i in reversed(range(11)) for k in range(2)]
    assert answers(3) == expected
    assert seen == [1, 0, 3, 2, 5] + [5, 4, 3, 8, 7, 6, 10, 9] and len(loaded) == 2
    assert answers(4) == answers(1) == answers(100) == expected and len(seen) == 13 and len(loaded) == 2
    with pytest.raises(InputError, match="has results of other items"):
        answers(2, prompts[:-1])
    assert answers(2, prompts[:1], "others") == expected[:2] and answers(2, [], "none") == []

@pytest.mark.parametrize("is_log", [True, False])
def test_a_bar_says_tokens_per_second_and_the_time_left_and_a_log_file_gets_a_line_a_minute(
        is_log, tmp_path, monkeypatch, capsys):
    """Sampling of 5 answers at 25 s and 500 tokens each, scoring at 5 s, steps of 70 s and 100 tokens."""
    now, run = [0.0], Bench(tmp_path, chunk=2)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: not is_log)
    def takes(seconds, result):
        def fn(network, items, budget):
            for i in range(len(items)):
                now[0] += seconds
                yield i, result
        return fn
    samples = [dice.Sample(dice.Prompt(str(i), [i]), [1] * 49, "") for i in range(5)]
    run.map("samples", takes(25, ([1] * 500, "stop")), [x.prompt for x in samples], run.net, "rows")
    run.map("logprob", takes(5, 0.0), samples, run.net, "score_tokens")
    weights = dict(run.net.named_parameters())
    for _ in run.training(weights, torch.optim.AdamW(weights.values()), iter(samples * 2), 2, 2):
        now[0] += 70
    told = capsys.readouterr().err
    if is_log:
        assert told.splitlines() == [
            "dpo samples: 3 of 5, 25.00s/answer, 20 tokens/s, 01:15 so far, 00:50 left",
            "dpo samples: 5 of 5, 25.00s/answer, 20 tokens/s, 02:05 so far, 00:00 left",
            "dpo: 1 of 2, 70.00s/step, 1 tokens/s, 01:10 so far, 01:10 left",
            "dpo: 2 of 2, 70.00s/step, 1 tokens/s, 02:20 so far, 00:00 left"]
    else:
        frames = [frame.strip() for frame in told.replace("\n", "\r").split("\r")]
        for start, end in (("dpo samples:  40%|", "| 2/5 [00:50<01:15, 25.00s/answer, 20 tokens/s]"),
                           ("dpo logprob: 100%|", "| 5/5 [00:25<00:00,  5.00s/answer, 10 tokens/s]"),
                           ("dpo:  50%|", "| 1/2 [01:10<01:10, 70.00s/step, 1 tokens/s]")):
            assert any(frame.startswith(start) and frame.endswith(end) for frame in frames)

def test_14_on_a_gpu_the_rows_of_each_chunk_follow_from_the_memory_that_is_free(tmp_path, monkeypatch):
    """They are lowered only until the chunk is done. The 1 GB that is free is held by torch."""
    prompts, tried = [dice.Prompt("", [1] * n) for n in (10, 900, 20, 1000)], []
    for name, value in {"mem_get_info": (0, 80 * 10**9), "memory_reserved": 3 * 10**9,
                        "memory_allocated": 2 * 10**9}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    run, config = Bench(tmp_path, chunk=2, rows=10**6, max_new_tokens=24), replace(LLAMA, context=4096)
    run.device = "cuda:0"
    network = types.SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, config=config)
    def draw(network, items, rows):
        tried.append((len(items[0].ids), rows))
        if len(tried) == 1:
            raise torch.OutOfMemoryError
        yield from ((i * 4 + k, (items[i].ids, k)) for i in range(2) for k in range(4))
    results = run.map("samples", draw, prompts, network, "rows", 4)
    assert results == [[prompt.ids, k] for prompt in prompts for k in range(4)]
    (a, most), (b, again), (c, short) = tried
    assert (a, b, c) == (1000, 1000, 20) and again == most * 3 // 4 and 10**6 > short > 5 * most
    assert most % 4 == 0 and most == memory.rows_that_fit(config, torch.bfloat16, 1000, 24, 4, 10**9)

def test_9_the_hash_of_items_knows_their_ids_their_order_and_where_the_answer_begins():
    samples = [dice.Sample(dice.Prompt("", ids), tokens, "") for ids, tokens in (
        ([1, 2], [3]), ([1], [2, 3]), ([1, 2], [4]))]
    lists = [[x] for x in samples] + [[], samples, samples[::-1], [samples[0].prompt]]
    assert len({runs.hash_of(items) for items in lists}) == len(lists)

def test_11_a_run_that_starts_from_another_gives_its_rounds_and_its_table(alone, tmp_path, capsys):
    whole, new = before("round-1", alone, tmp_path), tmp_path / "new"  # its own round is still to come
    assert dice.main(["--start-from", str(whole), "--out", str(new), "--rounds", "1", "--chunk", "6"]) == 0
    out = capsys.readouterr().out
    for name in ("round-1", "evaluation"):
        assert differences(alone / name, new / name) == []
    assert not {"base", "sft", "dpo"} & {path.name for path in new.iterdir()}
    trained = {row["what"] for row in rows_of(new / "timing.jsonl") if "tokens" in row}
    assert trained == {"round-1"}  # earlier models are judged again, not trained
    table, _ = out.split("\nThe report, with pictures and pairs: ")
    assert "| sft |" in out and table in (alone / "report.md").read_text()
    assert table in (new / "report.md").read_text()

def test_11_a_run_cannot_start_from_one_that_has_no_models_yet(alone, tmp_path, capsys):
    unfinished = before("dpo", alone, tmp_path)
    assert dice.main(["--start-from", str(unfinished), "--out", str(tmp_path / "new")]) == 2
    assert "has no dpo yet; finish that run first" in capsys.readouterr().err

def test_a_round_reports_what_shows_a_collapse(alone):
    [row] = [row for row in rows_of(alone / "metrics.jsonl") if "alpha" in row]
    samples = rows_of(alone / "round-1" / "samples.jsonl")
    kl = np.mean([x["logprob"] - x["prev_logprob"] for x in samples])
    identical = 1 - len({(x["prompt"], x["text"]) for x in samples}) / len(samples)
    assert row["kl_to_previous"] == pytest.approx(kl) and row["identical"] == pytest.approx(identical)
    assert 0 <= row["offline_agreement"] <= 1 and "offline agreement" in (alone / "report.md").read_text()

def test_6_an_arm_that_changes_the_first_models_is_refused_and_other_work_is_not_taken_for_done(
        alone, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # work() silences both
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(ablations, "ARMS", {"new": {"gamma": 0.0}, "other": {"sft_steps": 3}})
    place = partial(ablations.directory, tmp_path, 0)
    shutil.copytree(alone, place(None))
    with pytest.raises(files.InputError, match="--sft-steps"):
        ablations.work(tmp_path, 0, "other")
    assert not place("other").exists()
    places, root = [place("new")], tmp_path / "code"
    monkeypatch.setitem(ablations.ARMS, "new", {"gamma": 0.5})  # other settings under the name of an arm
    places.append(place("new"))
    shutil.copytree(ablations.ROOT / "data", root / "data")
    shutil.copy(ablations.ROOT / "dice.py", root)
    monkeypatch.setattr(ablations, "ROOT", root)  # other code
    for name in ("dice.py", "data/runs.py"):
        (root / name).write_text((root / name).read_text() + "# changed")
        places.append(place("new"))
    (root / "data/plan.py").write_text("# the plan may change")
    assert len(set(places)) == 4 and place("new") == places[-1]

def test_6_an_arm_takes_over_the_first_round_s_answers_and_ends_as_if_it_had_made_them(
        alone, tmp_path, monkeypatch):
    for name in ("stderr", "stdout"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # work() silences both
    monkeypatch.setattr(ablations, "ARMS", {"DICE": {"rounds": 1}, "arm": {"rounds": 2, "gamma": 0.25}})
    place = partial(ablations.directory, tmp_path / "study", 0)
    shutil.copytree(alone, place(None))
    shutil.rmtree(place(None) / "round-1")
    (place(None) / "evaluation/round-1.jsonl").unlink()
    argv = ["--start-from", str(place(None)), "--device", "cpu"]
    assert dice.main([*argv, "--rounds", "2", "--gamma", "0.25", "--out", str(tmp_path / "by itself")]) == 0
    assert dice.main([*argv, "--rounds", "1", "--out", str(place("DICE"))]) == 0
    real, drawn = dice.generate, []

    def counted(*args, stream, **more):
        drawn.append(stream)
        return real(*args, stream=stream, **more)

    monkeypatch.setattr(dice, "generate", counted)
    ablations.work(tmp_path / "study", 0, "arm")
    assert 2 in drawn and 1 not in drawn  # nothing was drawn for round 1
    for path in (tmp_path / "by itself").rglob("*"):
        if path.is_file() and path.name not in ("settings.json", "timing.jsonl", ".lock"):
            copy = place("arm") / path.relative_to(tmp_path / "by itself")
            assert copy.read_bytes() == path.read_bytes(), path

# --------------------------------------------------------- Numbers that go wrong, and memory that runs out
def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_pairs(alone, tmp_path, monkeypatch, capsys):
    real, steps, run = dice.accumulate, [], before("dpo", alone, tmp_path)
    def spoiled(*args):
        steps.append(1)
        return real(*args) | ({"loss": math.nan} if len(steps) == 3 else {})
    monkeypatch.setattr(dice, "accumulate", spoiled)
    assert small(tmp_path) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "dpo, step 3: loss nan" in told and "dpo-not-finite.jsonl" in told
    rows = rows_of(run / "dpo-not-finite.jsonl")
    assert len(rows) == 2 * 8 and all(math.isfinite(x["logprob"] + x["ref_logprob"]) for x in rows)
    kept = list((run / "partial" / "dpo.2.0-of-1").glob("*.safetensors"))
    assert len(kept) == 20 and all(x.isfinite().all() for path in kept for x in load_file(path).values())

def little_memory(limit, monkeypatch):
    """Let memory run out above `limit` tokens in one pass; a list of the passes that did fit."""
    real, real_continued, seen = dice.sequence_logprobs, dice.continued_logprobs, []
    def take(tokens):
        seen.append(tokens)
        if seen[-1] > limit:
            raise torch.OutOfMemoryError(f"tried to allocate {seen.pop()}")
    def whole(model, prompts, answers):
        take(sum(map(len, prompts + answers)))
        return real(model, prompts, answers)
    def continued(model, prompts, last, rows, answers):
        take(len(rows) * (prompts.longest + max(map(len, answers))))
        return real_continued(model, prompts, last, rows, answers)
    monkeypatch.setattr(dice, "sequence_logprobs", whole)
    monkeypatch.setattr(dice, "continued_logprobs", continued)
    return seen

def test_out_of_memory_halves_the_pass_and_changes_no_result(tmp_path, monkeypatch, capsys):
    weights, scores = [], []
    for limit in (10**9, 200):
        run = Bench(tmp_path / str(limit), batch=8, epochs=2, train_tokens=1000, score_tokens=1000)
        pairs = random_pairs(run.net, 16)
        with monkeypatch.context() as patch:
            seen = little_memory(limit, patch)
            answers = dice.answers_of(pairs)
            scores.append(run.map("scores", dice.answer_logprobs, answers, run.net, "score_tokens"))
            weights.append(train_dpo(run, pairs, steps=4))
        assert len(run.metrics) == 4 and max(seen) <= limit
        assert (max(run.budget["score_tokens"], run.budget["train_tokens"]) < 400) == (limit == 200)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=0)
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    told = capsys.readouterr().err  # when it is halved, and not in every step
    assert 0 < told.count("dpo training: out of memory; again with --train-tokens") < 8
    assert 0 < told.count("dpo scores: out of memory; again with --score-tokens") < 8

def test_what_a_step_had_added_up_before_memory_ran_out_is_not_counted_twice(tmp_path, monkeypatch):
    norms, cramped = [], fails_at(2, dice.sequence_logprobs, torch.OutOfMemoryError())
    for function in (dice.sequence_logprobs, cramped):
        monkeypatch.setattr(dice, "sequence_logprobs", function)
        run = Bench(tmp_path, batch=8, train_tokens=200)
        train_dpo(run, random_pairs(run.net, 8), steps=1)
        norms.append(run.metrics[0]["grad_norm"])
    assert len(cramped.calls) > 3 and norms[0] == pytest.approx(norms[1], rel=1e-4)

def test_a_sharded_model_that_ran_out_of_memory_is_loaded_anew(tmp_path, monkeypatch):
    """FSDP cannot go on after a pass that broke off: its gradients would be wrong from then on."""
    real, pairs, results, loaded = dice.Layer.attention, random_pairs(network(LLAMA), 16), [], []
    for fails in (False, True):
        run, passes = Bench(tmp_path, batch=8, train_tokens=400, epochs=2, offload="no", dtype="bfloat16"), []
        def load(source, train=False, run=run):
            loaded.append(source)
            net = network(LLAMA)
            models.shard(net, run.settings, "cpu")
            return net
        def attention(self, x, *args, fails=fails, passes=passes):
            passes.append(self.index)
            y = real(self, x, *args)
            if fails and passes.count(1) == 3 and self.index == 1:
                y.register_hook(fails_at(1, None, torch.OutOfMemoryError()))  # in the backward pass
            return y
        run.load = load
        monkeypatch.setattr(dice.Layer, "attention", attention)
        results.append((train_dpo(run, pairs, steps=4), [row["loss"] for row in run.metrics[-4:]]))
    assert run.budget["train_tokens"] == 200 and len(loaded) == 3
    assert results[0][1] == pytest.approx(results[1][1], abs=0.02) and results[0][1][-1] < 0.6
    assert float((results[0][0] - results[1][0]).abs().mean()) < 5e-4

def test_a_sharded_model_is_gone_before_the_next_one_is_loaded():
    net = network(LLAMA)
    models.shard(net, settings(offload="no"), "cpu")
    net(torch.tensor([[5, 6]])).sum().backward()
    kept = weakref.ref(net.layers[0].qkv)
    del net
    runs.free_last_model()
    assert kept() is None

def test_a_pair_too_large_for_memory_is_named(tmp_path, monkeypatch):
    run = Bench(tmp_path, batch=4, train_tokens=100, score_tokens=100)
    pairs = random_pairs(run.net, 4)
    little_memory(3, monkeypatch)
    with pytest.raises(InputError, match="dpo training: out of memory with one alone, of .* on the prompt '"):
        train_dpo(run, pairs, steps=1)
    with pytest.raises(InputError, match="dpo scores: out of memory with one alone, of .* on the prompt '"):
        run.map("scores", dice.answer_logprobs, [pairs[0].chosen], run.net, "score_tokens")

def test_out_of_memory_in_sampling_takes_fewer_rows_and_gives_the_same(alone, tmp_path, monkeypatch, capsys):
    real, run = dice.generate, before("round-1", alone, tmp_path)
    def cramped(*args, rows, **about):
        if rows > 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(*args, rows=rows, **about)
    monkeypatch.setattr(dice, "generate", cramped)
    monkeypatch.setattr(dice, "train", fails_at(1, None, Killed()))
    with pytest.raises(Killed):
        small(tmp_path)
    assert "again with --rows 20\n" in capsys.readouterr().err
    assert tokens_of(run) == tokens_of(alone)

def test_other_runtime_errors_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(dice, "continued_logprobs", fails_at(1, None, RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        Bench(tmp_path).map("scores", dice.answer_logprobs, random_samples(), network(LLAMA), "score_tokens")

# --------------------------------------------------------------------------------- Precision and processes
@pytest.mark.parametrize("affinity, quota, cores", [
    (8, "max 100000", 8), (8, "250000 100000", 2), (1, "400000 100000", 1), (8, "50000 100000", 1),
    (3, None, 3)])
def test_cores_that_a_process_may_use_are_those_of_its_affinity_and_quota(
        affinity, quota, cores, monkeypatch):
    def read_text(path):
        if str(path) == "/sys/fs/cgroup/group/cpu.max" and quota:
            return quota + "\n"
        if str(path) == "/proc/self/cgroup":
            return "9:cpu:/old\n0::/group\n"
        raise FileNotFoundError(path)
    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(affinity)))
    assert processes.usable_cores() == cores

def test_the_tiny_world_runs_on_one_thread_and_others_on_the_cores_that_there_are(tmp_path, monkeypatch):
    before, given = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(runs, "usable_cores", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for model in ("tiny", "other"):
        Bench(tmp_path, model=model)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    Bench(tmp_path, model="other")
    assert given == [1, 5] and torch.get_num_threads() == before

def moved(directory, pairs, steps=20, sharded=False, recompute=False, masters=True, config=LLAMA,
          device="cpu", **changes):
    """How far some steps move the weights of a small network, (parameters,); and the logged rows."""
    net = network(config)
    at_first = torch.cat([p.detach().flatten() for p in net.parameters()])
    run = Bench(directory, net, **dict(batch=8, epochs=20, train_tokens=300, offload="no") | changes)
    net.recompute = recompute
    if sharded:
        models.shard(net, run.settings, device)
    elif not masters:
        run.net = net.bfloat16()
    return train_dpo(run, pairs, steps, lr=1e-5).cpu().float() - at_first, run.metrics

def test_bfloat16_arithmetic_with_float32_masters_follows_float32_training(tmp_path):
    """Of small steps: with masters they end where float32 does, within 3%; on bfloat16 weights they do not
    even go the same way. FSDP2 in float32, activations computed again, and a state in main memory change
    nothing at all; nor does a head that is the embedding."""
    pairs = random_pairs(network(LLAMA), 32)
    for config in (LLAMA, replace(LLAMA, tied=True)):
        plain, _ = moved(tmp_path, pairs, 3, config=config)
        for way in ({"recompute": True}, {"sharded": True}, {"sharded": True, "offload": "all"},
                    {"offload": "moments"}, {"sharded": True, "offload": "moments"}):
            other, _ = moved(tmp_path, pairs, 3, config=config, **way)
            assert torch.equal(other, plain), way
    exact, rows = moved(tmp_path, pairs)
    close, close_rows = moved(tmp_path, pairs, dtype="bfloat16", sharded=True, recompute=True)
    assert float((close - exact).norm() / exact.norm()) < 0.03
    assert close_rows[-1]["loss"] == pytest.approx(rows[-1]["loss"], abs=0.003)
    lost, _ = moved(tmp_path, pairs, masters=False)
    assert float(torch.cosine_similarity(lost, exact, dim=0)) < 0.5

def test_14_offloaded_weights_are_gathered_once_a_step_and_give_the_same_gradients(tmp_path):
    pairs, results = random_pairs(network(LLAMA), 24), []
    for offload in ("no", "all"):
        run, passes = Bench(tmp_path, batch=8, train_tokens=150, offload=offload, dtype="bfloat16"), []
        models.shard(run.net, run.settings, "cpu")
        def loss_fn(model, group, s, run=run, passes=passes):
            passes.append((len(run.metrics), isinstance(model.layers[0].qkv.weight, DTensor)))
            return dice.preference_loss(model, group, s)
        results.append((train_dpo(run, pairs, 3, loss_fn=loss_fn), run.metrics))
        for step in range(3):
            parted = [is_part for number, is_part in passes if number == step]
            assert len(parted) > 2 and parted[0] and any(parted[1:]) == all(parted[1:]) == (offload == "no")
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]

@pytest.fixture
def from_files(alone, tmp_path):
    """Settings of a run from given models and files of the small world."""
    pairs, prompts = tmp_path / "pairs.jsonl", tmp_path / "prompts.jsonl"
    files.write_rows(pairs, tiny.preferences(0))
    files.write_rows(prompts, ({"prompt": text} for text in tiny.training_prompts(0)))
    options = f"--model {alone}/dpo --reference {alone}/sft --preferences {pairs} --prompts {prompts} "
    return (options + "--samples 4 --rounds 1 --steps 5 --batch 3 --train-tokens 100 --lr 1e-4 --chunk 3 "
            "--min-valid 0 --max-new-tokens 32").split()

def test_two_processes_do_what_one_does(from_files, tmp_path):
    """Also where the state of training is in main memory."""
    one = tmp_path / "no-1" / "run"
    for offload, count in (("no", 1), ("no", 2), ("all", 2)):
        place = tmp_path / f"{offload}-{count}"
        codes = exit_codes(kill.start_small(place, [*from_files, "--offload", offload], count))
        assert codes == [0] * count, (place / "log.txt").read_text()[-2000:]
        if count == 1:
            continue
        two = place / "run"
        assert contents(one).keys() == contents(two).keys()
        different = set(differences(one, two)) - {"report.md", "evaluation/round-1.jsonl"}  # rounded
        different -= {"settings.json"} if offload == "all" else set()
        assert different == {"metrics.jsonl", "round-1/policy/model.safetensors"}
        rows = [[row for row in rows_of(run / "metrics.jsonl") if "step" in row] for run in (one, two)]
        assert len(rows[0]) == 5
        for a, b in zip(*rows, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
            assert a["chosen_logprob"] == pytest.approx(b["chosen_logprob"], abs=1e-3)
        weights = [load_file(run / "round-1/policy/model.safetensors") for run in (one, two)]
        torch.testing.assert_close(*weights, atol=1e-4, rtol=0)

def test_a_killed_worker_ends_the_run_and_the_command_goes_on(from_files, tmp_path):
    argv, run = [*from_files, "--steps", "12", "--save-steps", "2", "--epochs", "9"], tmp_path / "run"
    first, worker = kill.start_small(tmp_path, argv, 2)
    kept = [f"partial/round-1.*.{rank}-of-2" for rank in (0, 1)]
    wait_until(lambda: all(list(run.glob(pattern)) for pattern in kept), [first, worker], tmp_path)
    worker.kill()
    assert exit_codes([first]) == [1]
    log = (tmp_path / "log.txt").read_text()
    assert "another process of this run has ended" in log and "Traceback" not in log
    assert exit_codes(kill.start_small(tmp_path, argv, 2)) == [0, 0]
    assert "round-1: goes on after step" in (tmp_path / "log.txt").read_text()
    assert len([row for row in rows_of(run / "metrics.jsonl") if "step" in row]) == 12

def test_8_under_torchrun_an_input_error_is_printed_once(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    assert kill.start(tmp_path, ["--prompts", "nowhere"], torchrun).wait() == 1
    assert (tmp_path / "log.txt").read_text().count("dice.py: nowhere") == 1
