"""The method against something simpler: float64 loops, the uncached forward, worked numbers, transformers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import dice
import model as models
from data import tiny
from model import Config, InputError

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/real")

LLAMA = Config(vocab_size=90, context=64, layers=2, width=32, heads=4, kv_heads=2, head_size=10, hidden=40)
GPT2 = Config(
    vocab_size=90,
    context=64,
    layers=2,
    width=32,
    heads=4,
    kv_heads=4,
    head_size=8,
    hidden=64,
    position="learned",
    norm="layer",
    mlp="gelu",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tied=True,
)
QWEN2 = Config(
    vocab_size=90,
    context=64,
    layers=2,
    width=32,
    heads=4,
    kv_heads=1,
    head_size=8,
    hidden=40,
    qkv_bias=True,
    tied=True,
    rope_theta=1e6,
)
LLAMA3 = Config(
    vocab_size=90,
    context=64,
    layers=2,
    width=32,
    heads=4,
    kv_heads=2,
    head_size=16,
    hidden=40,
    rope_theta=5e5,
    rope_scaling={
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)
FAMILIES = pytest.mark.parametrize(
    "config", [LLAMA, GPT2, QWEN2, LLAMA3], ids=["llama", "gpt2", "qwen2", "llama3"]
)


def network(config, seed=0):
    """Random weights large enough for sharp and varied distributions."""
    net = dice.new_model(config, seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(
                torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.numel())) * 0.15
                + (p == 1)
            )
    return net


def random_ids(rng, *lengths, vocab=90):
    return [rng.integers(4, vocab, n).tolist() for n in lengths]


# ------------------------------------------------------------------------------------- Transformer and cache


@FAMILIES
@torch.no_grad()
def test_cached_logits_equal_uncached_for_prefill_single_steps_and_a_second_chunk(config):
    net = network(config)
    tokens = torch.randint(0, 90, (3, 24), generator=torch.Generator().manual_seed(1))
    whole = net.logits(net(tokens))
    cache, parts, start = dice.KVCache(config, 3, 40, "cpu", torch.float32), [], 0
    for size in (7, 5, 1, 1, 8, 1, 1):
        parts.append(net.logits(net(tokens[:, start : start + size], cache)))
        cache.length += size
        cache.used += size
        start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_rows_of_different_length_decode_as_if_alone():
    net, rng = network(LLAMA), np.random.default_rng(0)
    prompts, answers = random_ids(rng, 3, 11, 20), random_ids(rng, 6, 6, 6)
    tokens, length = dice.pad(prompts, "cpu")
    cache = dice.KVCache(LLAMA, 3, 40, "cpu", torch.float32)
    net(tokens, cache)
    cache.length, cache.used = length.clone(), 20
    for t in range(6):
        step = net(torch.tensor([[a[t]] for a in answers]), cache)[:, 0]
        cache.length += 1
        cache.used += 1
        for row in range(3):
            alone = net(torch.tensor([prompts[row] + answers[row][: t + 1]]))[0, -1]
            torch.testing.assert_close(step[row], alone, atol=1e-5, rtol=1e-4)


WIDE = Config(
    vocab_size=512, context=256, layers=6, width=128, heads=8, kv_heads=2, head_size=16, hidden=352
)


@torch.no_grad()
def test_bfloat16_log_probs_are_no_further_from_float32_than_those_of_transformers(tmp_path):
    hf = pytest.importorskip("transformers")
    exact = network(WIDE)
    rng, (_, tokenizer) = np.random.default_rng(0), dice.tiny_model()
    models.write_checkpoint(tmp_path / "model", WIDE, exact.state_dict(), tokenizer)
    tokens = torch.tensor(random_ids(rng, *[120] * 16, vocab=512))

    def token_logprobs(logits):  # (16, 119)
        return logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]

    right = token_logprobs(exact.logits(exact(tokens)))
    ours = token_logprobs(exact.bfloat16().logits(exact(tokens))) - right
    net = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    theirs = token_logprobs(net(tokens).logits) - right
    assert ours.abs().mean() <= 1.03 * theirs.abs().mean()
    assert ours.square().mean() <= 1.06 * theirs.square().mean()


@torch.no_grad()
def test_sampling_and_scoring_agree_in_bfloat16():
    """The log-probs of sampled tokens, step by step with a cache and in one pass: within 0.02 nats a token on
    average, 0.2 at most. (What is stored is always of the scoring pass.)"""
    net, rng = network(WIDE).bfloat16(), np.random.default_rng(0)
    prompt, answer = random_ids(rng, 30, vocab=512)[0], random_ids(rng, 120, vocab=512)[0]
    tokens = torch.tensor([prompt + answer])
    once = net.logits(net(tokens)).float().log_softmax(-1)[0, len(prompt) - 1 : -1]
    cache, steps = dice.KVCache(WIDE, 1, 160, "cpu", torch.bfloat16), []
    for part in (tokens[:, : len(prompt)], *tokens[:, len(prompt) : -1].split(1, dim=1)):
        steps.append(net.logits(net(part, cache))[:, -1].float().log_softmax(-1))
        cache.length += part.shape[1]
        cache.used += part.shape[1]
    target = torch.tensor(answer)[:, None]
    gap = (once.gather(1, target) - torch.cat(steps).gather(1, target)).abs()
    assert gap.mean() < 0.02 and gap.max() < 0.2


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama3", "mistral", "qwen2"])
@torch.no_grad()
def test_logits_equal_transformers(kind, tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    if kind == "gpt2":
        net = hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        )
    elif kind == "mistral":
        net = hf.MistralForCausalLM(hf.MistralConfig(**shape, sliding_window=None, head_dim=12))
    elif kind == "qwen2":
        net = hf.Qwen2ForCausalLM(hf.Qwen2Config(**shape, tie_word_embeddings=True))
    else:
        scaling = {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        }
        net = hf.LlamaForCausalLM(hf.LlamaConfig(**shape, **(scaling if kind == "llama3" else {})))
    for p in net.parameters():
        p.mul_(4) if p.dim() == 2 else p.add_(torch.randn_like(p) * 0.1)
    net.eval().save_pretrained(tmp_path)
    tokens = torch.randint(0, 90, (2, 50))
    ours = dice.load_model(tmp_path, "cpu")
    torch.testing.assert_close(ours.logits(ours(tokens)), net(tokens).logits, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------- sampler


def sample_all(net, prompts, samples, **options):
    options = {"stop_ids": (1, 2, 3), "seed": 0, "max_new_tokens": 30, "rows": 16, **options}
    found = {
        (index, k): (ids, finish)
        for index, k, ids, finish in dice.generate(net, prompts, samples, **options)
    }
    assert len(found) == len(prompts) * samples
    return found


@FAMILIES
def test_greedy_equals_argmax_of_the_uncached_forward(config):
    net, prompts = network(config), random_ids(np.random.default_rng(0), 5, 1, 17)
    for (index, _), (ids, finish) in sample_all(net, prompts, 1, temperature=0, rows=2).items():
        expected = []
        while len(expected) < 30 and (not expected or expected[-1] not in (1, 2, 3)):
            with torch.no_grad():
                expected.append(
                    int(net.logits(net(torch.tensor([prompts[index] + expected])))[0, -1].argmax())
                )
        assert ids == expected
        assert finish == ("stop" if ids[-1] in (1, 2, 3) else "length")


def test_a_sample_depends_on_seed_round_prompt_and_number_alone():
    net, prompts = network(LLAMA), random_ids(np.random.default_rng(0), 5, 1, 17, 30, 9, 2)
    whole = sample_all(net, prompts, 4)
    again = sample_all(net, prompts[::-1], 4, rows=4)  # another order, other neighbours, another batch
    assert {(5 - i, k): v for (i, k), v in again.items()} == whole
    alone = sample_all(net, [prompts[3]], 4, rows=100)
    assert all(alone[0, k] == whole[3, k] for k in range(4))
    for other in (sample_all(net, prompts, 4, seed=1), sample_all(net, prompts, 4, round=1)):
        assert sum(other[key] != whole[key] for key in whole) > 20


def test_samples_end_with_a_stop_token_or_at_the_limit_and_differ():
    net, prompts = network(LLAMA), random_ids(np.random.default_rng(0), 5, 1, 60)
    found = sample_all(net, prompts, 16, stop_ids=(7, 8))
    for (index, _), (ids, finish) in found.items():
        limit = min(30, LLAMA.context - len(prompts[index]))
        assert not set(ids[:-1]) & {7, 8} and len(ids) <= limit
        assert finish == ("stop" if ids[-1] in (7, 8) else "length") and (
            finish == "stop" or len(ids) == limit
        )
    assert {finish for _, finish in found.values()} == {"stop", "length"}
    assert len({found[0, k][0][0] for k in range(16)}) > 4  # the first token is drawn for each sample


class Recorded:
    """A CUDA graph without CUDA: does the work again, for the same rows, on the device alone."""

    def __init__(self, work, device):
        self.work, self.flight = work, work.func.__self__

    def replay(self):
        assert self.work.args[0] >= len(self.flight.owner)
        used = self.flight.cache.used
        self.work()
        assert self.flight.cache.used == used  # no Python runs in a replay


def ragged_attention(
    q, k, v, starts, k_starts, longest_q, longest_k, *, dropout_p, is_causal, return_debug_mask, seqused_k
):
    """What torch documents of varlen_attn, row by row in float64: sequence b has the queries from starts[b]
    on and the keys from k_starts[b] on, of which seqused_k[b] count, and the last query sees all of these."""
    assert is_causal and not (dropout_p or return_debug_mask) and q.shape[0] == int(starts[-1])
    assert {x.dtype for x in (starts, k_starts, seqused_k)} == {torch.int32}
    y, group = torch.empty_like(q), q.shape[1] // k.shape[1]
    for b in range(len(starts) - 1):
        mine, used = range(int(starts[b]), int(starts[b + 1])), int(seqused_k[b])
        assert len(mine) == longest_q <= used <= k_starts[b + 1] - k_starts[b] == longest_k
        for t, i in enumerate(mine):
            here = slice(int(k_starts[b]), int(k_starts[b]) + used - len(mine) + t + 1)
            for head in range(q.shape[1]):
                keys, values = (x[here, head // group].double() for x in (k, v))  # (S, D)
                weights = (keys @ q[i, head].double() / q.shape[-1] ** 0.5).softmax(0)
                y[i, head] = weights @ values
    return y, None, None, None, None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The sampler takes CUDA's way: ragged attention, recorded steps of few sizes, a look now and then."""
    monkeypatch.setattr(dice, "has_ragged_attention", lambda config, device, dtype: True)
    monkeypatch.setattr(dice, "record", Recorded)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", ragged_attention)


