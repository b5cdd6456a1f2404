"""data/options.py: how a command line becomes settings, what is refused, and what makes two runs the same."""
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from test_dice import parsed

import dice
import model as models
from data import options, runs
from data.files import InputError
from data.options import TINIEST, option

@dataclass(frozen=True)
class Inner:
    depth: float = option(0.5, "100% of something", TINIEST, 2)

@dataclass
class Outer:
    name: str = option("a", "a choice", choices=("a", "b"))
    inner: Inner = field(default_factory=Inner)
    count: int = option(3, "an integer", 1, identity=False)
    loss_options: dict = field(default_factory=dict)

def test_nested_settings_are_flat_outside():
    s = options.build(Outer, {"depth": 2.0, "name": "b"})
    assert s == Outer("b", Inner(2.0), 3) and options.as_dict(s) == {"name": "b", "depth": 2.0, "count": 3}
    s.loss_options = {"own": 1}
    assert options.as_dict(s)["own"] == 1 and list(options.all_options(Outer)) == ["name", "depth", "count"]

@pytest.mark.parametrize("name, value, told", [
    ("name", "c", "--name c: choose one of a, b"), ("count", 0, "--count 0: must be at least 1"),
    ("depth", 0.0, "--depth 0.0: must be at least 1e-30 and at most 2"),
    ("depth", 2.1, "--depth 2.1: must be"), ("depth", math.nan, "--depth nan"),
    ("count", math.inf, "--count inf: must be at least 1")])
def test_a_value_out_of_its_range_or_choices_is_refused(name, value, told):
    about = options.all_options(Outer)[name]
    options.check_value(name, about.default, about)
    with pytest.raises(InputError, match=told):
        options.check_value(name, value, about)

def test_every_default_and_every_preset_is_in_its_range():
    known = options.all_options(dice.Settings)
    for values in ({}, *(preset.settings for preset in models.PRESETS.values())):
        assert values.keys() <= known.keys()
        for name, about in known.items():
            options.check_value(name, values.get(name, about.default), about)

def test_the_command_line_stands_above_the_loss_above_the_preset_above_the_class(monkeypatch):
    preset = {"beta": 0.3, "lr": 1e-3, "top_p": 0.7}
    monkeypatch.setitem(models.PRESETS, "tiny", models.Preset("", None, preset))
    s = parsed("--lr", 0.5)
    assert (s.lr, s.beta, s.sampling.top_p, s.gamma, s.loss_options) == (0.5, 0.3, 0.7, 0.5, {})
    s = parsed("--loss", "simpo")
    assert s.beta == 2.0 and s.loss_options == {"target_margin": 1.0}
    s = parsed("--loss", "simpo", "--beta", 1, "--target-margin", 3)
    assert s.beta == 1.0 and s.loss_options == {"target_margin": 3.0}
    with pytest.raises(InputError, match="--target-margin 3.0: --loss dpo does not read it"):
        parsed("--target-margin", 3)

def test_13_help_is_in_groups_with_the_values_of_the_chosen_preset(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    def shown(*argv):
        with pytest.raises(SystemExit, match="0"):
            dice.main([*argv, "--help"])
        return capsys.readouterr().out
    text, place = shown("--model", "smollm2-135m-instruct"), 0
    for part in ("In brackets: the value with --model smollm2-135m-instruct", "\nmodel and data:\n",
                 "--prompts", "[data/uf-10k/prompt.json]", "\nthe method:\n", "--samples N ", "[4]\n",
                 "--rejected {worst,random}", "\nlosses:\n", "--loss {dpo,cdpo,", "--beta X ",
                 "--label-smoothing X   of --loss cdpo: ", "\nsampling:\n", "--top-p X", "[0.9]\n",
                 "\ntraining:\n", "[1e-05]\n", "\nfirst stages (SFT and DPO):\n", "\nthe machine:\n",
                 "\n  gpt2                   openai-community/gpt2\n"):
        assert part in text[place:], part
        place = text.index(part, place)
    assert "{'" not in text and "None" not in text
    assert "[1400]" in shown() and "[2.0]" in shown("--loss", "simpo")

def test_17_a_run_is_named_after_the_directory_of_its_model(tmp_path, monkeypatch):
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "deep")
    for model, out in (("..", "out/mine"), (".", "out/deep"), ("../deep/", "out/deep"), ("tiny", "out/tiny")):
        assert parsed("--model", model).out == out

