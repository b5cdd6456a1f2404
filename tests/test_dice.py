"""The method against something simpler: float64 loops, the uncached forward, worked numbers, transformers.
Then whole runs: what they leave, what they refuse, and what odd texts and rewards do to them."""
import json
import math
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import dice
import model as models
from data import files, jsonl, options, plots, report, runs, tiny
from data.files import InputError
from data.options import TINIEST
from data.processes import batches, share
from model import Config

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/real")

LLAMA = Config(vocab_size=90, context=64, layers=2, width=32, heads=4, kv_heads=2, head_size=10, hidden=40)
GPT2 = replace(LLAMA, kv_heads=4, head_size=8, hidden=64, position="learned", norm="layer", mlp="gelu",
               qkv_bias=True, out_bias=True, mlp_bias=True, tied=True)
QWEN2 = replace(LLAMA, kv_heads=1, head_size=8, qkv_bias=True, tied=True, rope_theta=1e6)
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LLAMA3 = replace(LLAMA, head_size=16, rope_theta=5e5, rope_scaling=SCALING)
WIDE = Config(vocab_size=512, context=256, layers=6, width=128, heads=8, kv_heads=2, head_size=16, hidden=352)
QWEN3 = replace(LLAMA, head_size=12, qk_norm=True, tied=True, rope_theta=1e6)
FAMILIES = pytest.mark.parametrize("config", (LLAMA, GPT2, QWEN2, QWEN3, LLAMA3),
                                   ids=("llama", "gpt2", "qwen2", "qwen3", "llama3"))
same = torch.testing.assert_close

def network(config, seed=0):
    """Random weights large enough for sharp and varied distributions."""
    net = dice.new_model(config, seed)
    for p in net.parameters():
        generator = torch.Generator().manual_seed(seed + p.numel())
        p.data = torch.randn(p.shape, generator=generator) * 0.15 + (p.data == 1)
    return net

def random_ids(rng, *lengths, vocab=90):
    return [rng.integers(4, vocab, n).tolist() for n in lengths]

def scores(net, samples, tokens=500):
    found = dict(dice.answer_logprobs(net, samples, tokens))
    return [found[i] for i in range(len(samples))]

def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

# ------------------------------------------------------------------------------------- Transformer and cache
def steps_of(net, tokens, sizes):
    """The logits of these tokens (B, T), read in chunks of these sizes with a cache."""
    cache, parts, start = dice.KVCache(net.config, *tokens.shape, "cpu", net.dtype), [], 0
    for size in sizes:
        parts.append(net.logits(net(tokens[:, start:start + size], cache)))
        cache.length, cache.longest, start = cache.length + size, cache.longest + size, start + size
    return torch.cat(parts, dim=1)

@FAMILIES
@torch.no_grad()
def test_cached_logits_equal_uncached_for_prefill_single_steps_and_a_second_chunk(config):
    net, tokens = network(config), torch.tensor(random_ids(np.random.default_rng(1), 24, 24, 24))
    same(steps_of(net, tokens, (7, 5, 1, 1, 8, 1, 1)), net.logits(net(tokens)), atol=2e-5, rtol=1e-4)

def token_logprobs(logits, tokens):
    """Log-probs (B, T-1) of all tokens (B, T) but the first."""
    return logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]

@torch.no_grad()
def test_bfloat16_log_probs_are_no_further_from_float32_than_those_of_transformers(tmp_path):
    hf, exact = pytest.importorskip("transformers"), network(WIDE)
    models.write_checkpoint(tmp_path / "model", WIDE, exact.state_dict(), models.tiny_model()[1])
    tokens = torch.tensor(random_ids(np.random.default_rng(0), *[120] * 16, vocab=512))
    right = token_logprobs(exact.logits(exact(tokens)), tokens)
    ours = token_logprobs(exact.bfloat16().logits(exact(tokens)), tokens) - right
    net = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    theirs = token_logprobs(net(tokens).logits, tokens) - right
    assert ours.abs().mean() <= 1.03 * theirs.abs().mean()
    assert ours.square().mean() <= 1.06 * theirs.square().mean()

@torch.no_grad()
def test_sampling_and_scoring_agree_in_bfloat16():
    """Step by step with a cache and in one pass: within 0.02 nats a token on average, 0.2 at most."""
    net, tokens = network(WIDE).bfloat16(), torch.tensor(random_ids(np.random.default_rng(0), 150, vocab=512))
    once, steps = net.logits(net(tokens)), steps_of(net, tokens, [30] + [1] * 120)
    gap = (token_logprobs(once, tokens) - token_logprobs(steps, tokens)).abs()[:, 29:]
    assert gap.mean() < 0.02 and gap.max() < 0.2

@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama3", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_logits_equal_transformers(kind, tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    if kind == "gpt2":
        net = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    elif kind == "mistral":
        net = hf.MistralForCausalLM(hf.MistralConfig(**shape, sliding_window=None, head_dim=12))
    elif kind == "qwen2":
        net = hf.Qwen2ForCausalLM(hf.Qwen2Config(**shape, tie_word_embeddings=True))
    elif kind == "qwen3":
        net = hf.Qwen3ForCausalLM(hf.Qwen3Config(**shape, tie_word_embeddings=True, head_dim=12))
    else:
        rope = {"rope_type": "llama3", "rope_theta": 5e5, **SCALING} if kind == "llama3" else None
        net = hf.LlamaForCausalLM(hf.LlamaConfig(**shape, rope_parameters=rope))
    for p in net.parameters():
        p.mul_(4) if p.dim() == 2 else p.add_(torch.randn_like(p) * 0.1)
    net.eval().save_pretrained(tmp_path)
    tokens, ours = torch.randint(0, 90, (2, 50)), dice.load_model(tmp_path, "cpu")
    theirs = net(tokens).logits
    same(ours.logits(ours(tokens)), theirs, atol=1e-4, rtol=0)
    same(steps_of(ours, tokens, (30, 1, 12, 1, 6)), theirs, atol=1e-4, rtol=0)

# ------------------------------------------------------------------------------------- sampler
PROMPTS = random_ids(np.random.default_rng(0), 5, 1, 17, 30, 9, 2)

def sample_all(net, prompts, count, temperature=1.0, top_p=1.0, max_new_tokens=30, **changes):
    """{(index of the prompt, number of the sample): (ids, finish)} of all answers."""
    arguments = {"stop_ids": (1, 2, 3), "seed": 0, "rows": 16, **changes}
    drawn = dice.generate(net, prompts, count, dice.Sampling(temperature, top_p, max_new_tokens), **arguments)
    found = {(index, number): (ids, finish) for index, number, ids, finish in drawn}
    assert len(found) == len(prompts) * count
    return found

@FAMILIES
@torch.no_grad()
def test_greedy_equals_argmax_of_the_uncached_forward(config):
    net = network(config)
    for (index, _), (ids, finish) in sample_all(net, PROMPTS[:3], 1, temperature=0, rows=2).items():
        expected = []
        while len(expected) < 30 and (not expected or expected[-1] not in (1, 2, 3)):
            logits = net.logits(net(torch.tensor([PROMPTS[index] + expected])))
            expected.append(int(logits[0, -1].argmax()))
        assert ids == expected and finish == ("stop" if ids[-1] in (1, 2, 3) else "length")

def test_a_sample_depends_on_seed_stream_prompt_and_number_alone():
    net = network(LLAMA)
    whole = sample_all(net, PROMPTS, 4)
    again = sample_all(net, PROMPTS[::-1], 4, rows=4)  # another order, other neighbours, another batch
    assert {(5 - i, k): v for (i, k), v in again.items()} == whole
    alone = sample_all(net, [PROMPTS[3]], 4, rows=100)
    assert all(alone[0, k] == whole[3, k] for k in range(4))
    for other in (sample_all(net, PROMPTS, 4, seed=1), sample_all(net, PROMPTS, 4, stream=1)):
        assert sum(other[key] != whole[key] for key in whole) > 20

def test_17_a_limit_beyond_the_context_costs_nothing_and_changes_no_draw():
    net = network(LLAMA)
    found = sample_all(net, PROMPTS, 4, max_new_tokens=10**12)
    assert found == sample_all(net, PROMPTS, 4, max_new_tokens=LLAMA.context)
    cut = sample_all(net, PROMPTS, 4, max_new_tokens=30)
    assert all(ids[:30] == cut[key][0] for key, (ids, _) in found.items())
    assert max(len(ids) for ids, _ in found.values()) > 30