@FAMILIES
def test_ragged_attention_and_recorded_steps_draw_the_same(config, request):
    net, prompts = network(config), random_ids(np.random.default_rng(0), 5, 1, 17, 30, 9, 2)
    options = dict(rows=12, stop_ids=range(7))
    known = sample_all(net, prompts, 4, **options)
    request.getfixturevalue("as_on_a_gpu")
    assert sample_all(net, prompts, 4, **options) == known
    streamed = []
    one = sample_all(net, prompts[2:3], 1, **options, on_token=streamed.append)
    assert one[0, 0] == known[2, 0] and streamed == one[0, 0][0]


@FAMILIES
def test_scores_by_ragged_attention_are_the_same(config, request):
    net, samples = network(config), random_samples()
    known = dice.score(net, samples, dice.Budget(200, "scoring"))
    request.getfixturevalue("as_on_a_gpu")
    assert dice.score(net, samples, dice.Budget(200, "scoring")) == pytest.approx(known, abs=1e-4)


def test_a_step_on_a_gpu_waits_for_nothing(monkeypatch):
    """On the device "meta" there are shapes and no numbers: whoever asks for one fails. The attention is
    torch's own."""
    monkeypatch.setattr(dice, "has_ragged_attention", lambda config, device, dtype: True)
    with torch.device("meta"):
        net = dice.Transformer(LLAMA3).bfloat16()
    for top_p in (1.0, 0.9):
        flight = dice.Flight(net, 8, 60, 30, [1, 2], 0.9, top_p)
        flight.owner, flight.cache.used = [(0, 0)] * 6, 5
        flight.advance(8)
        assert flight.token.shape == (8,)


