"""What an interrupted, crowded or unlucky run does: it loses nothing, and ends as one that was left alone."""

import errno
import fcntl
import json
import math
import os
import signal
import time
import weakref
from dataclasses import replace

import kill
import numpy as np
import pytest
import torch
from test_dice import LLAMA, Bench, checkpoint, network, random_pairs, random_samples, train_dpo

import dice
import model as models
from data import report, runs, tiny
from model import InputError

assert checkpoint  # a fixture

ARGV = ["--sft-steps", "40", "--sft-lr", "0.01", "--dpo-steps", "9", "--steps", "9", "--samples", "4", "--batch", "4",
        "--rounds", "1", "--min-valid", "0", "--save-steps", "4", "--chunk", "3", "--epochs", "3"]  # fmt: skip
ARGV += ["--filter", "fdpo"]  # the choices of its epochs must survive too


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The directory of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("alone")
    kill.finish(directory, ARGV, small=True)
    return directory / "run"


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The world of kill.SMALL, in this process; a run in tmp_path/run."""
    for name, value in (
        ("SFT_EXAMPLES", 2000),
        ("PREFERENCES", 64),
        ("HELD_OUT", 6),
        ("DICE_PROMPTS", 10),
    ):
        monkeypatch.setattr(tiny, name, value)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return lambda *argv: dice.main([*ARGV, "--out", "run", "--device", "cpu", *argv])


def test_killed_at_any_moment_it_ends_as_if_left_alone(alone, tmp_path):
    """SIGKILL in supervised training, in sampling, in a round's training, and in the middle of a line."""
    run = tmp_path / "run"
    moments = [
        lambda: list(run.glob("partial/sft.*-of-1")),
        lambda: list(run.glob("partial/round-1-samples.*.jsonl")),
        lambda: list(run.glob("partial/round-1.*-of-1")),
    ]
    for reached in moments:
        process = kill.start(tmp_path, ARGV, small=True)
        while not reached():
            assert process.poll() is None, (tmp_path / "log.txt").read_text()[-2000:]
            time.sleep(0.002)
        process.kill()
        process.wait()
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"stage": "sft", "st')
    (run / ".policy.0123.tmp").mkdir()  # what SIGKILL leaves of a checkpoint
    (run / ".policy.0123.tmp" / "model.safetensors").write_bytes(b"half")
    kill.finish(tmp_path, ARGV, small=True)
    assert kill.differences(alone, run) == []
    log = (tmp_path / "log.txt").read_text()
    assert log.count("goes on where it stopped") == 3 and "sft: goes on after step" in log
    assert not (run / "partial").exists()


@pytest.mark.parametrize("number, moment", [(signal.SIGINT, "sampling"), (signal.SIGTERM, "training")])
def test_ctrl_c_and_sigterm_stop_at_a_safe_point(
    number, moment, alone, small, tmp_path, monkeypatch, capsys
):
    log, whole = dice.Run.log, dice.Run.in_chunks

    def stop_in_training(self, row):
        if moment == "training" and (row["stage"], row.get("step")) == ("round-1", 2):
            os.kill(os.getpid(), number)
        log(self, row)

    def stop_in_sampling(self, what, load, items, size, work, answers=1):
        def stopping(model, chunk, update):
            if moment == "sampling" and what == "round-1 samples" and chunk[0] is not items[0]:
                os.kill(os.getpid(), number)
            return work(model, chunk, update)

        return whole(self, what, load, items, size, stopping, answers)

    with monkeypatch.context() as patch:
        patch.setattr(dice.Run, "log", stop_in_training)
        patch.setattr(dice.Run, "in_chunks", stop_in_sampling)
        assert small() == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert signal.getsignal(number) not in (None, signal.SIG_IGN) and not runs.STOP
    left = {path.name for path in (tmp_path / "run" / "partial").iterdir()}
    if moment == "training":  # the state after the very step it was stopped in
        assert "round-1.2.0-of-1" in left
    else:
        assert left == {"round-1-samples.0.jsonl"}
    assert small() == 0
    assert kill.differences(alone, tmp_path / "run") == []