def test_samples_end_with_a_stop_token_or_at_the_limit_and_differ():
    prompts = random_ids(np.random.default_rng(0), 5, 1, 60)
    found = sample_all(network(LLAMA), prompts, 16, stop_ids=(7, 8))
    for (index, _), (ids, finish) in found.items():
        limit = min(30, LLAMA.context - len(prompts[index]))
        assert not set(ids[:-1]) & {7, 8} and len(ids) <= limit
        assert finish == "stop" if ids[-1] in (7, 8) else finish == "length" and len(ids) == limit
    assert {finish for _, finish in found.values()} == {"stop", "length"}
    assert len({found[0, k][0][0] for k in range(16)}) > 4  # the first token is drawn for each sample

class Recorded:
    """A CUDA graph without CUDA: does the work again, for the same rows, on the device alone."""
    def __init__(self, fn, device, graphs):
        self.fn, self.batch = fn, fn.func.__self__
    def replay(self):
        assert self.fn.args[0] >= len(self.batch.request)
        longest = self.batch.cache.longest
        self.fn()
        assert self.batch.cache.longest == longest  # no Python runs in a replay

def varlen_attention(q, k, v, starts, k_starts, longest_q, longest_k, *, dropout_p, is_causal,
                     return_debug_mask, seqused_k):
    """What torch documents of varlen_attn, row by row in float64: sequence b has the queries from starts[b]
    on and the keys from k_starts[b] on, of which seqused_k[b] count, and the last query sees all of these."""
    assert is_causal and not (dropout_p or return_debug_mask) and q.shape[0] == int(starts[-1])
    used_of = k_starts.diff() if seqused_k is None else seqused_k
    assert {x.dtype for x in (starts, k_starts, used_of)} == {torch.int32}
    assert starts.diff().max() == longest_q and k_starts.diff().max() == longest_k
    y, group = torch.empty_like(q), q.shape[1] // k.shape[1]
    for b in range(len(starts) - 1):
        queries, used = range(int(starts[b]), int(starts[b + 1])), int(used_of[b])
        assert len(queries) <= used <= k_starts[b + 1] - k_starts[b]
        for t, i in enumerate(queries):
            seen = slice(int(k_starts[b]), int(k_starts[b]) + used - len(queries) + t + 1)
            for head in range(q.shape[1]):
                keys, values = (x[seen, head // group].double() for x in (k, v))  # (S, D)
                y[i, head] = (keys @ q[i, head].double() / q.shape[-1] ** 0.5).softmax(0) @ values
    return y, None, None, None, None

@FAMILIES
def test_varlen_attention_and_recorded_steps_draw_score_and_train_the_same(config, monkeypatch):
    """The sampler takes CUDA's way: varlen attention, recorded steps of few sizes, a look now and then."""
    net, samples, streamed, arguments = network(config), random_samples(), [], dict(rows=9, stop_ids=range(7))
    def slopes():
        net.zero_grad()
        logprobs = dice.sequence_logprobs(net, [x.prompt.ids for x in samples], [x.tokens for x in samples])
        (logprobs * torch.linspace(-1, 1, len(samples))).sum().backward()
        return [p.grad for p in net.parameters()]
    drawn, scored, trained = sample_all(net, PROMPTS, 4, **arguments), scores(net, samples, 200), slopes()
    monkeypatch.setattr(models, "has_varlen_kernel", lambda config, device, dtype: True)
    monkeypatch.setattr(models, "capture_cuda_graph", Recorded)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", varlen_attention)
    assert sample_all(net, PROMPTS, 4, **arguments) == drawn
    assert scores(net, samples, 200) == pytest.approx(scored, abs=1e-4)
    same(slopes(), trained, atol=1e-4, rtol=1e-3)
    one = sample_all(net, PROMPTS[2:3], 1, **arguments, on_token=streamed.append)
    assert one[0, 0] == drawn[2, 0] and streamed == one[0, 0][0]

def test_a_row_with_a_larger_nucleus_than_a_graph_has_candidates_waits_and_draws_the_same(monkeypatch):
    net, lacking, streamed, real = network(replace(LLAMA, vocab_size=3000)), [], [], dice.sample_token
    arguments = dict(rows=9, stop_ids=range(100), top_p=0.65)  # the nucleus has about 1024 tokens
    drawn = sample_all(net, PROMPTS, 4, **arguments)
    def sample_token(*arguments):
        lacking.append(float((real(*arguments) < 0).float().mean()))
        return real(*arguments)
    monkeypatch.setattr(dice, "sample_token", sample_token)
    monkeypatch.setattr(models, "has_varlen_kernel", lambda config, device, dtype: True)
    monkeypatch.setattr(models, "capture_cuda_graph", Recorded)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", varlen_attention)
    assert sample_all(net, PROMPTS, 4, **arguments) == drawn
    assert 0 < sum(lacking) < sum(map(bool, lacking))  # some rows of a step, not all
    assert not any(lacking[-20:])  # then there are more candidates
    one = sample_all(net, PROMPTS[2:3], 1, **arguments, on_token=streamed.append)
    assert one[0, 0] == drawn[2, 0] and streamed == one[0, 0][0]

class Launches(TorchDispatchMode):
    """Counts the operations that compute something, and are not only another view of a tensor."""
    def __init__(self):
        super().__init__()
        self.names = Counter()
    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        self.names[fn.name()] += not fn.is_view and not fn.name().endswith(("view", "empty.memory_format"))
        return fn(*args, **kwargs or {})

def test_a_step_on_a_gpu_waits_for_nothing_and_a_layer_launches_few_kernels(monkeypatch):
    """On the device "meta" there are shapes and no numbers: whoever asks for one fails."""
    monkeypatch.setattr(models, "has_varlen_kernel", lambda config, device, dtype: True)
    def launches(layers, top_p):
        with torch.device("meta"):
            net = dice.Transformer(replace(LLAMA3, layers=layers)).bfloat16()
        batch = dice.DecodingBatch(net, 8, 60, 30, dice.Sampling(0.9, top_p), [1, 2])
        batch.request, batch.cache.longest, batch.candidates = [(0, 0)] * 6, 5, 16
        batch.forward(8)
        with Launches() as counted:
            batch.forward(8)
        assert batch.token.shape == (8,)
        return counted.names
    for top_p in (1.0, 0.9):
        # Of each layer: 4 products, 5 kernels of rotary positions, 2 writes to the cache, attention, silu and
        # its product, 2 sums, and 2 norms, which are one kernel on CUDA and 8 here.
        assert (launches(2, top_p) - launches(1, top_p)).total() <= 16 + 2 * 8

def test_each_prompt_is_prefilled_once(monkeypatch):
    net, seen = network(LLAMA), []
    real = net.forward
    monkeypatch.setattr(net, "forward", lambda x, cache=None: seen.append(x.shape) or real(x, cache))
    sample_all(net, PROMPTS[2:5], 4)
    assert sum(rows for rows, width in seen if width > 1) == 3
    assert seen[-1][0] < 12  # rows that had ended no longer cost anything

def test_a_token_is_drawn_from_the_distribution():
    row = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, -30.0])
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.5):
        drawn = dice.sample_token(row.repeat(20000, 1), uniform, dice.Sampling(temperature))
        same(torch.bincount(drawn, minlength=6) / 20000, (row / temperature).softmax(0), atol=0.012, rtol=0)
    row, edge = torch.tensor([[-math.inf, 0.0, -math.inf]] * 2), torch.tensor([0.0, 1 - 2**-24])
    assert dice.sample_token(row, edge, dice.Sampling(1.0)).tolist() == [1, 1]

@pytest.mark.parametrize("kind", ["flat", "random", "peaked", "ties", "equal"])
def test_few_candidates_give_the_token_that_a_sort_gives_or_none(kind):
    """The nucleus by definition. Of equally likely tokens any may be drawn: their order is not defined."""
    generator = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(100, 3000, generator=generator), torch.rand(100, generator=generator)
    logits = {"flat": logits * 0.1, "random": logits, "ties": (logits * 2).round(), "equal": logits * 0,
              "peaked": logits * torch.linspace(1, 9, 100)[:, None]}[kind]
    for top_p in (0.3, 0.9, 0.99):
        probs, order = logits.softmax(-1).sort(descending=True, stable=True)
        inside = probs.cumsum(-1) - probs < top_p
        cdf = probs.where(inside, 0).cumsum(-1)
        place = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
        for candidates in (None, 16, 1024, 3000):
            token = dice.sample_token(logits, uniform, dice.Sampling(1.0, top_p), candidates)[:, None]
            found = (token >= 0)[:, 0]
            assert (found == (inside.sum(-1) <= (candidates or 3000))).all()
            same(logits.softmax(-1).gather(1, token.clamp(min=0))[found], probs.gather(1, place)[found])
            assert kind in ("ties", "equal") or (token == order.gather(1, place))[found].all()