def test_each_prompt_is_prefilled_once(monkeypatch):
    net, prompts, seen = network(LLAMA), random_ids(np.random.default_rng(0), 5, 9, 7), []
    forward = net.forward
    monkeypatch.setattr(
        net, "forward", lambda tokens, cache=None: seen.append(tokens.shape) or forward(tokens, cache)
    )
    sample_all(net, prompts, 4)
    assert sum(rows for rows, width in seen if width > 1) == 3
    assert seen[-1][0] < 12  # rows that had ended no longer cost anything


def test_pick_draws_from_the_distribution_and_from_its_nucleus():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, -30.0]).repeat(20000, 1)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.5):
        share = torch.bincount(dice.pick(logits, uniform, temperature, 1.0), minlength=6) / 20000
        torch.testing.assert_close(share, (logits[0] / temperature).softmax(0), atol=0.012, rtol=0)
    rng = np.random.default_rng(0)
    for top_p, size in (
        (0.1, 50),
        (0.5, 50),
        (0.9, 50),
        (0.99, 50),
        (0.9, 3000),
    ):  # the last needs more than 64
        row = torch.tensor(rng.normal(size=size) * (2 if size == 50 else 1), dtype=torch.float32)
        probs, order = row.softmax(0).sort(descending=True)
        nucleus = set(
            order[: int((probs.cumsum(0) < top_p).sum()) + 1].tolist()
        )  # by sorting, as it is defined
        drawn = set(dice.pick(row.repeat(20000, 1), uniform, 1.0, top_p).tolist())
        assert drawn <= nucleus and len(drawn) >= 0.6 * len(nucleus)
    edge = torch.tensor([0.0, 1 - 2**-24])
    assert dice.pick(torch.tensor([[-math.inf, 0.0, -math.inf]] * 2), edge, 1.0, 1.0).tolist() == [1, 1]