def test_a_finished_run_is_told_again_at_once(alone, small, tmp_path, capsys, monkeypatch):
    os.rename(alone, tmp_path / "run")
    monkeypatch.setattr(dice, "generate", None)
    monkeypatch.setattr(dice, "train", None)
    try:
        assert small() == 0
    finally:
        os.rename(tmp_path / "run", alone)
    assert "round-1" in capsys.readouterr().out


def test_other_settings_data_or_processes_are_refused(small, checkpoint, tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    row = '{"prompt": "Hello", "chosen": "Good day.", "rejected": "Go."}\n'
    data.write_text(row)
    argv = ["--model", str(checkpoint), "--preferences", str(data), "--rounds", "0", "--dpo-steps", "1"]
    argv += ["--filter", "none", "--sft-steps", "1"]
    assert small(*argv) == 0
    before = kill.contents(tmp_path / "run")
    capsys.readouterr()
    assert small(*argv, "--beta", "0.2", "--seed", "5") == 2
    told = capsys.readouterr().err
    assert "--beta 0.1, now 0.2; --seed 0, now 5" in told and len(told.splitlines()) == 1
    data.write_text(row + row)
    assert small(*argv) == 2 and "contents of --preferences have changed" in capsys.readouterr().err
    data.write_text(row)
    with open(tmp_path / "run" / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert small(*argv) == 2 and "another process is at work" in capsys.readouterr().err
    assert kill.contents(tmp_path / "run") == before
    (tmp_path / "run" / "settings.json").unlink()
    assert small(*argv) == 2 and "holds files already" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["append", "rename", "tensors"])
def test_a_full_disk_ends_the_run_and_what_is_done_is_kept(
    what, alone, small, tmp_path, monkeypatch, capsys
):
    """The disk is full at the 70th line, the 7th directory, the 50th file of tensors: in the middle."""
    full, calls = OSError(errno.ENOSPC, "No space left on device"), []
    where, name, last = {"append": (runs, "append", 70), "rename": (os, "rename", 7),
                         "tensors": (models, "save_file", 50)}[what]  # fmt: skip
    real = getattr(where, name)

    def until_full(*args, **kwargs):
        calls.append(1)
        if len(calls) == last:
            if what == "tensors":
                raise dice.SafetensorError("Error while serializing: I/O error: No space left on device")
            raise full
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, until_full)
        assert small() == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "the disk is full" in told and len(calls) == last
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert small() == 0 and kill.differences(alone, tmp_path / "run") == []


def test_a_dry_run_plans_and_writes_nothing(small, checkpoint, tmp_path, capsys):
    assert small("--dry-run") == 0
    out = capsys.readouterr().out
    assert "256 held out" not in out and "56 offline pairs and 8 held out" in out
    for word in ("prompts", "parameters", "stages", "time", "disk", "memory", "GB"):
        assert word in out
    assert not (tmp_path / "run").exists()
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "x " * 500}) + "\n")
    assert small("--dry-run", "--prompts", str(long)) == 2 and "context of 128" in capsys.readouterr().err


def test_a_dry_run_refuses_a_disk_too_small(small, monkeypatch, tmp_path, capsys):
    usage = runs.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert small("--dry-run") == 2 and "of disk" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- numbers that go wrong


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_pairs(
    small, tmp_path, monkeypatch, capsys
):
    real, steps = dice.mean_gradient, []

    def spoiled(model, losses_of, items, settings, budget):
        row = real(model, losses_of, items, settings, budget)
        if losses_of is not dice.sft_losses:
            steps.append(1)
        return row | {"loss": math.nan} if len(steps) == 3 else row

    monkeypatch.setattr(dice, "mean_gradient", spoiled)
    assert small("--filter", "none") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "dpo, step 3: loss nan" in told and "dpo-not-finite.jsonl" in told
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "dpo-not-finite.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 2 * 4 and all(math.isfinite(r["logprob"]) and r["prompt"] for r in rows)
    kept = list((tmp_path / "run" / "partial" / "dpo.2.0-of-1").glob("*.safetensors"))
    assert len(kept) == 20
    assert all(torch.isfinite(x).all() for path in kept for x in models.read_tensors(path).values())


