"""data/memory.py: what is kept in main memory, and what fits."""
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_dice import settings

import model as models
from data import memory, processes
from data.files import InputError

@pytest.mark.parametrize("offload, card, free, way, gigabytes", [
    ("auto", 200e9, 17e9, "no", 16.1), ("auto", 85e9, 90e9, "moments", 89), ("auto", 24e9, 160e9, "all", 153),
    ("no", 24e9, 17e9, "no", 16.1), ("all", 200e9, 160e9, "all", 153), ("moments", 24e9, 90e9, "moments", 89),
    ("auto", 200e9, 16e9, None, "16.1 GB with --offload no, 89.* all; 16.0 GB are free"),
    ("auto", 85e9, 80e9, None, "memory: 89.. GB with --offload moments, 153.* all; 80.0"),
    ("all", 85e9, 90e9, None, "memory: 153.. GB with --offload all; 90.0")])
def test_14_the_state_of_training_is_where_it_fits(offload, card, free, way, gigabytes, monkeypatch):
    """Of Llama-3 8B in bfloat16, which is read (16 GB) beside what stays in main memory: 2 x 36.5 GB, pinned,
    and 64 GB."""
    about, config = types.SimpleNamespace(name="a card", total_memory=card), models.PRESETS["llama3-8b"].shape
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    if way:
        s = settings(dtype="bfloat16", offload=offload, device="cuda")
        found, needed = memory.choose_offload(s, config, "cuda:0")
        line = memory.machine(replace(s, offload=found), "cuda:0", needed)
        assert line.startswith(f"1 x cuda, a card, {card / 1e9} GB; bfloat16; training takes at most ")
        assert f" of {free / 1e9} GB of main memory (--offload {way}: {models.OFFLOAD[way][1]})" in line
        assert found == way and needed / 1e9 == pytest.approx(gigabytes, rel=0.01)
        s.loads_reference = True  # 16 GB more on the GPU: 64 + 16 + 10 are more than 85
        assert way != "moments" or offload != "auto" or not models.fits_on_gpu(s, 8e9, "cuda:0", 8)
    else:
        with pytest.raises(InputError, match=gigabytes):
            memory.choose_offload(settings(dtype="bfloat16", offload=offload), config, "cuda:0")
    monkeypatch.setattr(memory, "free_memory", lambda: 128e9)
    with pytest.raises(InputError, match="8030 million .* 128.5 GB with --offload no"):  # on the CPU itself
        memory.choose_offload(settings(offload="no"), config, "cpu")
    monkeypatch.setattr(memory, "free_memory", lambda: 129e9)
    assert memory.choose_offload(settings(offload="auto"), config, "cpu") == ("no", 8030261248 * 16)

@pytest.mark.parametrize("name, card, offload, answer", [
    ("llama3-8b", 141e9, "no", "yes"), ("llama3.2-1b", 24e9, "moments", "yes"),
    ("qwen2.5-0.5b", 24e9, "no", "no"), ("gpt2", 24e9, "no", "no"),
    ("smollm2-135m", 4e9, "no", "yes"), ("smollm2-135m", None, "no", "no")])
def test_14_activations_are_kept_where_they_fit(name, card, offload, answer, monkeypatch):
    """With the preset's own sizes. Without a card: in 64 GB of main memory."""
    preset, device = models.PRESETS[name], "cuda:0" if card else "cpu"
    about = types.SimpleNamespace(total_memory=card)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(memory, "free_memory", lambda: 64e9)
    sizes = {key: preset.settings[key] for key in ("train_tokens", "max_tokens") if key in preset.settings}
    s = settings(dtype="bfloat16", offload=offload, **sizes)
    assert memory.choose_recompute(s, preset.shape, device) == answer
    assert memory.choose_recompute(replace(s, recompute="yes"), preset.shape, device) == "yes"

@pytest.mark.parametrize("limit, free", [("900000", 500_000), ("9000000", 1_024_000), ("max", 1_024_000)])
def test_14_free_memory_is_that_of_the_machine_and_of_the_cgroup(limit, free, monkeypatch):
    """What the cgroup uses is 500,000 bytes, of which 100,000 are files that were read."""
    texts = {"/proc/self/cgroup": "0::/group\n", "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 1000 kB\n",
             "memory.max": limit, "memory.current": "500000", "memory.stat": "file 9\ninactive_file 100000\n"}
    found = {str(Path("/sys/fs/cgroup/group", name)): text for name, text in texts.items()}
    monkeypatch.setattr(Path, "read_text", lambda path: found[str(path)])
    assert memory.free_memory() == free

@pytest.mark.parametrize("free, prompt, count, rows", [
    (65e9, 1000, 16, 128), (65e9, 200, 16, 176), (65e9, 1000, 1, 84), (124e9, 1000, 16, 256),
    (1e9, 1000, 16, 16)])
def test_14_rows_of_the_sampler_follow_from_memory_and_from_the_lengths(free, prompt, count, rows):
    """Of Llama-3 8B, whose cache takes 131 kB a token, with answers of 2048 tokens."""
    config = models.PRESETS["llama3-8b"].shape
    assert memory.rows_that_fit(config, torch.bfloat16, prompt, 2048, count, free) == rows

def test_14_memory_that_is_freed_in_one_size_serves_another_unless_the_user_has_chosen(monkeypatch):
    given = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", given.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: None)
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    processes.join_processes("cuda")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    processes.join_processes("cuda")
    assert given == ["expandable_segments:True"]