@needs_real
def test_stories260k_goes_on_as_it_is_known_to():
    directory = REAL / "stories260k"
    net, tokenizer = dice.load_model(directory, "cpu"), models.read_tokenizer(directory)
    [(_, _, ids, _)] = dice.generate(
        net,
        [tokenizer.raw("Once upon a time")],
        1,
        stop_ids=tokenizer.stop_ids,
        seed=0,
        max_new_tokens=40,
        rows=1,
        temperature=0,
    )
    assert tokenizer.decode(ids).startswith(
        ", there was a little girl named Lily. She loved to play with her toys and her friends."
    )


# ------------------------------------------------------------------------------------- log-probs


@FAMILIES
@torch.no_grad()
def test_sequence_logprobs_equal_a_float64_loop(config):
    net, rng = network(config), np.random.default_rng(0)
    prompts, answers = random_ids(rng, 3, 1, 12, 30), random_ids(rng, 7, 1, 20, 5)
    answers = [ids + [2] for ids in answers]  # the end token counts
    found = dice.sequence_logprobs(net, prompts, answers)
    double = network(config).double()
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        total = 0.0
        for t, token in enumerate(answer):
            total += (
                double.logits(double(torch.tensor([prompt + answer[:t]])))[0, -1]
                .log_softmax(-1)[token]
                .item()
            )
        assert found[row].item() == pytest.approx(total, abs=2e-4)
    alone = torch.cat([dice.sequence_logprobs(net, [p], [a]) for p, a in zip(prompts, answers)])
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=0)  # padding changes nothing


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
    net, samples, read = network(config).double(), random_samples(), []
    known = [dice.sequence_logprobs(net, [x.prompt.ids], [x.tokens]).item() for x in samples]
    real = dice.prefill
    monkeypatch.setattr(dice, "prefill", lambda model, prompts: read.extend(prompts) or real(model, prompts))
    for tokens in (1, 60, 10**6):
        assert dice.score(net, samples, dice.Budget(tokens, "scoring")) == pytest.approx(known, abs=1e-9)
        assert sorted(map(len, read)) == [1, 5, 9, 17, 60]
        read.clear()


def test_log_probs_in_chunks_have_the_same_values_and_gradients_and_keep_no_large_logits(monkeypatch):
    rng, results = np.random.default_rng(0), []
    prompts, answers = random_ids(rng, 3, 1, 12), random_ids(rng, 7, 9, 20)
    for budget in (2**26, 90 * 5):
        net, rows, kept = network(LLAMA), [], []
        monkeypatch.setattr(dice, "LOGITS", budget)
        chunks = dice.TokenLogprobs.chunks
        monkeypatch.setattr(
            dice.TokenLogprobs,
            "chunks",
            lambda *given: (rows.append(chunk[1].shape) or chunk for chunk in chunks(*given)),
        )
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
            logprobs = dice.sequence_logprobs(net, prompts, answers)
        (logprobs * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
        monkeypatch.setattr(dice.TokenLogprobs, "chunks", chunks)
        assert (
            sum(n for n, _ in rows) == 2 * 36
        )  # forward and backward; prompts and padding never get there
        assert not any(
            90 in shape for shape in kept if shape != net.head.weight.shape
        )  # no logits are kept
        results.append([logprobs.detach(), *(p.grad for p in net.parameters())])
    assert max(n for n, _ in rows) <= 5
    for whole, chunked in zip(*results):
        torch.testing.assert_close(whole, chunked, atol=1e-4, rtol=1e-4)


def test_gradients_of_the_log_probs_equal_those_of_log_softmax():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, 6, dtype=torch.float64, generator=generator).requires_grad_() for n in (9, 11)
    )
    targets, scale = (
        torch.randint(0, 11, (9,), generator=generator),
        torch.randn(9, generator=generator).double(),
    )
    found = dice.TokenLogprobs.apply(hidden, weight, targets)
    expected = (hidden @ weight.T).log_softmax(-1)[range(9), targets]
    torch.testing.assert_close(found, expected)
    for a, b in zip(*(torch.autograd.grad((x * scale).sum(), (hidden, weight)) for x in (found, expected))):
        torch.testing.assert_close(a, b)


def test_batches_hold_every_index_once_within_the_budget():
    sizes = np.random.default_rng(0).integers(1, 400, 300).tolist() + [5000]
    groups = dice.batches(sizes, 2000)
    assert sorted(i for group in groups for i in group) == list(range(301))
    assert all(len(group) * max(sizes[i] for i in group) <= 2000 or len(group) == 1 for group in groups)
    padded = sum(len(group) * max(sizes[i] for i in group) for group in groups)
    assert padded < 1.1 * sum(sizes)


# ------------------------------------------------------------------------------------- formulas