def test_prompts_of_a_preset_belong_to_its_own_preferences():
    uf = models.PRESETS["llama3-8b"].settings["prompts"]
    assert parsed("--model", "llama3-8b").prompts == uf
    assert parsed("--model", "llama3-8b", "--preferences", "mine").prompts == ""
    assert parsed("--model", "llama3-8b", "--preferences", "mine", "--prompts", "p").prompts == "p"

def test_the_settings_of_a_preset_serve_another_model():
    mine = parsed("--model", "mine", "--preset", "llama3-8b", "--lr", "1")
    preset = parsed("--model", "llama3-8b")
    assert (mine.model, mine.reference, mine.lr, mine.out) == ("mine", "", 1.0, "out/mine")
    assert (mine.chat, mine.chunk, mine.prompts) == ("auto", preset.chunk, preset.prompts)
    with pytest.raises(InputError, match="--preset llama: choose one of tiny, llama3-8b"):
        parsed("--model", "mine", "--preset", "llama")

def test_auto_is_decided_once_and_10_alpha_has_one_spelling():
    s = parsed("--alpha", "0")
    assert (s.alpha, s.device, s.dtype, s.out) == ("0.0", "cpu", "float32", "out/tiny")
    spellings = [parsed("--alpha", text).alpha for text in ("0.0", "1x", "auto", "2x", "2.0x", "1e-2")]
    assert spellings == ["0.0", "auto", "auto", "2.0x", "2.0x", "0.01"]
    for bad in ("-1", "x", "nan", "inf", "-1x"):
        with pytest.raises(InputError, match=f"--alpha {bad}: must be auto"):
            parsed(f"--alpha={bad}")

@pytest.mark.parametrize("device", ["abacus", "meta", "cpu:0", "mps", "cuda:x", "cuda:99", "cuda:-1"])
def test_16_a_device_that_no_run_can_use_is_refused(device):
    with pytest.raises(InputError, match=f"--device {device}: "):
        parsed("--device", device)

@pytest.mark.parametrize("node, version, told", [
    (True, "NVRM version: NVIDIA UNIX Kernel Module  550.54.15  Tue Mar", r"driver 550\.54\.15"),
    (True, None, "driver of unknown version"), (False, "535.129.03", r"driver 535\.129\.03"),
    (False, None, None)])  # no GPU at all
def test_14_a_gpu_that_torch_cannot_use_is_named_and_not_silently_the_cpu(node, version, told, monkeypatch):
    """Its driver is read from a file, or asked of nvidia-smi where there is no /dev/nvidia0."""
    exists, read = Path.exists, Path.read_text
    def text_of(path):
        if str(path) == "/proc/driver/nvidia/version" and not version:
            raise FileNotFoundError(path)
        return version if str(path) == "/proc/driver/nvidia/version" else read(path)
    def nvidia_smi(command, **about):
        if not version:
            raise FileNotFoundError(command)
        return subprocess.CompletedProcess(command, 0, version + "\n")
    monkeypatch.setattr(Path, "exists", lambda path: node if str(path) == "/dev/nvidia0" else exists(path))
    monkeypatch.setattr(Path, "read_text", text_of)
    monkeypatch.setattr(subprocess, "run", nvidia_smi)
    def resolved(device="auto"):
        return parsed("--model", "gpt2", "--device", device)
    assert resolved().device == "cpu"  # CUDA_VISIBLE_DEVICES hides it, as for this whole suite
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if told:
        with pytest.raises(InputError, match=f"{told}.*CUDA 13.0, cannot use it.*--device cpu"):
            resolved()
        monkeypatch.setattr(torch.version, "cuda", None)
        with pytest.raises(InputError, match="made for CPUs only"):
            resolved()
    assert resolved("cpu" if told else "auto").device == parsed().device == "cpu"

def test_16_every_number_of_the_command_line_has_a_largest_value_that_torch_and_numpy_bear():
    for name, about in options.all_options(dice.Settings).items():
        if type(about.default) is int:
            with pytest.raises(InputError, match="and at most 1e.18"):
                parsed(options.flag(name), 10**400)
    with pytest.raises(InputError, match=f"--seed {2**64}: "):
        parsed("--seed", 2**64)
    dice.new_model(models.tiny_model()[0], parsed("--seed", 10**18).seed + 1)