@pytest.mark.parametrize("option, least", [("--temperature", 0), ("--top-p", TINIEST)])
def test_6_the_least_values_of_a_draw_take_the_likeliest_token(option, least):
    row, edge = torch.stack([torch.arange(3000.0), -torch.arange(3000.0)]), torch.tensor([0.0, 1 - 2**-24])
    for value in (1e-50, 1e-40, 1e-38, 1e-31, 1e-30, 1e-29, 1e-3):
        if value >= least:
            drawn = dice.sample_token(row, edge, parsed(option, value).sampling)
            assert drawn.tolist() == row.argmax(-1).tolist()
        else:
            with pytest.raises(InputError, match="must be at least 1e-30"):
                parsed(option, value)

# ------------------------------------------------------------------------------------- log-probs
@FAMILIES
@torch.no_grad()
def test_sequence_logprobs_equal_a_float64_loop(config):
    net, double, rng = network(config), network(config).double(), np.random.default_rng(0)
    prompts, answers = random_ids(rng, 3, 1, 12, 30), [ids + [2] for ids in random_ids(rng, 7, 1, 20, 5)]
    found = dice.sequence_logprobs(net, prompts, answers)  # the end token, 2, counts
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        total = 0.0
        for t, token in enumerate(answer):
            logits = double.logits(double(torch.tensor([prompt + answer[:t]])))[0, -1]
            total += logits.log_softmax(-1)[token].item()
        assert found[row].item() == pytest.approx(total, abs=2e-4)
    alone = torch.cat([dice.sequence_logprobs(net, [p], [a]) for p, a in zip(prompts, answers)])
    same(found, alone, atol=1e-4, rtol=0)  # what else is in the batch changes nothing

def random_samples():
    """Several answers, of one token too, to prompts of different length."""
    rng, samples = np.random.default_rng(3), []
    for length, count in ((5, 4), (1, 6), (17, 1), (9, 5), (60, 2)):  # of a context of 64
        prompt = dice.Prompt("", random_ids(rng, length)[0])
        answers = random_ids(rng, 1, *rng.integers(1, min(60, 65 - length), count - 1))
        samples += [dice.Sample(prompt, ids, "") for ids in answers]
    return [samples[i] for i in rng.permutation(len(samples))]

@FAMILIES
def test_prompts_read_once_give_the_scores_of_prompts_read_for_each_answer(config, monkeypatch):
    net, samples, read, real = network(config).double(), random_samples(), [], dice.prefill
    known = [dice.sequence_logprobs(net, [x.prompt.ids], [x.tokens]).item() for x in samples]
    monkeypatch.setattr(dice, "prefill", lambda model, prompts: read.extend(prompts) or real(model, prompts))
    for tokens in (1, 60, 10**6):
        assert scores(net, samples, tokens) == pytest.approx(known, abs=1e-9)
        assert sorted(map(len, read)) == [1, 5, 9, 17, 60]
        read.clear()

def test_log_probs_in_chunks_have_the_values_and_gradients_of_log_softmax_and_keep_no_logits(monkeypatch):
    net, rng, rows, kept = network(LLAMA).double(), np.random.default_rng(0), [], []
    real = dice.Logits.forward
    prompts, answers = random_ids(rng, 3, 1, 12), random_ids(rng, 7, 9, 20)
    scale = torch.tensor([1.0, -2.0, 3.0])
    def forward(ctx, hidden, weight):
        rows.append(len(hidden))
        return real(ctx, hidden, weight)
    monkeypatch.setattr(dice, "CHUNK_OF_LOGITS", 90 * 5)
    monkeypatch.setattr(dice.Logits, "forward", forward)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        found = dice.sequence_logprobs(net, prompts, answers)
    (found * scale).sum().backward()
    assert sum(rows) == 2 * 36 and max(rows) == 5  # forward and backward; prompts never get there
    assert not any(90 in shape for shape in kept if shape != net.head.weight.shape)
    slopes, expected = [p.grad.clone() for p in net.parameters()], []
    net.zero_grad()
    for prompt, answer in zip(prompts, answers):
        logprobs = net.logits(net(torch.tensor([prompt + answer])))[0, len(prompt) - 1:-1].log_softmax(-1)
        expected.append(logprobs[range(len(answer)), answer].sum())
    same(found, torch.stack(expected))
    (torch.stack(expected) * scale).sum().backward()
    same(slopes, [p.grad for p in net.parameters()])

class OnCuda(torch.Tensor):
    """A weight that says it is on CUDA, and the product that torch documents for CUDA alone."""
    is_cuda = True
    @classmethod
    def __torch_function__(cls, fn, types, args=(), kwargs=None):
        if fn is not torch.mm or not kwargs:
            return super().__torch_function__(fn, types, args, kwargs)
        a, b = (x.as_subclass(torch.Tensor) for x in args)
        assert kwargs == {"out_dtype": torch.float32} and a.dtype == b.dtype == torch.bfloat16
        assert not torch.is_grad_enabled()  # it has no gradient
        return torch.mm(a.float(), b.float())

@pytest.mark.parametrize("on_cuda", [False, True], ids=["cpu", "cuda"])
def test_log_probs_in_bfloat16_are_those_of_float32_logits(on_cuda, monkeypatch):
    """Against float64 logits of the same hidden states and weights. The gradient is one of bfloat16."""
    net, ref_model, rng = network(WIDE).bfloat16(), network(WIDE, 1).bfloat16(), np.random.default_rng(0)
    prompts, answers = random_ids(rng, 9, 1, 5, vocab=512), random_ids(rng, 200, 90, 150, vocab=512)
    net.head.weight.data *= 8  # logits of about 20, as those of real models
    if on_cuda:
        on = property(lambda self: self.head.weight.as_subclass(OnCuda))
        monkeypatch.setattr(dice.Transformer, "head_weight", on)
    hidden, targets = dice.forward_answers(net, prompts, answers)
    weight = net.head.weight.detach().double().requires_grad_()
    def summed(logits):
        logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return torch.stack([part.sum() for part in logprobs.split([200, 90, 150])])
    exact, rounded = summed(hidden.double() @ weight.T), summed((hidden @ net.head.weight.T).float())
    exact.sum().backward()
    for found in (dice.sequence_logprobs(net, prompts, answers),
                  dice.sequence_logprobs_and_kl(net, ref_model, prompts, answers)[0]):
        assert 300 * (found - exact).abs().max() < (rounded - exact).abs().max()
        net.zero_grad()
        found.sum().backward()
        assert (net.head.weight.grad - weight.grad).norm() < 0.01 * weight.grad.norm()

def test_batches_hold_every_item_once_within_the_budget():
    sizes = np.random.default_rng(0).integers(1, 400, 300).tolist() + [5000]
    for padded, most in (True, 1.1 * sum(sizes)), (False, sum(sizes)):
        groups = batches(sizes, 2000, size=int, padded=padded)
        tokens = [len(group) * max(group) if padded else sum(group) for group in groups]
        assert sorted(sum(groups, [])) == sorted(sizes) and sum(tokens) <= most
        assert all(n <= 2000 or len(group) == 1 for n, group in zip(tokens, groups))
        for group, following in zip(groups, groups[1:]):  # the next item would be too much
            assert ((len(group) + 1) * group[0] if padded else sum(group) + following[0]) > 2000
    items = [[0] * n for n in sizes]  # a training step is not padded
    assert [group for group, _ in share(items, 2000)] == batches(items, 2000, padded=False)

# ------------------------------------------------------------------------------------- alpha
LENGTHS = np.array([[100, 400, 250, 50], [300, 120, 80, 500], [60, 90, 700, 200]], dtype=float)
REWARDS = np.array([[1.0, 6.0, 3.5, 0.2], [4.0, 2.5, 1.0, 8.0], [0.5, 1.2, 9.0, 3.0]])