LENGTHS = np.array([[100, 400, 250, 50], [300, 120, 80, 500], [60, 90, 700, 200]], dtype=float)
REWARDS = np.array([[1.0, 6.0, 3.5, 0.2], [4.0, 2.5, 1.0, 8.0], [0.5, 1.2, 9.0, 3.0]])
VALID = np.ones((3, 4), dtype=bool)


def test_alpha_on_the_worked_example():
    for alpha, gap in (
        (0, 470),
        (0.0119, 470),
        (0.0121, 303.3333),
        (0.0135, 90),
        (0.014, 16.6667),
        (0.0145, -110),
    ):
        assert dice.length_gap(REWARDS, LENGTHS, VALID, alpha) == pytest.approx(gap, abs=1e-3)
    alpha = dice.search_alpha(REWARDS, LENGTHS, VALID)
    assert 0.013636 < alpha < 0.014474
    best, worst = dice.best_and_worst(REWARDS, LENGTHS, VALID, alpha)
    assert LENGTHS[range(3), best].tolist() == [400, 500, 200] and LENGTHS[range(3), worst].tolist() == [
        50,
        300,
        700,
    ]


def test_alpha_is_as_good_as_a_dense_scan_and_zero_where_nothing_is_to_be_taken_out():
    rng = np.random.default_rng(0)
    for _ in range(30):
        length = rng.integers(10, 500, (20, 6)).astype(float)
        reward = 0.01 * length + rng.normal(size=length.shape)
        valid = rng.random(length.shape) < 0.8
        valid[:, :2] = True
        found = abs(dice.length_gap(reward, length, valid, dice.search_alpha(reward, length, valid)))
        scan = min(abs(dice.length_gap(reward, length, valid, a)) for a in np.arange(0, 0.1, 1e-4))
        assert found <= scan + 1e-9
    assert dice.search_alpha(-LENGTHS, LENGTHS, VALID) == 0
    assert dice.search_alpha(REWARDS, np.full((3, 4), 7.0), VALID) == 0
    assert (
        dice.search_alpha(np.zeros((1, 2)), np.array([[9.0, 1.0]]), VALID[:1, :2]) >= 0
    )  # equal rewards: no hang


# ------------------------------------------------------------------------------------- pairing and replay


def settings(**changes):
    return dice.Settings(**{"samples": 4, "min_valid": 0.5, "min_chars": 0, **changes})


def answers(prompt, *rows):
    """Samples of one prompt from (text, reward) or (text, reward, finish)."""
    return [
        dice.Sample(prompt, [5], text, k, *(finish or ["stop"]), logprob=0.0, previous=0.0, reward=reward)
        for k, (text, reward, *finish) in enumerate(rows)
    ]


def test_pairs_are_best_against_worst_of_the_valid_and_different_answers():
    a, b, c, d = (dice.Prompt(name, [5]) for name in "abcd")
    samples = (
        answers(a, ("one", 1.0), ("two", 5.0), ("six", -3.0), ("cut", 9.0, "length"))
        + answers(b, ("same", 1.0), ("same", 2.0), ("same", 3.0), ("same", 4.0))  # one text: no pair
        + answers(c, ("uno", 2.0), ("due", 2.0), ("tre", 2.0), ("sei", 2.0))  # equal rewards: no pair
        + answers(d, ("x", 1.0), ("cut", 2.0, "length"), ("cut", 3.0, "length"), ("cut", 4.0, "length"))
    )
    alpha, pairs = dice.shape_and_pair(samples, settings())
    assert alpha == 0 and [(p.chosen.text, p.rejected.text) for p in pairs] == [("two", "six")]
    assert pairs[0].source == "generated" and samples[0].shaped == 1.0
    with pytest.raises(InputError, match="no prompt has"):
        dice.shape_and_pair(answers(d, *[("cut", 1.0, "length")] * 4), settings())
    with pytest.raises(InputError, match="no prompt has"):
        dice.shape_and_pair(
            answers(a, ("one", 1.0), ("four", 2.0), ("one", 3.0), ("four", 4.0)), settings(max_chars=4)
        )


def test_shaping_takes_the_length_bias_out():
    rng, samples = np.random.default_rng(0), []
    for i in range(100):
        lengths = rng.integers(5, 200, 4)
        samples += answers(
            dice.Prompt(str(i), [5]),
            *((f"{k}" * n, 0.05 * n + rng.normal()) for k, n in enumerate(lengths)),
        )
    gap = {
        alpha: np.mean(
            [
                len(p.chosen.text) - len(p.rejected.text)
                for p in dice.shape_and_pair(samples, settings(alpha=alpha))[1]
            ]
        )
        for alpha in ("0", "auto")
    }
    assert gap["0"] > 80 and abs(gap["auto"]) < 3


def pair_on(key, source):
    prompt = dice.Prompt(key, [5])
    return dice.Pair(*(dice.Sample(prompt, [5], text) for text in ("good", "bad")), source)