def test_16_another_package_named_data_does_not_hide_ours(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").touch()
    root, environment = Path(dice.__file__).parent, os.environ | {"PYTHONPATH": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, root / script, "--help"], cwd=tmp_path, env=environment,
                                stdout=subprocess.DEVNULL) for script in ("dice.py", "data/ultrafeedback.py")]
    assert [process.wait() for process in started] == [0, 0]

@pytest.mark.parametrize("variables", [
    {}, {"RANK": "x"}, {"RANK": "0"}, {"RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}])
def test_16_a_part_of_the_variables_of_torchrun_is_one_line(variables, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    assert dice.main(["--device", "cpu"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "WORLD_SIZE=1: the processes cannot meet" in line and "unset WORLD_SIZE" in line

def differences(old, **changes):
    """What a run with these settings says of an older run's settings.json."""
    run = runs.Run(parsed(), {})
    return run.differences(old, options.as_dict(run.settings) | changes)

def test_10_the_identity_of_a_run_leaves_out_the_machine_and_takes_defaults_for_what_is_absent():
    now = options.as_dict(parsed())
    machine = dict(rows=1, chunk=1, score_tokens=1, train_tokens=1, save_steps=1, rounds=9, device="cuda",
                   out="a", offload="all", recompute="yes")
    assert differences(now, **machine) == [] == differences(now)
    absent = {name: now[name] for name in now if name not in ("gamma", "reward", "rows", "start_from")}
    assert differences(absent) == [] and differences(absent, gamma=0.4) == ["--gamma 0.5, now 0.4"]
    assert differences(now | {"contents of --prompts": "a"}, seed=1) == [
        "contents of --prompts have changed", "--seed 0, now 1"]
    told = ["--was-once-a-setting 3, which this code does not know"]
    assert differences(now | {"was_once_a_setting": 3}) == told
    for name in ("seed", "dtype", "loss", "temperature", "samples", "sft_steps", "steps", "batch"):
        assert len(differences(now, **{name: "other"})) == 1

def write_settings(directory, values):
    directory.mkdir()
    (directory / "settings.json").write_text(json.dumps(values))
    return directory

@pytest.fixture
def base(tmp_path):
    """A run with settings of its own, in a directory; of its files only settings.json."""
    s = parsed("--seed", 4, "--gamma", 0.3, "--loss", "simpo", "--beta", 3, "--temperature", 0.5, "--rows", 7)
    return write_settings(tmp_path / "base", options.as_dict(s) | {"contents of --prompts": "a"})

def test_11_start_from_inherits_what_makes_a_result_and_the_command_line_stands_above_it(base):
    s = parsed("--start-from", base, "--out", "new")
    assert (s.seed, s.gamma, s.loss, s.beta, s.sampling.temperature) == (4, 0.3, "simpo", 3.0, 0.5)
    assert (s.start_from, s.out, s.rows) == (str(base), "new", models.PRESETS["tiny"].settings["rows"])
    assert s.loss_options == {"target_margin": 1.0}
    s = parsed("--start-from", base, "--out", "new", "--gamma", 0.9, "--loss", "cdpo", "--seed", 4)
    assert (s.gamma, s.loss, s.loss_options) == (0.9, "cdpo", {"label_smoothing": 0.1})
    # A run that has itself begun from another: the models are those of the first.
    later = write_settings(base.parent / "later", options.as_dict(s))
    again = parsed("--start-from", later, "--out", "third")
    assert (again.start_from, again.gamma) == (str(base), 0.9)

@pytest.mark.parametrize("argv, told", [
    ("--out new --sft-steps 3", "--sft-steps 3: .* made with 1400"),
    ("--out new --seed 0", "--seed 0: .* made with 4"), ("--out new --dpo-lr 1", "--dpo-lr 1.0: "),
    ("--out new --model gpt2", "--model gpt2: "), ("", "give --out DIR")])
def test_11_start_from_refuses_what_would_change_the_first_models_or_has_no_out(argv, told, base):
    with pytest.raises(InputError, match=told):
        parsed("--start-from", base, *argv.split())
    with pytest.raises(InputError, match="no settings.json in it"):
        parsed("--start-from", base.parent, "--out", "new")