def allocation(limit, monkeypatch):
    """Let memory run out above `limit` padded tokens in one pass."""
    real, real_continued, seen = dice.sequence_logprobs, dice.continued_logprobs, []

    def take(tokens):
        if tokens > limit:
            raise torch.OutOfMemoryError(f"tried to allocate {tokens}")
        seen.append(tokens)

    def small_memory(model, prompts, answers):
        take(len(prompts) * max(len(p) + len(a) for p, a in zip(prompts, answers)))
        return real(model, prompts, answers)

    def small_memory_continued(model, prompts, last, rows, answers):
        take(len(rows) * (prompts.used + max(map(len, answers))))
        return real_continued(model, prompts, last, rows, answers)

    monkeypatch.setattr(dice, "sequence_logprobs", small_memory)
    monkeypatch.setattr(dice, "continued_logprobs", small_memory_continued)
    return seen


def test_out_of_memory_halves_the_pass_and_changes_no_result(monkeypatch, capsys):
    net, weights, scores = network(LLAMA), [], []
    for limit in (10**9, 200):
        seen = allocation(limit, monkeypatch)
        run = Bench(batch=8, epochs=2, train_tokens=10**4)
        pairs = random_pairs(net, 16)
        samples = [x for p in pairs for x in (p.chosen, p.rejected)]
        scores.append(dice.score(net, samples, dice.Budget(10**4, "scoring")))
        trained = network(LLAMA)
        train_dpo(run, trained, pairs, lr=1e-3, steps=4)
        weights.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
        assert len(run.rows) == 4 and max(seen) <= limit
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=0)
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    told = [line for line in capsys.readouterr().err.split("\n") if "out of memory in" in line]
    assert (
        0 < sum("training" in line for line in told) < 8
    )  # said when it is halved, and not in every step


def test_what_a_step_had_added_up_before_memory_ran_out_is_not_counted_twice(monkeypatch):
    real, pairs, norms, calls = dice.sequence_logprobs, random_pairs(network(LLAMA), 8), [], []

    def second_pass_fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return real(*args)

    for function in (real, second_pass_fails):
        monkeypatch.setattr(dice, "sequence_logprobs", function)
        run = Bench(batch=8, train_tokens=200)
        train_dpo(run, network(LLAMA), pairs, lr=1e-3, steps=1)
        norms.append(run.rows[0]["grad_norm"])
    assert len(calls) > 3 and norms[0] == pytest.approx(norms[1], rel=1e-4)