def some_missing(rng, reward, length):
    """Tables with NaN where a prompt has no such answer; each prompt has two at least."""
    missing = rng.random(reward.shape) < 0.2
    missing[:, :2] = False
    return np.where(missing, np.nan, reward), np.where(missing, np.nan, length)

def test_alpha_on_the_worked_example():
    table = {0: 470, 0.0119: 470, 0.0121: 303.3333, 0.0135: 90, 0.014: 16.6667, 0.0145: -110}
    for alpha, gap in table.items():
        assert dice.length_gap(REWARDS, LENGTHS, dice.choose_pairs, alpha) == pytest.approx(gap, abs=1e-3)
    alpha = dice.search_alpha(REWARDS, LENGTHS)
    prompt, best, worst = dice.choose_pairs(REWARDS - alpha * LENGTHS)
    assert LENGTHS[prompt, best].tolist() == [400, 500, 200] and 0.013636 < alpha < 0.014474
    assert LENGTHS[prompt, worst].tolist() == [50, 300, 700]

def test_alpha_is_as_good_as_a_dense_scan_and_zero_where_nothing_is_to_be_taken_out():
    rng = np.random.default_rng(0)
    for _ in range(12):
        length = rng.integers(10, 500, (20, 6)).astype(float)
        reward, length = some_missing(rng, 0.01 * length + rng.normal(size=length.shape), length)
        gap = partial(dice.length_gap, reward, length, dice.choose_pairs)
        found = abs(gap(dice.search_alpha(reward, length)))
        assert found <= min(abs(gap(alpha)) for alpha in np.arange(0, 0.1, 1e-4)) + 1e-9
    assert dice.search_alpha(-LENGTHS, LENGTHS) == 0 == dice.search_alpha(REWARDS, np.full((3, 4), 7.0))
    assert dice.search_alpha(np.zeros((1, 2)), np.array([[9.0, 1.0]])) >= 0  # equal rewards: no hang

def test_random_rejected_answers_are_any_but_the_best():
    rng = np.random.default_rng(0)
    reward, length = some_missing(rng, rng.normal(size=(4000, 4)), rng.uniform(1, 90, (4000, 4)))
    prompt, best, other = dice.choose_pairs(reward - 0.01 * length, rng.random((4000, 4)))
    assert (best == dice.choose_pairs(reward - 0.01 * length)[1]).all()
    assert (best != other).all() and np.isfinite(reward[prompt, other]).all()
    free = np.isfinite(reward).all(1) & (best == 0)
    assert np.allclose(np.bincount(other[free], minlength=4)[1:] / free.sum(), 1 / 3, atol=0.08)
    noise, reward = rng.random((4000, 4)), reward + 0.02 * length
    choose = partial(dice.choose_pairs, noise=noise)
    assert dice.length_gap(reward, length, choose, 0) > 5
    assert abs(dice.length_gap(reward, length, choose, dice.search_alpha(reward, length, choose))) < 0.5

# ------------------------------------------------------------------------------------- pairs and replay
def settings(**changes):
    """Settings from flat values, with those of the loss among them."""
    values = {"samples": 4, "min_valid": 0.5, "min_chars": 0, "device": "cpu", "dtype": "float32", **changes}
    loss = dice.LOSSES[values.get("loss", "dpo")]
    s = options.build(dice.Settings, loss.defaults | values)
    s.loss_options = dice.LOSSES.options_of(s.loss, {k: v for k, v in values.items() if k in loss.options})
    return s

def answers(prompt, *rows):
    """Samples of one prompt from (text, reward) or (text, reward, finish)."""
    return [dice.Sample(prompt, [5], text, k, *(finish or ["stop"]), logprob=0, prev_logprob=0, reward=reward)
            for k, (text, reward, *finish) in enumerate(rows)]

def pairs_of(samples, **changes):
    """(alpha, (chosen, rejected) texts of the pairs, lost prompts) of make_pairs."""
    alpha, pairs, lost = dice.make_pairs(samples, settings(**changes), np.random.default_rng(0))
    assert all(p.source == "generated" for p in pairs)
    return alpha, [(p.chosen.text, p.rejected.text) for p in pairs], lost

def test_pairs_are_best_against_worst_of_the_valid_and_different_answers():
    (a, b, c, d, e), cut = (dice.Prompt(name, [5]) for name in "abcde"), ("cut", 9.0, "length")
    samples = answers(a, ("one", 1.0), ("two", 5.0), ("six", -3.0), cut)
    samples += answers(b, ("same", 1.0), ("same", 2.0), ("same", 3.0), ("same", 4.0))  # one text
    samples += answers(c, ("uno", 2.0), ("due", 2.0), ("tre", 2.0), ("sei", 2.0))  # equal rewards
    samples += answers(d, ("x", 1.0), cut, cut, cut) + answers(e, ("y", 1.0), ("", 2.0), ("", 3.0))
    assert pairs_of(samples) == (0, [("two", "six")], {"all equal": 2, "cut": 1, "too few valid": 1})
    assert samples[0].shaped == 1.0
    for group, changes in ((answers(d, cut, cut, cut, cut), {}),
                           (answers(a, ("one", 1.0), ("four", 2.0), ("one", 3.0)), {"max_chars": 4})):
        with pytest.raises(InputError, match="no prompt has"):
            pairs_of(group, **changes)

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_never_gets_into_a_pair(value):
    prompt, other = dice.Prompt("a", [5]), dice.Prompt("b", [5])
    group = answers(prompt, ("one", value), ("two", 1.0), ("six", -1.0), ("ten", value))
    alpha, pairs, _ = pairs_of(group + answers(other, ("one", value), ("two", 1.0)))
    assert math.isfinite(alpha) and pairs == [("two", "six")]

def test_shaping_takes_the_length_bias_out_in_either_unit_and_alpha_may_be_a_multiple_of_alpha_star():
    rng, samples = np.random.default_rng(0), []
    for i in range(100):
        prompt = dice.Prompt(str(i), [5])
        for k, n in enumerate(rng.integers(5, 90, 4)):  # a token has k + 1 characters: the two units disagree
            reward = 0.05 * n + rng.normal()
            samples.append(dice.Sample(prompt, [5] * n, f"{k}" * n * (k + 1), k, reward=reward))
    def gap(unit, **changes):
        """How much longer the chosen answers are, in a unit that may be another than that of the shaping."""
        _, pairs, _ = pairs_of(samples, **changes)
        size = len if unit == "chars" else lambda text: len(text) // (int(text[0]) + 1)
        return np.mean([size(chosen) - size(rejected) for chosen, rejected in pairs])
    assert gap("chars", alpha="0") > 40 and abs(gap("chars")) < 3
    assert abs(gap("tokens", length_unit="tokens")) < 2 and abs(gap("chars", length_unit="tokens")) > 5
    alpha = pairs_of(samples, length_unit="tokens")[0]
    assert samples[0].shaped == pytest.approx(samples[0].reward - alpha * len(samples[0].tokens))
    assert pairs_of(samples, length_unit="tokens", alpha="2x")[0] == pytest.approx(2 * alpha)
    assert pairs_of(samples, alpha="0.25")[0] == 0.25

def mixture(generated, offline, gamma, seed=0):
    """The mixed pairs on these prompts, as two lists of prompts: (generated, replayed)."""
    sides = {"generated": [], "replayed": []}
    for source, keys in (("generated", generated), ("replayed", offline)):
        for key in keys:
            x = dice.Sample(dice.Prompt(str(key), [5]), [5], "")
            sides[source].append(dice.Pair(x, x, source))
    pairs = dice.mix_replay(*sides.values(), gamma, np.random.default_rng(seed))
    new, old = ([p.prompt.key for p in pairs if p.source == source] for source in sides)
    assert not {*new} & {*old}
    return new, old

@pytest.mark.parametrize("gamma", [0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 1])
@pytest.mark.parametrize("overlap", [0, 30, 100])
def test_the_mixture_has_the_share_asked_for_and_no_prompt_twice(gamma, overlap):
    offline = range(100 - overlap, 200 - overlap)
    new, old = mixture(range(100), offline, gamma)
    total = len(new) + len(old)
    assert abs(len(old) - gamma * total) <= 0.5 and len({*new, *old}) == total
    most = min(100 / max(gamma, 1e-9), 100 / max(1 - gamma, 1e-9), 200 - overlap)
    assert total >= most - 1 / max(min(gamma, 1 - gamma), 0.1)
    assert mixture(range(100), offline, gamma) == (new, old) != mixture(range(100), offline, gamma, seed=1)

