"""What only a GPU can show. Not collected with the suite, which leaves GPUs alone; on a machine with one:

    python -m pytest -q tests/on_gpu.py
"""
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_dice import LLAMA, Recorded, network, random_ids, random_pairs, sample_all, scores, varlen_attention
from test_runs import moved

import dice
import model as models
from data import files, memory, processes, tiny
from model import Config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DICE = Path(__file__).resolve().parent.parent / "dice.py"
SHAPE = dict(vocab_size=512, context=512, layers=4, width=256, hidden=512)
SHAPES = {"grouped": Config(**SHAPE | {"vocab_size": 3000}, heads=8, kv_heads=2, head_size=64),
          "wide heads": Config(**SHAPE, heads=4, kv_heads=1, head_size=128),
          "gpt2": Config(**SHAPE, heads=4, kv_heads=4, head_size=64, position="learned", norm="layer",
                         mlp="gelu", qkv_bias=True, out_bias=True, mlp_bias=True, tied=True)}
every_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)

def on_gpu(config):
    return network(config).bfloat16().to("cuda")

def random_qkv(config, B, T):
    c = config
    numbers = torch.randn(B, T, c.heads + 2 * c.kv_heads, c.head_size, device="cuda", dtype=torch.bfloat16)
    return numbers.transpose(1, 2).split([c.heads, c.kv_heads, c.kv_heads], dim=1)

@every_shape
def test_varlen_attention_is_what_the_suite_takes_it_for(config):
    cache = dice.KVCache(config, 300, 400, "cuda", torch.bfloat16)
    assert cache.varlen
    cache.k.normal_(), cache.v.normal_()
    cache.longest = 400
    for rows, T in ((1, 1), (7, 1), (300, 1), (5, 9), (2, 70)):
        cache.length = torch.randint(0, 401 - T, (300,), device="cuda")
        q, k, v = random_qkv(config, rows, T)
        cache.prepare(torch.zeros(rows, T, device="cuda"))
        ours, row = cache.attend(2, q, k, v).cpu().float(), torch.arange(rows + 1, dtype=torch.int32)
        exact, *_ = varlen_attention(
            *(x.cpu().flatten(0, 1) for x in (q.transpose(1, 2), cache.k[2], cache.v[2])), row * T, row * 400,
            T, 400, dropout_p=0.0, is_causal=True, return_debug_mask=False,
            seqused_k=cache.length[:rows].cpu().int() + T)
        exact = exact.view(rows, T, *exact.shape[1:]).transpose(1, 2)
        torch.testing.assert_close(ours, exact.float(), atol=0.02, rtol=0.02)

@every_shape
def test_packed_attention_and_its_gradients_are_those_of_each_sequence_alone(config):
    packed = dice.Packed(on_gpu(config), [1, 300, 7, 150])
    assert packed.varlen
    qkv, results = [x.requires_grad_() for x in random_qkv(config, 1, 458)], []
    for packed.varlen in (True, False):
        y = packed.attend(0, *qkv)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), qkv)])
    for ours, exact in zip(*results):
        assert (ours - exact).float().norm() < 0.02 * exact.float().norm()

@every_shape
def test_captured_steps_draw_what_the_steps_draw(config, monkeypatch):
    net, rng = on_gpu(config), np.random.default_rng(0)
    prompts = random_ids(rng, *rng.integers(1, 300, 20), vocab=512)
    for options in ({}, {"top_p": 0.975}, {"temperature": 0.0}):  # of 3000 tokens, about 1024 in the nucleus
        options |= dict(rows=48, max_new_tokens=150, stop_ids=range(4))
        pools, real = [], models.capture_cuda_graph
        def capture(fn, device, graphs):
            graph = real(fn, device, graphs)
            pools.append(graph.pool())
            return graph
        with monkeypatch.context() as patch:
            patch.setattr(models, "capture_cuda_graph", capture)
            captured = sample_all(net, prompts, 8, **options)
            patch.setattr(models, "capture_cuda_graph", Recorded)
            assert sample_all(net, prompts, 8, **options) == captured
        assert len(pools) > 1 and len({*pools}) == 1  # one memory for all
        assert len({len(ids) for ids, _ in captured.values()}) > 5

@every_shape
@torch.no_grad()
def test_log_probs_agree_with_float32_and_with_the_sampler(config):
    """Of greedy answers: each token must be the likeliest in the scoring pass too, within 0.2 nats; summed
    log-probs are those of the CPU in float32 within 0.04 nats a token on average."""
    net, rng = on_gpu(config), np.random.default_rng(0)
    prompts = random_ids(rng, *rng.integers(1, 300, 12), vocab=512)
    found = sample_all(net, prompts, 1, temperature=0, max_new_tokens=100, stop_ids=())
    samples = [dice.Sample(dice.Prompt("", prompts[i]), ids, "") for (i, _), (ids, _) in found.items()]
    for x in samples:
        tokens = torch.tensor([x.prompt.ids + x.tokens], device="cuda")
        logprobs = net.logits(net(tokens))[0].float().log_softmax(-1)[len(x.prompt.ids) - 1:-1]
        drawn = logprobs.gather(1, torch.tensor(x.tokens, device="cuda")[:, None])[:, 0]
        assert float((logprobs.amax(-1) - drawn).max()) < 0.2
    ours, exact = (np.array(scores(m, samples, 2000)) for m in (net, network(config)))
    assert np.mean(np.abs(ours - exact) / [len(x.tokens) for x in samples]) < 0.04