class Lost(torch.autograd.Function):
    """Memory runs out in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError


def test_a_sharded_model_that_ran_out_of_memory_is_loaded_anew(monkeypatch):
    """FSDP cannot be gone on with after a pass that broke off: its gradients would be wrong from then on."""
    real, pairs, results = dice.Layer.attention, random_pairs(network(LLAMA), 16), []
    for fails in (False, True):
        run, passes = Bench(batch=8, train_tokens=400, epochs=2, offload="no"), []
        run.settings.dtype = "bfloat16"

        def load(directory, training, run=run):
            net = network(LLAMA)
            dice.shard(net, run.settings, "cpu")
            return net

        def attention(self, x, *args, fails=fails, passes=passes):
            passes.append(self.index)
            y = real(self, x, *args)
            return Lost.apply(y) if fails and passes.count(1) == 3 and self.index == 1 else y

        run.load = load
        monkeypatch.setattr(dice.Layer, "attention", attention)
        net = dice.train_from(
            run, "dpo", "", dice.preference_losses, pairs, lr=1e-3, steps=4, epochs=2, batch=8
        )
        weights = torch.cat([dice.whole(p.detach()).flatten() for p in net.parameters()])
        results.append((weights, [row["loss"] for row in run.rows[-4:]]))
    assert run.train_budget.tokens < 400
    assert results[0][1] == pytest.approx(results[1][1], abs=0.02) and results[0][1][-1] < 0.6
    assert float((results[0][0] - results[1][0]).abs().mean()) < 5e-4


def test_a_sharded_model_is_gone_before_the_next_one_is_loaded():
    net = network(LLAMA)
    dice.shard(net, Bench(offload="no").settings, "cpu")
    net(torch.tensor([[5, 6]])).sum().backward()
    kept = weakref.ref(net.layers[0].qkv)
    del net
    runs.free_last_model()
    assert kept() is None


def test_a_pair_too_large_for_memory_is_named(monkeypatch):
    net = network(LLAMA)
    pairs = random_pairs(net, 4)
    allocation(3, monkeypatch)
    with pytest.raises(
        InputError, match="out of memory in training with one alone, of .* tokens, on the prompt"
    ):
        train_dpo(Bench(batch=4), net, pairs, lr=1e-3, steps=1)
    with pytest.raises(InputError, match="out of memory in scoring"):
        dice.score(net, [pairs[0].chosen], dice.Budget(100, "scoring"))


def test_out_of_memory_in_sampling_takes_fewer_rows_and_gives_the_same(
    alone, small, tmp_path, monkeypatch, capsys
):
    real = dice.generate

    def cramped(*args, rows, **options):
        if rows > 16:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return real(*args, rows=rows, **options)

    monkeypatch.setattr(dice, "generate", cramped)
    assert small() == 0
    assert "from here on with 16 sequences in flight" in capsys.readouterr().err
    assert (tmp_path / "run/round-1/samples.jsonl").read_bytes() == (
        alone / "round-1/samples.jsonl"
    ).read_bytes()


def test_other_runtime_errors_keep_their_traceback(monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(dice, "continued_logprobs", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        dice.score(network(LLAMA), random_samples(), dice.Budget(100, "scoring"))


def test_warnings_come_when_they_should_and_only_then():
    good = {"offline_agreement": 0.6, "answer_chars": 100, "truncated": 0.01}
    assert list(report.warnings(good, good)) == []
    for change, told in (
        ({"offline_agreement": 0.5}, "agrees with 50%"),
        ({"answer_chars": 160}, "from 100 to 160 characters"),
        ({"truncated": 0.3}, "30% of the answers are cut"),
    ):
        [warning] = report.warnings({**good, **change}, good)
        assert told in warning
    assert list(report.warnings({**good, "offline_agreement": None}, good)) == []


def test_a_round_reports_what_shows_a_collapse(alone):
    [row] = [row for row in runs.whole_rows(alone / "metrics.jsonl") if "alpha" in row]
    samples = runs.whole_rows(alone / "round-1" / "samples.jsonl")
    assert row["kl"] == pytest.approx(
        np.mean([x["policy_logprob"] - x["reference_logprob"] for x in samples])
    )
    different = {(x["prompt"], x["text"]) for x in samples}
    assert row["identical"] == pytest.approx(1 - len(different) / len(samples))
    assert 0 <= row["offline_agreement"] <= 1
    assert "offline agreement" in (alone / "report.md").read_text()


def test_half_a_line_is_taken_out_and_whole_rows_stay(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": "\xc3')
    assert runs.whole_rows(path) == [{"a": 1}, {"a": 2}]
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n'
    assert runs.whole_rows(tmp_path / "none.jsonl") == []


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    runs.write(path, "first")

    def broken(scratch):
        scratch.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.write_file(path, broken)
    assert path.read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


# ------------------------------------------------------------------------------------- processes and precision


def moved(
    pairs, steps=100, dtype="float32", sharded=False, recompute=False, masters=True, offload="no",
    config=LLAMA, device="cpu",
):  # fmt: skip
    """How far 100 steps move the weights of a small network, (parameters,); and the logged rows."""
    net = network(config)
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    run = Bench(batch=8, epochs=20, train_tokens=300)
    run.settings.dtype, run.settings.offload, net.recompute = dtype, offload, recompute
    if sharded:
        dice.shard(net, run.settings, device)
    elif not masters:
        net = net.bfloat16()
    train_dpo(run, net, pairs, lr=1e-5, steps=steps)
    after = torch.cat([dice.whole(p.detach()).cpu().float().flatten() for p in net.parameters()])
    return after - before, run.rows


def test_bfloat16_arithmetic_with_float32_masters_follows_float32_training():
    """100 small steps: with masters they end where float32 does, within 3%; on bfloat16 weights they do not
    even go the same way. FSDP2 in float32, activations worked out again, and what is trained kept in main
    memory, change nothing at all; nor does a head that is the embedding."""
    pairs = random_pairs(network(LLAMA), 64)
    ways = {"recompute": True}, {"sharded": True}, {"sharded": True, "offload": "yes"}
    for config in (LLAMA, replace(LLAMA, tied=True)):
        plain = moved(pairs, 10, config=config)[0]
        for way in ways:
            torch.testing.assert_close(moved(pairs, 10, config=config, **way)[0], plain, atol=1e-7, rtol=0)
    exact, rows = moved(pairs)
    close, close_rows = moved(pairs, dtype="bfloat16", sharded=True, recompute=True)
    assert float((close - exact).norm() / exact.norm()) < 0.03
    assert close_rows[-1]["loss"] == pytest.approx(rows[-1]["loss"], abs=0.003)
    lost, _ = moved(pairs, masters=False)
    assert float(torch.cosine_similarity(lost, exact, dim=0)) < 0.5


@pytest.fixture
def from_files(alone, tmp_path):
    """Settings of a run from given models and files of the small world."""
    small = {"SFT_EXAMPLES": 2000, "PREFERENCES": 64, "HELD_OUT": 6, "DICE_PROMPTS": 10}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(tiny, name, value)
        runs.write_rows(tmp_path / "pairs.jsonl", tiny.preferences(0))
        runs.write_rows(
            tmp_path / "prompts.jsonl", ({"prompt": text} for text in tiny.training_prompts(0))
        )
    return ["--model", str(alone / "dpo"), "--reference", str(alone / "sft"), "--samples", "4", "--rounds", "1",
            "--preferences", str(tmp_path / "pairs.jsonl"), "--prompts", str(tmp_path / "prompts.jsonl"),
            "--steps", "5", "--batch", "3", "--train-tokens", "100", "--lr", "1e-4", "--chunk", "2", "--min-valid", "0"]  # fmt: skip


def test_two_processes_do_what_one_does(from_files, tmp_path):
    kill.finish(tmp_path / "one", from_files, small=True)
    kill.finish(tmp_path / "two", from_files, small=True, processes=2)
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    assert kill.contents(one).keys() == kill.contents(two).keys()
    for name in (
        "settings.json",
        "round-1/samples.jsonl",
        "round-1/pairs.jsonl",
        "round-1/policy/config.json",
    ):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    rows = [
        [row for row in runs.whole_rows(run / "metrics.jsonl") if "step" in row] for run in (one, two)
    ]
    assert len(rows[0]) == len(rows[1]) == 5
    for a, b in zip(*rows):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["chosen_logprob"] == pytest.approx(b["chosen_logprob"], abs=1e-3)
    config = models.read_config(one / "round-1" / "policy")
    weights = [models.read_weights(run / "round-1" / "policy", config) for run in (one, two)]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-4, rtol=0)


def test_a_killed_worker_ends_the_run_and_the_command_goes_on(from_files, tmp_path):
    argv = [*from_files, "--steps", "20", "--save-steps", "2", "--epochs", "9"]
    process = kill.start(tmp_path, argv, small=True, processes=2)
    kept = [f"partial/round-1.*.{rank}-of-2" for rank in (0, 1)]
    while not all(list((tmp_path / "run").glob(pattern)) for pattern in kept):
        assert process.poll() is None, (tmp_path / "log.txt").read_text()[-2000:]
        time.sleep(0.002)
    worker = next(pid for pid in children(process.pid) if environment(pid).get("RANK") == "1")
    os.kill(worker, signal.SIGKILL)
    assert process.wait(60) != 0
    log = (tmp_path / "log.txt").read_text()
    assert "another process of this run has ended" in log or f"(pid: {worker})" in log
    kill.finish(tmp_path, argv, small=True, processes=2)
    assert "round-1: goes on after step" in (tmp_path / "log.txt").read_text()
    assert len([row for row in runs.whole_rows(tmp_path / "run" / "metrics.jsonl") if "step" in row]) == 20


def children(pid):
    listed = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [child for child in listed if f"PPid:\t{pid}\n" in status(child)]


def status(pid):
    try:
        with open(f"/proc/{pid}/status") as file:
            return file.read()
    except OSError:
        return ""


def environment(pid):
    with open(f"/proc/{pid}/environ") as file:
        return dict(entry.split("=", 1) for entry in file.read().split("\0") if "=" in entry)


def test_a_run_killed_while_its_settings_were_written_begins_again(small, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".settings.json.0123.tmp").write_text('{"model": "ti')
    run = dice.Run(dice.parse_settings([*ARGV, "--out", "run", "--device", "cpu"])[0])
    run.open()
    run.unlock()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "settings.json", "base"}