@pytest.mark.parametrize("generated, offline, gamma, sizes", [
    (range(1000), range(1000), 0.7, (300, 700)),  # the same prompts; int() would lose a row
    (range(5), range(100, 200), 0.5, (5, 5)),
    (range(5), range(100, 200), 0.01, (5, 0)),  # not even one in a hundred
    ([0], [1, 2, 3], 0.9, (0, 3)),  # too few offline pairs to go with even one
    # Two generated pairs of a prompt shut out its two offline pairs once: 1536 are left, all that 512 need.
    pytest.param([*range(256)] * 2, [*range(256), *range(1792)], 0.75, (512, 1536), id="counted once")])
def test_the_mixture_is_as_large_as_its_share_allows_and_never_empty(generated, offline, gamma, sizes):
    assert tuple(map(len, mixture(generated, offline, gamma))) == sizes

@pytest.mark.parametrize("gamma, generated, offline", [(0.5, 3, 0), (0.5, 0, 3), (1, 3, 0), (0, 0, 3)])
def test_a_mixture_without_one_of_its_sides_is_refused(gamma, generated, offline):
    with pytest.raises(InputError, match="--gamma"):
        mixture(range(generated), range(offline), gamma)

# ------------------------------------------------------------------------------------- training
class Bench(runs.Run):
    """A run without data and without its lock: load() gives one network, whatever is asked for."""
    def __init__(self, directory, net=None, **changes):
        super().__init__(settings(out=str(directory), **{"lr": 1e-3, "warmup": 0, **changes}), {})
        self.net, self.metrics, self.logged, self.stage_name = net or network(LLAMA), [], set(), "dpo"
    def load(self, source, train=False):
        return self.net

def random_pairs(net, count, seed=0):
    """Offline pairs whose samples know their log-prob under the network."""
    rng, pairs = np.random.default_rng(seed), []
    for i in range(count):
        prompt = dice.Prompt(str(i), random_ids(rng, int(rng.integers(1, 10)))[0])
        tokens = [random_ids(rng, int(rng.integers(1, 30)))[0] + [2] for _ in range(2)]
        pairs.append(dice.Pair(*(dice.Sample(prompt, ids, "") for ids in tokens), "replayed"))
    samples = dice.answers_of(pairs)
    for x, logprob in zip(samples, scores(net, samples)):
        x.logprob = logprob
    return pairs

def train_dpo(run, pairs, steps, lr=1e-3, loss_fn=dice.preference_loss, **more):
    """Train by the loss of the run; the new weights as one vector."""
    s = run.settings
    new = dice.train(run, s, "", pairs, loss_fn, lr=lr, steps=steps, epochs=s.epochs, batch=s.batch, **more)
    return torch.cat([weight.flatten() for _, weight in new])

def test_micro_batches_change_nothing_and_dpo_learns_the_pairs(tmp_path):
    weights = []
    for tokens in (10**6, 100, 1):
        run = Bench(tmp_path / str(tokens), batch=6, epochs=3, train_tokens=tokens)
        weights.append(train_dpo(run, random_pairs(run.net, 20), steps=9))
        first, last = run.metrics[0], run.metrics[-1]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy and reference are the same
        assert first["accuracy"] < 1 and len(run.metrics) == 9 and last["loss"] < 0.6 and last["margin"] > 0.1
    same(torch.stack(weights[1:]), weights[0].expand(2, -1), atol=1e-4, rtol=0)

def test_the_logged_step_is_the_mean_over_its_pairs(tmp_path):
    run = Bench(tmp_path, batch=7, train_tokens=100)
    pairs = random_pairs(run.net, 7)
    for p in pairs:
        p.chosen.logprob -= 3  # as if the policy had moved by 3 nats since
    train_dpo(run, pairs, steps=1)
    [row] = rows_of(tmp_path / "metrics.jsonl")
    assert row["margin"] == pytest.approx(0.3, abs=1e-4) and row["accuracy"] == 1
    assert row["loss"] == pytest.approx(math.log(1 + math.exp(-0.3)), abs=1e-4)
    assert row["chosen_tokens"] == pytest.approx(np.mean([len(p.chosen.tokens) for p in pairs]))
    assert row["rejected_logprob"] == pytest.approx(np.mean([p.rejected.logprob for p in pairs]), abs=1e-3)

@pytest.mark.parametrize("cosine", [False, True])
def test_warm_up_is_linear_then_constant_or_a_cosine(cosine, tmp_path):
    run = Bench(tmp_path, batch=2, epochs=10, warmup=4)
    train_dpo(run, random_pairs(run.net, 2), steps=7, cosine=cosine)
    factor = (1 + np.cos(np.pi * np.arange(7) / 7)) / 2 if cosine else 1
    expected = np.array([1, 2, 3, 4, 4, 4, 4]) / 4000 * factor
    assert [row["lr"] for row in run.metrics] == pytest.approx(expected)

def test_a_loss_that_is_not_finite_stops_before_the_step_and_leaves_its_batch(tmp_path):
    run = Bench(tmp_path, batch=8)
    pairs, before = random_pairs(run.net, 8), [p.detach().clone() for p in run.net.parameters()]
    known = {tuple(x.tokens): x.logprob for x in dice.answers_of(pairs)}
    pairs[5].rejected.logprob = math.nan
    with pytest.raises(InputError, match="dpo, step 1: loss nan.*dpo-not-finite.jsonl"):
        train_dpo(run, pairs, steps=2)
    same(before, list(run.net.parameters()), atol=0, rtol=0)
    rows = rows_of(tmp_path / "dpo-not-finite.jsonl")
    assert len(rows) == 16 and rows[0].keys() == {"prompt", "text", "tokens", "ref_logprob", "logprob"}
    for row in rows:
        logprob, is_spoiled = known[tuple(row["tokens"])], row["tokens"] == pairs[5].rejected.tokens
        assert row["ref_logprob"] == (None if is_spoiled else logprob)
        assert row["logprob"] == pytest.approx(logprob, abs=1e-4)

# ------------------------------------------------------------------------------------- whole runs
@pytest.fixture
def small_world(monkeypatch):
    for name, value in (("SFT_EXAMPLES", 500), ("PREFERENCES", 40), ("HELD_OUT", 3), ("DICE_PROMPTS", 10)):
        monkeypatch.setattr(tiny, name, value)
    monkeypatch.setattr(plots, "save", lambda *_: None)  # half a second each
    return ("--sft-steps 20 --sft-batch 16 --sft-lr 0.01 --dpo-steps 2 --steps 2 --samples 4 --batch 4 "
            "--seed 3 --max-new-tokens 40").split()

def check_logprobs(directory, rows, key):
    """What rows of samples.jsonl hold is what one pass of the model in this directory gives."""
    ids = [models.read_tokenizer(directory).prompt(row["prompt"]) for row in rows]
    found = dice.sequence_logprobs(dice.load_model(directory, "cpu"), ids, [row["tokens"] for row in rows])
    same(found, torch.tensor([row[key] for row in rows]), atol=1e-3, rtol=0)