@pytest.mark.parametrize("gamma", [0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 1])
@pytest.mark.parametrize("overlap", [0, 30, 100])
def test_the_mixture_has_the_ratio_asked_for_and_no_prompt_twice(gamma, overlap):
    generated = [pair_on(f"p{i}", "generated") for i in range(100)]
    offline = [pair_on(f"p{i}", "replayed") for i in range(100 - overlap, 200 - overlap)]
    mixture = dice.ReplayBuffer(offline).mix(generated, gamma, np.random.default_rng(0))
    old = sum(p.source == "replayed" for p in mixture)
    assert abs(old - gamma * len(mixture)) <= 0.5
    keys = [p.prompt.key for p in mixture]
    assert len(set(keys)) == len(keys)
    most = min(100 / max(gamma, 1e-9), 100 / max(1 - gamma, 1e-9), 200 - overlap)
    assert len(mixture) >= most - 1 / max(min(gamma, 1 - gamma), 0.1)
    again = dice.ReplayBuffer(offline).mix(generated, gamma, np.random.default_rng(0))
    other = dice.ReplayBuffer(offline).mix(generated, gamma, np.random.default_rng(1))
    assert [p.prompt.key for p in again] == keys != [p.prompt.key for p in other]


def test_mixture_sizes():
    same_prompts = list(range(10_000, -1, -1))
    assert dice.mixture_sizes(same_prompts, 0.7) == (3000, 7000)  # int() would lose one row
    assert dice.mixture_sizes(same_prompts, 0.5) == (5000, 5000)
    assert dice.mixture_sizes([100] * 6, 0.5) == (5, 5)
    assert dice.mixture_sizes([2] * 101, 0.25) == (6, 2)
    assert dice.mixture_sizes([100] * 6, 0.01) == (5, 0)  # not even one in a hundred
    for gamma, generated, offline in ((0.5, 3, 0), (0.5, 0, 3), (1, 3, 0), (0, 0, 3)):
        with pytest.raises(InputError, match="--gamma"):
            dice.ReplayBuffer([pair_on(f"o{i}", "replayed") for i in range(offline)]).mix(
                [pair_on(f"g{i}", "generated") for i in range(generated)], gamma, np.random.default_rng(0)
            )


# ------------------------------------------------------------------------------------- training


class Bench:
    """As much of a Run as training needs."""

    def __init__(self, **changes):
        self.settings, self.rows = settings(lr=1e-3, warmup=0, dtype="float32", **changes), []
        self.train_budget = dice.Budget(self.settings.train_tokens, "training")
        self.score_budget = dice.Budget(self.settings.score_tokens, "scoring")

    def log(self, row):
        self.rows.append(row)

    def log_speed(self, *_, **__):
        pass

    def resume_training(self, *_):
        return 0

    save_training = save_culprits = log_speed


def random_pairs(net, count, seed=0):
    rng, pairs = np.random.default_rng(seed), []
    for i in range(count):
        prompt = dice.Prompt(str(i), random_ids(rng, int(rng.integers(1, 10)))[0])
        pairs.append(
            dice.Pair(
                *(
                    dice.Sample(prompt, random_ids(rng, int(rng.integers(1, 30)))[0] + [2], "")
                    for _ in range(2)
                ),
                "replayed",
            )
        )
    samples = [x for p in pairs for x in (p.chosen, p.rejected)]
    for x, value in zip(samples, dice.score(net, samples, dice.Budget(500, "scoring"))):
        x.logprob = value
    return pairs


def train_dpo(run, net, pairs, lr, steps):
    s = run.settings
    losses = dice.preference_losses
    dice.train(run, "dpo", net, losses, pairs, lr=lr, steps=steps, epochs=s.epochs, batch=s.batch)


def test_micro_batches_change_nothing_and_dpo_learns_the_pairs():
    weights = []
    for train_tokens in (10**6, 100, 1):
        net, run = network(LLAMA), Bench(batch=6, epochs=3, train_tokens=train_tokens)
        train_dpo(run, net, random_pairs(net, 20), lr=1e-3, steps=9)
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        assert run.rows[0]["loss"] == pytest.approx(
            math.log(2), abs=1e-5
        )  # policy and reference are the same
        assert run.rows[0]["accuracy"] < 1 and len(run.rows) == 9
        assert run.rows[-1]["loss"] < 0.6 and run.rows[-1]["margin"] > 0.1
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(weights[0], weights[2], atol=1e-4, rtol=0)