@torch.no_grad()
def test_log_probs_are_those_of_float32_logits():
    """Against float64, with logits of about 20: the sums of the product are not rounded to bfloat16."""
    hidden, weight = (torch.randn(n, 256, device="cuda").bfloat16() for n in (600, 32000))
    targets = torch.randint(32000, (600,), device="cuda")
    def chosen(logits):
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    exact = chosen(hidden.double() @ weight.double().T)
    ours = dice.token_logprobs(SimpleNamespace(head_weight=weight), hidden, targets)
    rounded = chosen((hidden @ weight.T).float())
    assert 100 * (ours - exact).abs().mean() < (rounded - exact).abs().mean()

def test_training_follows_float32_wherever_its_state_is(tmp_path):
    pairs = random_pairs(network(LLAMA), 64)
    exact, _ = moved(tmp_path, pairs)
    for offload in memory.OFFLOAD:
        close, _ = moved(tmp_path, pairs, dtype="bfloat16", sharded=True, recompute=True, offload=offload,
                         device="cuda")
        assert float((close - exact).norm() / exact.norm()) < 0.03, offload

@torch.no_grad()
def test_moments_that_travel_are_those_that_stay():
    """The same steps to the byte; the moments are in pinned main memory between the steps."""
    results = []
    for offload in (False, True):
        generator = torch.Generator("cuda").manual_seed(0)
        weights = [torch.randn(n, 300, device="cuda", generator=generator) for n in (1, 70, 9)]
        weights = [torch.nn.Parameter(weight) for weight in weights]
        optimizer = memory.AdamW(weights, offload, lr=0.1, weight_decay=0.0, fused=True)
        for _ in range(4):
            for p in weights:
                p.grad = torch.randn(p.shape, device="cuda", generator=generator)
            optimizer.step()
        moments = [optimizer.state[p][key] for p in weights for key in memory.MOMENTS]
        assert all(x.is_pinned() == offload != x.is_cuda for x in moments)
        results.append([x.cpu() for x in weights + moments])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

@every_shape
@pytest.mark.parametrize("count", [1, 8])
def test_the_rows_that_are_said_to_fit_do_fit(config, count):
    """All but 3 GB of the GPU is taken. The rows take more than 30% of what is left: they are not too few."""
    processes.join_processes("cuda")
    torch.cuda.empty_cache()
    taken = torch.empty(torch.cuda.mem_get_info()[0] - 3 * 10**9, dtype=torch.uint8, device="cuda")
    assert any(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
    net, rng = on_gpu(replace(config, context=4096)), np.random.default_rng(0)
    prompts = [dice.Prompt("", ids) for ids in random_ids(rng, *rng.integers(100, 2000, 400), vocab=512)]
    sampling = dice.Sampling(max_new_tokens=60)
    rows = memory.rows_in_flight(net, prompts, count, sampling, 10**6)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ids = [prompt.ids for prompt in prompts]
    answers = list(dice.generate(net, ids, count, sampling, stop_ids=range(4), seed=0, rows=rows))
    assert len(answers) == 400 * count and torch.cuda.max_memory_allocated() - before > 0.3 * 3e9
    del taken

def test_the_driver_of_the_gpu_is_known():
    assert processes.nvidia_driver().replace(".", "").isdigit()

@pytest.mark.parametrize("count", [0, torch.cuda.device_count()])
@pytest.mark.parametrize("offload", memory.OFFLOAD)
def test_a_run_from_a_name_to_its_last_checkpoint(count, offload, tmp_path):
    """Without torchrun, and with a process for each GPU."""
    files.write_rows(tmp_path / "pairs.jsonl", tiny.preferences(0)[:200])
    files.write_rows(tmp_path / "prompts.jsonl", ({"prompt": x} for x in tiny.training_prompts(0)[:24]))
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={count}"] if count else []
    argv = ("--model smollm2-135m --weights dummy --sft-steps 3 --sft-batch 4 --batch 4 --dpo-steps 3 "
            "--steps 3 --rounds 2 --samples 8 --chunk 8 --min-valid 0 --max-new-tokens 200 "
            f"--offload {offload} --out out --preferences pairs.jsonl --prompts prompts.jsonl").split()
    command = [sys.executable, *launch, DICE, *argv]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out/round-2/policy/model.safetensors").exists()