def test_a_whole_tiny_run_leaves_what_it_promises_and_repeats_to_the_byte(small_world, tmp_path, capsys):
    run, again = tmp_path / "a", tmp_path / "b"
    assert dice.main([*small_world, "--out", str(run)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("length-controlled", "sft", "dpo", "round-2", "Tell me the"))
    for name in ("settings.json", "report.md", "round-2/pairs.jsonl", "evaluation/round-2.jsonl", *(
            f"{stage}/{name}" for stage in ("sft", "dpo", "round-1/policy", "round-2/policy")
            for name in ("config.json", "model.safetensors", "tokenizer.json"))):
        assert (run / name).exists(), name
    samples, pairs = rows_of(run / "round-1/samples.jsonl"), rows_of(run / "round-1/pairs.jsonl")
    assert len(samples) == 10 * 4 and list(samples[0]) == [
        "prompt", "sample", "tokens", "text", "finish", "logprob", "prev_logprob", "reward", "shaped_reward"]
    for row in samples:
        assert row["reward"] == pytest.approx(row["logprob"] - row["prev_logprob"])
    check_logprobs(run / "dpo", samples, "logprob")
    check_logprobs(run / "sft", samples, "prev_logprob")
    assert {row["source"] for row in pairs} == {"generated", "replayed"}
    assert dice.main([*small_world, "--rounds", "1", "--out", str(again)]) == 0
    for name in ("round-1/samples.jsonl", "round-1/pairs.jsonl", "round-1/policy/model.safetensors"):
        assert (run / name).read_bytes() == (again / name).read_bytes(), name

@needs_real
def test_a_run_on_real_weights_and_real_text(tmp_path, monkeypatch, capsys):
    few, prompts, out = tmp_path / "few.jsonl", tmp_path / "prompts.jsonl", tmp_path / "run"
    files.write_rows(few, rows_of(REAL / "preferences.jsonl")[:60])
    files.write_rows(prompts, [{"instruction": text} for text in ("Tell me a story.", "Who is Tim?")])
    monkeypatch.setattr(plots, "save", lambda *_: None)  # half a second each
    argv = "--rounds 1 --samples 4 --min-valid 0 --dpo-steps 2 --steps 2 --batch 4 --lr 1e-4".split()
    argv += ["--model", REAL / "stories260k", "--preferences", few, "--prompts", prompts, "--out", out]
    assert dice.main(list(map(str, argv))) == 0 and (out / "round-1/policy/model.safetensors").exists()
    told = capsys.readouterr()
    assert "of 60 offline pairs are used" in told.err and "round-1" in told.out
    for row in rows_of(out / "round-1/samples.jsonl"):
        assert math.isfinite(row["reward"]) and row["tokens"]

# ------------------------------------------------------------------------------------- what a run refuses
@cache  # a fifth of a second, for each of 50 tests
def tiny_model():
    config, tokenizer = models.tiny_model()
    return config, dice.new_model(config, 0).state_dict(), tokenizer

@pytest.fixture
def checkpoint(tmp_path):
    models.write_checkpoint(tmp_path / "model", *tiny_model())
    return tmp_path / "model"

GOOD = {"prompt": "Hello", "chosen": "Good day.", "rejected": "Go."}

def parsed(*argv):
    return options.parse(dice.Settings, "", dice.LOSSES, list(map(str, argv)))[0]

def refused(capsys, tmp_path, *argv):
    """Runs the program; its one line on stderr, after checking that nothing was written."""
    before = sorted(tmp_path.rglob("*"))
    assert dice.main([*map(str, argv), "--out", str(tmp_path / "out")]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    [line] = capsys.readouterr().err.splitlines()
    return line

@pytest.mark.parametrize("argv, told", [
    ("--gamma 1.5", ""), ("--beta 0", ""), ("--beta nan", ""), ("--alpha much", ""), ("--alpha x", ""),
    ("--samples 1", ""), ("--top-p 0", ""), ("--dtype int8", ""), ("--prompts nowhere.json", "nowhere.json"),
    ("--model nowhere --preferences DATA", "nowhere: not a model directory"),
    ("--reference nowhere", "--reference nowhere: give its --model"),
    ("--loss nobody", "--loss nobody: choose one of dpo, cdpo"),
    ("--label-smoothing 0.2", "0.2: --loss dpo does not read it; it belongs to --loss cdpo"),
    ("--loss tdpo1 --kl-weight 1", "1.0: --loss tdpo1 does not read it; it belongs to --loss tdpo2"),
    ("--loss cdpo --label-smoothing 0.6", "--label-smoothing 0.6: must be at least 0 and at most 0.5"),
    ("--reward nobody", "nobody: not a model directory"), ("--rejected best", "choose one of worst, random"),
    ("--dpo-steps 0", "--dpo-steps 0: the implicit reward needs"),
    ("--weights dummy", "--weights dummy: stands in for a --model NAME"),
    ("--min-chars 50 --max-chars 51", "--min-chars 50: no answer is longer than that and shorter than"),
    ("--reward gold --reward-reference first", "--reward-reference first")])
def test_bad_settings_are_refused(argv, told, tmp_path, capsys):
    files.write_rows(tmp_path / "DATA", [GOOD])
    assert (told or argv) in refused(capsys, tmp_path, *argv.replace("DATA", str(tmp_path / "DATA")).split())

def test_other_mistakes_are_refused(checkpoint, tmp_path, capsys):
    good, long, say = tmp_path / "good.jsonl", tmp_path / "long.jsonl", partial(refused, capsys, tmp_path)
    files.write_rows(good, [GOOD])
    files.write_rows(long, [GOOD, {"prompt": "x " * 500}])
    model, pairs, reference = ["--model", checkpoint], ["--preferences", good], ["--reference", checkpoint]
    told = say(*model, *pairs, "--prompts", long)
    assert "long.jsonl line 2" in told and "context of 128" in told
    assert 'long.jsonl line 2: has no "chosen"' in say(*model, "--preferences", long)
    assert "nothing to sample for" in say(*model) and "--reference" in say(*model, "--prompts", good)
    assert "--start-from" not in say(*model)
    assert "a preset or ORGANISATION/NAME on the hub; did you mean gpt2?" in say("--model", "gtp2")
    files.write_json(tmp_path / "settings.json", {})  # now the model is one of a run
    assert f"--preferences FILE, or --start-from {tmp_path} to begin with" in say(*model, *reference)
    (tmp_path / "settings.json").unlink()
    assert "--gamma 0.5: there are no offline pairs to replay" in say(*model, *reference, "--prompts", good)
    sft = [*model, "--prompts", good, "--sft-steps", "10"]
    assert "--sft-steps 10: needs answers" in say(*sft)
    assert "--sft-steps 10: a policy with a --reference" in say(*sft, *pairs, *reference)
    assert f"--reference {checkpoint}: is --model itself, so all rewards" in say(*model, *pairs, *reference)
    small = replace(models.tiny_model()[0], vocab_size=90)
    shape = dice.new_model(small, 0).state_dict()
    models.write_checkpoint(tmp_path / "other", small, shape, models.tiny_model()[1])
    assert "other: has fewer embeddings" in say(*model, *pairs, "--reference", tmp_path / "other")
    data, ran = (checkpoint / "model.safetensors").read_bytes(), tmp_path / "ran"
    (checkpoint / "model.safetensors").write_bytes(data[:len(data) // 2])
    assert "model.safetensors" in say(*model, *pairs)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % bytes(ran))
    assert "pytorch_model.bin is a pickle" in say(*model, *pairs) and not ran.exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    (checkpoint / "model.safetensors").write_bytes(data)
    assert "holds files already" in say(*model, *pairs)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"

def test_13_dummy_weights_and_a_dry_run_need_no_data_file_and_a_dry_run_no_download(
        checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")  # a download would fail
    shape = replace(models.tiny_model()[0], vocab_size=2000, context=512)
    monkeypatch.setattr(jsonl, "STAND_IN_PAIRS", 200)
    quick = dict(max_new_tokens=200, samples=4, max_prompts=4, rounds=1, steps=1, batch=2, min_valid=0)
    mini = models.Preset("o/mini", shape, models.PAPER | quick)
    monkeypatch.setitem(models.PRESETS, "mini", mini)
    monkeypatch.setitem(models.PRESETS, "judge", replace(mini, repository="o/judge"))
    argv = ["--model", "mini", "--reference", "mini", "--device", "cpu", "--out", "run"]
    assert dice.main(argv) == 2 and "python data/ultrafeedback.py makes it" in capsys.readouterr().err
    assert dice.main([*argv, "--reward", "judge", "--dry-run"]) == 0
    printed = capsys.readouterr()
    told = printed.err
    for part in ("not downloaded: mini, mini, judge", "reading the data", "200 prompts", "sampling",
                 "scoring"):
        assert part in told, part
        told = told[told.index(part):]
    assert "prompts  200 of " in printed.out and " minute" in printed.out and "hours" not in printed.out
    assert dice.main(["--model", str(checkpoint), "--dry-run", "--max-tokens", "64", "--rounds", "0"]) == 2
    assert "stand-in pairs: no pair can be used within 64 tokens" in capsys.readouterr().err
    assert dice.main(["--model", "o/other", "--dry-run"]) == 2
    assert "o/other: is not downloaded, and a dry run downloads nothing" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert dice.main([*argv, "--weights", "dummy"]) == 0
    assert (tmp_path / "run" / "round-1" / "policy" / "model.safetensors").exists()
    assert "200 prompts" in capsys.readouterr().err
    files.write_rows(tmp_path / "mine", [GOOD])  # files that are named are read
    assert dice.main([*argv, "--preferences", "mine", "--gamma", "0", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "1 offline pairs" in printed.out and "random words" not in printed.err

# ------------------------------------------------------------------------------------- odd texts and rewards
@pytest.fixture
def world(checkpoint, tmp_path, monkeypatch, capsys):
    """Runs the program on prompts and offline pairs, with answers that do not depend on the tiny model."""
    def run(prompts, pairs, says, *argv):
        """(exit code, what it printed, --out); says(prompt's index, number) -> a text, or (text, finish)"""
        tokenizer = models.read_tokenizer(checkpoint)
        index = {tuple(tokenizer.prompt(text)): i for i, text in enumerate(prompts)}
        def generate(model, ids, count, sampling, **_):
            for i, prompt in enumerate(ids):
                for k in range(count):
                    said = says(index.get(tuple(prompt), 0), k)
                    text, finish = (said, "stop") if isinstance(said, str) else said
                    yield i, k, tokenizer.answer(text), finish
        monkeypatch.setattr(dice, "generate", generate)
        monkeypatch.setattr(plots, "save", lambda *_: None)  # half a second each
        files.write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in prompts])
        files.write_rows(tmp_path / "pairs.jsonl", [dict(zip(GOOD, pair)) for pair in pairs])
        paths = ["--model", checkpoint, "--prompts", tmp_path / "prompts.jsonl", "--preferences",
                 tmp_path / "pairs.jsonl", "--out", tmp_path / "out"]
        few = "--rounds 1 --samples 3 --steps 2 --dpo-steps 1 --dpo-lr 1e-3 --batch 4 --held-out 0".split()
        return dice.main([*map(str, paths), *few, *argv]), capsys.readouterr(), tmp_path / "out"
    return run

def mixed(out, source):
    """(prompt, chosen, rejected) of the pairs of round 1 from one source."""
    rows = rows_of(out / "round-1" / "pairs.jsonl")
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows if row["source"] == source]

ODD = [
    ("What is \ud800 and \udfff?", "A half \ud83d of a pair.", "\udc00\ud800 none"),
    ("What is \x00?", "A \x00 byte.", "\x00\x01\x02\x7f"),
    ("مرحبا \u202eabc\u202c שלום", "שלום, \u202eתודה", "لا \u200f\u200e"),
    ("e\u0301 is not \u00e9", "a\u0308\u0323" * 5, "\u0301\u0301\u0301\u0301"),
    ("👩‍👩‍👧‍👦?", "🏳️‍🌈 and 🇩🇪", "\U0010ffff\u0378\ufeff\ufffe"),
    ("<|endoftext|>", "<|endoftext|></s><|im_end|>", "{{ 7 * 7 }}\n\nUser:"),
    ("a\r\nb\u2028c\u2029d\x85e\x0bf", "one\r\ntwo\rthree\u2028", "\n\n\n\n")]
OFFLINE = [(f"Offline {i}", "Yes, of course.", "No.") for i in range(4)]

def without_halves(text):
    """Half a surrogate pair is no character: the model says U+FFFD."""
    return "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in text)

def test_odd_text_goes_through_a_run_and_comes_out_as_it_went_in(world):
    prompts, said = [prompt for prompt, *_ in ODD], [said for _, *said in ODD]
    pairs = [(f"Offline: {prompt}", chosen, rejected) for prompt, chosen, rejected in ODD]
    code, _, out = world(prompts, pairs, lambda i, k: [*said[i], f"Third {i}."][k])
    rows, tokenizer = rows_of(out / "round-1" / "samples.jsonl"), models.tiny_model()[1]
    assert code == 0 and [row["prompt"] for row in rows[::3]] == prompts
    assert [row["text"] for row in rows[::3]] == [without_halves(chosen) for chosen, _ in said]
    old, new = mixed(out, "replayed"), {prompt for prompt, _, _ in mixed(out, "generated")}
    assert old and {*old} <= {*pairs} and new and new <= {*prompts}
    for text in sum(ODD, ()):
        assert tokenizer.decode(tokenizer.encode(text)) == without_halves(text)
        assert tokenizer.end not in tokenizer.prompt(text) and tokenizer.answer(text)[-1] == tokenizer.end

def test_a_prompt_of_3_mb_is_refused_by_its_line_and_such_a_pair_is_left_out(world):
    started, letters, combining = time.monotonic(), "a" * 3 * 2**20, "e" + "\u0301" * 2**20
    code, told, out = world(["Hello", letters], OFFLINE, lambda i, k: "")
    assert code == 2 and not out.exists() and len(told.err) < 500
    assert "prompts.jsonl line 2: the prompt has" in told.err and "context of 128" in told.err
    code, told, _ = world(["Hello"], [*OFFLINE, ("B", combining, "Other.")], lambda i, k: f"Answer {k}.")
    assert code == 0 and "4 of 5 offline pairs are used: 1 are longer than 128 tokens" in told.err
    assert time.monotonic() - started < 20

def test_17_pairs_of_equal_answers_alone_are_not_told_to_be_too_long(world):
    same = [("A", "same", "same"), ("B", "too", "too")]
    code, told, _ = world(["Hello"], same, lambda i, k: f"Answer {k}.")
    assert code == 2 and "pairs.jsonl: every pair has the same answer twice" in told.err
    assert "--max-tokens" not in told.err

def test_answers_of_one_token(world, checkpoint):
    """The end token alone may be an offline answer; sampled, it has too few characters to be used."""
    pairs = [("A", "", "Some words."), ("B", "Yes", ""), ("C", "y", "n")]
    says = [["", " ", "Words."], ["", "y", "Longer words."], ["Good.", "Bad one.", ""]]
    code, _, out = world(["P", "Q", "R"], pairs, lambda i, k: says[i][k], "--min-valid", "0", "--alpha", "0")
    first, [(prompt, *said)], old = (rows_of(out / "round-1" / "samples.jsonl")[0], mixed(out, "generated"),
                                     mixed(out, "replayed"))
    assert code == 0 and first["tokens"] == [models.read_tokenizer(checkpoint).end] and first["text"] == ""
    assert math.isfinite(first["reward"]) and prompt == "R" and {*said} == {"Good.", "Bad one."}
    assert old and {*old} <= {*pairs}

def rewarded(monkeypatch, reward):
    """The reward becomes reward(prompt's text, answer)."""
    def add_rewards(run, s, label, samples, policy_dir, prev_dir):
        for x in samples:
            x.reward = reward(x.prompt.content, x.text)
    monkeypatch.setattr(dice, "add_rewards", add_rewards)

EQUAL = "the same reward, for each of 2 prompts"

@pytest.mark.parametrize("said, reward, argv, told", [
    (("", "stop"), 0, "", "no prompt has 2 usable answers"),
    (("long", "length"), 0, "", "(6 of 6 were cut by the length limit, 0 got no reward)"),
    (("word", "stop"), math.nan, "", "6 got no reward"),
    (("word", "stop"), 1.5, "--rejected random", EQUAL), (("word", "stop"), 1.5, "--gamma 0", EQUAL)])
def test_a_round_without_a_pair_is_one_clear_error(said, reward, argv, told, world, monkeypatch):
    rewarded(monkeypatch, lambda prompt, text: reward)
    text, finish = said
    said = [(text and f"{text} {k}", finish) for k in range(3)]
    code, printed, out = world(["P", "Q"], OFFLINE, lambda i, k: said[k], *argv.split())
    last = printed.err.splitlines()[-1]
    assert code == 2 and last.startswith("dice.py: ") and told in last
    assert not (out / "round-1" / "policy").exists()

def test_a_nan_of_the_implicit_reward_is_one_clear_error(world, monkeypatch):
    monkeypatch.setattr(dice, "implicit_reward", lambda logprob, prev_logprob: math.nan)
    code, told, _ = world(["P\u202e\n"], OFFLINE, lambda i, k: f"word {k}")
    last = told.err.splitlines()[-1]
    assert code == 2 and "reward nan" in last and "P\\u202e\\n" in last.replace("\\\\", "\\")

def spoil(directory, name, value):
    """Fill a tensor of a checkpoint with one value."""
    weights = load_file(directory / "model.safetensors")
    weights[name][:] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("broken", ["--model", "--reference"])
def test_weights_that_are_no_numbers_are_one_clear_error(broken, value, checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "broken")
    spoil(tmp_path / "broken", "model.norm.weight", value)
    files.write_rows(tmp_path / "pairs.jsonl", [GOOD, GOOD | {"prompt": "Hi"}])
    both = {"--model": checkpoint, "--reference": checkpoint} | {broken: tmp_path / "broken"}
    argv = [*sum(both.items(), ()), "--preferences", tmp_path / "pairs.jsonl", "--samples", "2",
            "--max-new-tokens", "8", "--min-valid", "0", "--out", tmp_path / "out"]
    assert dice.main(list(map(str, argv))) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("dice.py: ")

def test_duplicate_prompts_are_kept_once(checkpoint, tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    hello = ["Hello", turns[1:], [{"content": "Hello", "role": "user", "name": "x"}]]
    others = ["hello", "Hello ", "e\u0301", "\u00e9", "\ud800", "\udfff"]
    prompts, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    rows = [*hello, turns, [dict(reversed(turn.items())) for turn in turns], *others] * 2
    files.write_rows(prompts, [{"prompt": prompt} for prompt in rows])
    files.write_rows(pairs, [GOOD, GOOD, GOOD | {"prompt": turns}, GOOD | {"prompt": "Hi"}])
    base = ["--model", checkpoint, "--preferences", pairs]
    given, own = dice.Run(parsed(*base, "--prompts", prompts)), dice.Run(parsed(*base))
    assert [p.content for p in given.prompts] == ["Hello", turns, *others]
    assert [p.content for p in own.prompts] == ["Hello", turns, "Hi"]
    assert len(own.offline) == 4  # a pair may be there twice

def test_a_prompt_in_both_sets_is_not_trained_on_twice(world):
    pairs = [(f"{name}{i}", "Yes, of course.", "No.") for name in ("Both ", "Offline ") for i in range(4)]
    pairs += [([{"role": "user", "content": "Both 1"}], "Another one.", "Not.")]  # the same prompt
    code, _, out = world([f"Both {i}" for i in range(4)], pairs, lambda i, k: f"word {k} " * (k + 1))
    new, old = ([prompt for prompt, _, _ in mixed(out, source)] for source in ("generated", "replayed"))
    assert code == 0 and new and old and not {*new} & {*old} and len({*new}) == len(new)

def test_a_run_in_bfloat16_leaves_bfloat16_weights_and_finite_rewards(world):
    code, _, out = world(["P", "Q"], OFFLINE, lambda i, k: f"word {k} " * (k + 1), "--dtype", "bfloat16")
    weights = load_file(out / "round-1" / "policy" / "model.safetensors")
    assert code == 0 and {x.dtype for x in weights.values()} == {torch.bfloat16}
    assert all(math.isfinite(row["reward"]) for row in rows_of(out / "round-1" / "samples.jsonl"))

# ------------------------------------------------------------------------------------- what a round says
@pytest.mark.parametrize("which, key, other, told", [
    ("previous", "kl_to_previous", "kl_to_first", "KL of pi_t to pi_{t-1}"),
    ("first", "kl_to_first", "kl_to_previous", "KL of pi_t to the first model")])
def test_the_kl_is_named_by_the_model_that_it_is_measured_to(which, key, other, told, world, checkpoint):
    argv = ["--rounds", "2", "--reward-reference", which, "--lr", "1e-3"]
    code, printed, out = world(["P", "Q"], OFFLINE, lambda i, k: f"word {k} " * (k + 1), *argv)
    assert code == 0 and printed.err.count(told) == 2
    assert key.replace("_", " ") in printed.out and other.replace("_", " ") not in printed.out  # the table
    rounds = [row for row in rows_of(out / "metrics.jsonl") if "alpha" in row]
    samples = rows_of(out / "round-2" / "samples.jsonl")
    check_logprobs(checkpoint if which == "first" else out / "dpo", samples, "prev_logprob")
    kl = np.mean([row["logprob"] - row["prev_logprob"] for row in samples])
    assert rounds[1][key] == pytest.approx(kl, abs=1e-9) and abs(kl) > 1e-3
    assert other not in rounds[0] | rounds[1]

def lossy(i, k):
    """Answers to 6 prompts: 3 are cut, 1 has too few characters, 1 says one thing, 1 gives a pair."""
    return ("word " * (k + 1), "length") if i < 3 else ["y", "Always the same.", "word " * (k + 1)][i - 3]

def test_a_round_says_how_many_prompts_gave_a_pair_and_why_the_others_did_not_and_warns_early(world):
    code, told, out = world([*"PQRSTU"], OFFLINE, lossy, "--chunk", "4")
    line = "1 of 6 prompts gave a pair (the others: 3 cut, 1 too few valid, 1 all equal)"
    assert code == 0 and f"round-1: {line}" in told.err.splitlines()
    assert f"- round-1: {line}" in (out / "report.md").read_text().splitlines()
    assert "WARNING: only 1 of 6 prompts gave a pair; of 3, answers were cut: raise --max-new" in told.err
    row = next(row for row in rows_of(out / "metrics.jsonl") if "alpha" in row)
    keys = ("prompts", "prompts_with_pair", "prompts_cut", "prompts_too_few_valid", "prompts_all_equal")
    assert [row[key] for key in keys] == [6, 1, 3, 1, 1]
    warned = "WARNING: 4 of the 4 longest prompts will give no pair; of 3, answers were cut"  # after a chunk
    assert told.err.count("will give no pair") == 1 and warned in told.err
    assert told.err.index(warned) < told.err.index("round-1: alpha")

def test_a_round_in_which_most_prompts_give_a_pair_does_not_warn_of_the_others(world):
    code, told, _ = world([*"STUVW"], OFFLINE, lambda i, k: lossy(min(i + 4, 5), k))
    assert code == 0 and "4 of 5 prompts gave a pair (the others: 1 all equal)" in told.err
    assert "WARNING: only" not in told.err and "will give no pair" not in told.err

@pytest.mark.parametrize("reward, told, code", [
    (lambda prompt, text: -len(text), "the reward agrees with 0% of 2 held-out offline pairs: not better", 0),
    (lambda *_: 1.5, "the two answers of each of 2 held-out offline pairs have the same reward", 2)])
def test_a_reward_that_knows_nothing_is_named_before_anything_is_sampled(
        reward, told, code, world, monkeypatch):
    rewarded(monkeypatch, reward)
    def says(i, k):
        print("sampling", file=sys.stderr)
        return f"word {k} " * (k + 1)
    ended, printed, _ = world(["P", "Q"], OFFLINE * 4, says, "--held-out", "2")
    words = [line for line in printed.err.splitlines() if line == "sampling" or told in line]
    assert ended == code and words[0].startswith("round-1: WARNING: ") and words[1] == "sampling"
    # Told again at the end of the run; and where all rewards are equal, the length alone makes no pairs.
    assert told in printed.out if code == 0 else EQUAL in printed.err
    assert printed.err.count(told) == 1

@pytest.mark.parametrize("changes, told", [
    ({}, None), ({"offline_agreement": None, "held_out_pairs": 0}, None),
    ({"prompts_with_pair": 3, "prompts_all_equal": 5}, "raise --temperature"),
    ({"prompts_with_pair": 3, "prompts_too_few_valid": 5}, "between --min-chars"),
    ({"offline_agreement": 0.53}, "53% of 256 held-out offline pairs: not better than a coin (50% ± 3%)"),
    ({"offline_agreement": 0.54}, None), ({"offline_agreement": 16 / 26, "held_out_pairs": 26}, None),
    ({"offline_agreement": 15 / 26, "held_out_pairs": 26}, "58% of 26 held-out offline pairs: not better"),
    ({"answer_chars": 160}, "have grown"), ({"truncated": 0.3}, "cut by --max-new-tokens")])
def test_warnings_name_what_goes_wrong(changes, told):
    fine = {"prompts": 8, "prompts_with_pair": 8, "prompts_cut": 0, "prompts_too_few_valid": 0,
            "prompts_all_equal": 0, "held_out_pairs": 256, "offline_agreement": 0.6, "offline_tied": 0,
            "answer_chars": 100, "truncated": 0}
    found = list(report.warnings(fine | changes, fine))
    assert len(found) == (told is not None) and all(told in warning for warning in found)