def test_the_logged_step_is_the_mean_over_its_pairs():
    net, run = network(LLAMA), Bench(batch=7, train_tokens=100)
    pairs = random_pairs(net, 7)
    for p in pairs:
        p.chosen.logprob -= 3  # as if the policy had moved by 3 nats since
    train_dpo(run, net, pairs, lr=1e-3, steps=1)
    row = run.rows[0]
    assert row["margin"] == pytest.approx(0.3, abs=1e-4) and row["accuracy"] == 1
    assert row["loss"] == pytest.approx(math.log(1 + math.exp(-0.3)), abs=1e-4)
    assert row["chosen_tokens"] == pytest.approx(np.mean([len(p.chosen.tokens) for p in pairs]))
    assert row["rejected_logprob"] == pytest.approx(np.mean([p.rejected.logprob for p in pairs]), abs=1e-3)


def test_warm_up_is_linear_then_constant():
    net, run = network(LLAMA), Bench(batch=2, epochs=10)
    run.settings.warmup = 4
    train_dpo(run, net, random_pairs(net, 2), lr=1e-3, steps=7)
    assert [row["lr"] for row in run.rows] == pytest.approx(
        [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3, 1e-3]
    )


def test_a_non_finite_loss_stops_before_the_step():
    net, run = network(LLAMA), Bench(batch=4)
    pairs = random_pairs(net, 8)
    pairs[5].rejected.logprob = math.nan
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(InputError, match="dpo, step .*loss nan"):
        run.settings.batch = 8
        train_dpo(run, net, pairs, lr=1e-3, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def small_world(monkeypatch):
    for name, value in (("SFT_EXAMPLES", 2000), ("PREFERENCES", 40), ("HELD_OUT", 6), ("DICE_PROMPTS", 10)):
        monkeypatch.setattr(tiny, name, value)
    return [
        "--sft-steps",
        "120",
        "--sft-lr",
        "0.01",
        "--dpo-steps",
        "2",
        "--steps",
        "2",
        "--samples",
        "4",
        "--batch",
        "4",
        "--seed",
        "3",
    ]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_whole_tiny_run_leaves_everything_it_promises_and_repeats_to_the_byte(
    small_world, tmp_path, capsys
):
    run = tmp_path / "a"
    assert dice.main([*small_world, "--out", str(run)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("length-controlled", "sft", "dpo", "round-2", "Tell me the"))
    for name in (
        "settings.json",
        "metrics.jsonl",
        "report.md",
        "sft",
        "dpo",
        "round-1/policy",
        "round-2/policy",
        "round-1/samples.jsonl",
        "round-2/pairs.jsonl",
        "evaluation/round-2.jsonl",
    ):
        assert (run / name).exists(), name
    for name in ("sft", "dpo", "round-1/policy", "round-2/policy"):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            p.name for p in (run / name).iterdir()
        }
    samples, pairs = rows_of(run / "round-1/samples.jsonl"), rows_of(run / "round-1/pairs.jsonl")
    assert len(samples) == 10 * 4 and {
        "tokens",
        "text",
        "finish",
        "policy_logprob",
        "reference_logprob",
    } <= set(samples[0])
    for row in samples:
        assert row["reward"] == pytest.approx(row["policy_logprob"] - row["reference_logprob"])
    assert {row["source"] for row in pairs} == {"generated", "replayed"}
    assert len({json.dumps(row["prompt"]) for row in pairs}) >= len(pairs) // 2
    # The stored log-probs are those of a scoring pass over the sampled tokens.
    net, tokenizer = dice.load_model(run / "dpo", "cpu"), models.read_tokenizer(run / "dpo")
    logprobs = dice.sequence_logprobs(
        net, [tokenizer.prompt(r["prompt"]) for r in samples], [r["tokens"] for r in samples]
    )
    torch.testing.assert_close(
        logprobs, torch.tensor([r["policy_logprob"] for r in samples]), atol=1e-3, rtol=0
    )

    again = tmp_path / "b"
    assert dice.main([*small_world, "--out", str(again)]) == 0
    for name in ("round-2/samples.jsonl", "round-2/pairs.jsonl", "round-2/policy/model.safetensors"):
        assert (run / name).read_bytes() == (again / name).read_bytes(), name


@needs_real
def test_a_run_on_real_weights_and_real_text(tmp_path, capsys):
    lines = (REAL / "preferences.jsonl").read_text().splitlines()
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(lines[:60]) + "\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"instruction": text}) + "\n" for text in ("Tell me a story.", "Who is Tim?"))
    )
    assert (
        dice.main(
            [
                "--model",
                str(REAL / "stories260k"),
                "--preferences",
                str(few),
                "--prompts",
                str(prompts),
                "--out",
                str(tmp_path / "run"),
                "--rounds",
                "1",
                "--samples",
                "4",
                "--min-valid",
                "0",
                "--dpo-steps",
                "2",
                "--steps",
                "2",
                "--batch",
                "4",
                "--lr",
                "1e-4",
            ]
        )
        == 0
    )
    told = capsys.readouterr()
    assert "of 60 offline pairs are used" in told.err and "round-1" in told.out
    assert (tmp_path / "run/round-1/policy/model.safetensors").exists()
    for row in rows_of(tmp_path / "run/round-1/samples.jsonl"):
        assert math.isfinite(row["reward"]) and row["tokens"]


# ------------------------------------------------------------------------------------- bad input


@pytest.fixture
def checkpoint(tmp_path):
    """A random tiny checkpoint."""
    config, tokenizer = dice.tiny_model()
    models.write_checkpoint(tmp_path / "model", config, dice.new_model(config, 0).state_dict(), tokenizer)
    return tmp_path / "model"


GOOD = '{"prompt": "Hello", "chosen": "Good day.", "rejected": "Go."}\n'


def refused(capsys, tmp_path, *argv):
    """Runs the program; its one line on stderr, after checking that nothing was written."""
    before = sorted(tmp_path.rglob("*"))
    assert dice.main([*map(str, argv), "--out", str(tmp_path / "out")]) == 2
    assert sorted(tmp_path.rglob("*")) == before
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "no rows"),
        ("{broken\n", "line 1: not valid JSON"),
        (GOOD + '{"prompt": "x"}\n', 'line 2: has no "chosen"'),
        (GOOD + "[1]\n", "line 2: not a JSON object"),
        ('{"chosen": "a", "rejected": "b"}\n', 'line 1: has no "prompt"'),
        ('{"prompt": "a", "output": ["b"]}\n', "line 1"),
        ('{"prompt": [], "chosen": "a", "rejected": "b"}\n', "line 1"),
        (
            '{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}\n',
            "line 1: an answer must",
        ),
    ],
)
def test_broken_preferences_are_refused_by_line(text, told, checkpoint, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    line = refused(capsys, tmp_path, "--model", checkpoint, "--preferences", path)
    assert told in line and "pairs.jsonl" in line


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--gamma", "1.5"], "--gamma 1.5"),
        (["--beta", "0"], "--beta 0"),
        (["--alpha", "much"], "--alpha much"),
        (["--samples", "1"], "--samples 1"),
        (["--beta", "nan"], "--beta nan"),
        (["--top-p", "0"], "--top-p 0"),
        (["--model", "nowhere"], "nowhere"),
        (["--reference", "nowhere"], "--reference"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_settings_are_refused(argv, told, tmp_path, capsys):
    assert told in refused(capsys, tmp_path, *argv)


def test_other_mistakes_are_refused(checkpoint, tmp_path, capsys):
    good, long = tmp_path / "good.jsonl", tmp_path / "long.jsonl"
    good.write_text(GOOD)
    long.write_text(GOOD + json.dumps({"prompt": "x " * 500}) + "\n")
    told = refused(capsys, tmp_path, "--model", checkpoint, "--preferences", good, "--prompts", long)
    assert "long.jsonl line 2" in told and "context of 128" in told
    assert "nothing to sample for" in refused(capsys, tmp_path, "--model", checkpoint)
    assert "--reference" in refused(capsys, tmp_path, "--model", checkpoint, "--prompts", good)
    sft = ["--model", checkpoint, "--prompts", good, "--sft-steps", "10"]
    assert "--sft-steps 10: needs answers" in refused(capsys, tmp_path, *sft)
    told = refused(capsys, tmp_path, *sft, "--preferences", good, "--reference", checkpoint)
    assert "--sft-steps 10: a policy with a --reference" in told
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, tmp_path, "--model", tmp_path / "empty", "--preferences", good)
    weights = checkpoint / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert (
        dice.main(["--model", str(checkpoint), "--preferences", str(good), "--out", str(tmp_path / "o")])
        == 2
    )
    assert "model.safetensors" in capsys.readouterr().err
    weights.write_bytes(data)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert "holds files already" in refused(capsys, tmp_path, "--model", checkpoint, "--preferences", good)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_a_reference_with_another_vocabulary_is_refused(checkpoint, tmp_path, capsys):
    _, tokenizer = dice.tiny_model()
    models.write_checkpoint(tmp_path / "other", LLAMA, dice.new_model(LLAMA, 0).state_dict(), tokenizer)
    (tmp_path / "good.jsonl").write_text(GOOD)
    told = refused(
        capsys,
        tmp_path,
        "--model",
        checkpoint,
        "--reference",
        tmp_path / "other",
        "--preferences",
        tmp_path / "good.jsonl",
    )
    assert "other: has fewer embeddings" in told


def test_the_settings_of_a_model_stand_between_the_class_and_the_command_line(monkeypatch):
    monkeypatch.setitem(models.SETTINGS, "tiny", {"beta": 0.3, "lr": 1e-3})
    parsed, _ = dice.parse_settings(["--lr", "0.5"])
    assert (parsed.beta, parsed.lr, parsed.gamma, parsed.out) == (0.3, 0.5, 0.5, "out/tiny")
