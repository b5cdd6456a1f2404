"""DICE: bootstrapping language models with DPO implicit rewards (arXiv 2406.09760), the whole method in one file.

A model pi_t that was trained with DPO from pi_{t-1} carries a reward inside itself, log pi_t(y|x) - log pi_{t-1}(y|x).
One round of DICE turns that reward into new training data, with no outside labels:

    1. sample   K answers per prompt from pi_t
    2. score    each answer's log-probability under pi_t and pi_{t-1}; the difference is its implicit reward
    3. shape    reward - alpha * length, with the alpha that takes the length bias out of the pairs
    4. pair     the best answer of a prompt against its worst
    5. replay   mix in a share gamma of the original offline pairs, on other prompts
    6. train    DPO from pi_t with reference pi_t gives pi_{t+1}; go to 1

The file reads from top to bottom: settings, Transformer, KV cache and sampler, sequence log-probs, the formulas, replay,
training, the rounds, the report. Which model (checkpoints, tokenizers, chat formats) is model.py's business.

Left out or done differently from the paper and its code:
- the tokens that were sampled are the tokens that are scored and trained on; text is never tokenised again
- alpha is found by bisection (the length gap is monotone in it), not by a scan; it is in nats per character, since the
  reward is kept free of beta (beta would only rescale both)
- no reference model is in memory while training: its log-probs are known numbers when a round's training begins
- no judge and no benchmark for real models: sample.py writes the answers that AlpacaEval's own package scores

    python dice.py                                                       on a laptop: a tiny world, SFT, DPO, DICE
    python dice.py --model DIR --reference DIR --preferences FILE        on a GPU: your policy and what it came from
"""

import argparse
import hashlib
import json
import math
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import model as models
from data import jsonl, tiny
from model import InputError

# ----------------------------------------------------------------------------------------------------------------
# Settings: every knob once. The command line and --help are made from this class.


def knob(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    # what goes in and out
    model: str = knob("tiny", "the policy: a name or a Hugging Face directory; tiny = made from nothing")
    reference: str = knob("", "the model that the policy was DPO-trained from; none = train the policy with DPO first")
    prompts: str = knob("", "JSON lines of prompts to sample for; none = the prompts of --preferences")
    preferences: str = knob("", "JSON lines of offline pairs, for the DPO stage and the replay")
    out: str = knob("", "directory of the run; none = out/NAME_OF_MODEL")
    chat: str = knob("auto", "chat format: auto, llama3, zephyr, chatml or plain")
    # the method; METHODS: the paper's values are the defaults
    rounds: int = knob(2, "DICE rounds; the paper saw no gain past the third")
    samples: int = knob(16, "K, answers sampled per prompt and round")
    gamma: float = knob(0.5, "share of offline pairs in a round's training mixture, 0 to 1")
    alpha: str = knob("auto", "length penalty in nats per character; auto = the one with no length gap in the pairs")
    beta: float = knob(0.1, "DPO's beta: how strongly the policy is held to its reference")
    labeller: str = knob("implicit", "who ranks the samples: implicit, or gold (the tiny world's judge: an upper bound)")
    # sampling
    temperature: float = knob(0.9, "of the samples; 0 = greedy")
    top_p: float = knob(1.0, "sample from the smallest set of tokens with this probability")
    max_new_tokens: int = knob(2048, "longest answer; longer ones count as cut and are dropped")
    min_chars: int = knob(3, "an answer has more characters than this, or is dropped")
    max_chars: int = knob(6700, "an answer has fewer characters than this, or is dropped")
    min_valid: float = knob(0.5, "share of a prompt's samples that must survive, or the prompt is dropped")
    # training of a round
    lr: float = knob(5e-7, "learning rate, constant after the warm-up")
    warmup: int = knob(50, "steps of linear warm-up of each stage")
    batch: int = knob(32, "pairs per optimizer step")
    steps: int = knob(300, "optimizer steps at most")
    epochs: int = knob(1, "passes over a stage's pairs at most")
    clip: float = knob(1.0, "largest gradient norm")
    max_tokens: int = knob(4096, "longest prompt + answer in training; longer offline pairs are dropped and counted")
    # the stages before the first round
    sft_steps: int = knob(0, "steps of supervised fine-tuning on the chosen answers first; 0 = none")
    sft_lr: float = knob(2e-5, "its peak learning rate, cosine to zero")
    sft_batch: int = knob(32, "its answers per step")
    dpo_steps: int = knob(300, "steps at most of the DPO stage on the offline pairs, when there is no --reference")
    dpo_lr: float = knob(5e-7, "its learning rate")
    # the machine
    seed: int = knob(0, "of everything random")
    device: str = knob("auto", "cpu, cuda, cuda:1, ...; auto = cuda where there is one")
    dtype: str = knob("auto", "float32 or bfloat16 (weights stay float32 in training); auto = bfloat16 on cuda")
    rows: int = knob(256, "sequences in flight while sampling; their KV cache must fit")
    chunk: int = knob(64, "prompts sampled as one unit of work")
    score_tokens: int = knob(32768, "padded tokens per forward pass while scoring")
    train_tokens: int = knob(8192, "padded tokens per forward and backward pass; lower it when out of memory")

    def check(self):
        def need(ok, name, what):
            if not ok:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {what}")

        for name in ("gamma", "min_valid"):
            need(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        for name in ("beta", "lr", "sft_lr", "dpo_lr", "clip"):
            need(0 < getattr(self, name) < math.inf, name, "a positive number")
        for name in ("batch", "sft_batch", "steps", "epochs", "max_new_tokens", "max_tokens", "rows", "chunk",
                     "score_tokens", "train_tokens"):
            need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("rounds", "warmup", "sft_steps", "dpo_steps", "seed", "min_chars", "max_chars"):
            need(getattr(self, name) >= 0, name, "at least 0")
        need(self.samples >= 2, "samples", "at least 2, a best and a worst")
        need(0 <= self.temperature < math.inf, "temperature", "0 or more")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(self.labeller in ("implicit", "gold"), "labeller", "implicit or gold")
        need(self.dtype in ("auto", "float32", "bfloat16"), "dtype", "auto, float32 or bfloat16")
        try:
            ok = self.alpha == "auto" or 0 <= float(self.alpha) < math.inf
        except ValueError:
            ok = False
        need(ok, "alpha", "auto or a number of 0 or more")


def parse_settings(argv=None):
    """Command line -> Settings. A value is looked for there, then in the model's own settings, then in the class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, metavar=f.type.__name__.upper(),
                            help=f"{f.metadata['help']} (default: {f.default if f.default != '' else 'none'})")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    name = given.get("model", Settings.model)
    settings = Settings(**{**models.SETTINGS.get(name, {}), **given})
    settings.out = settings.out or f"out/{Path(name).name}"
    if settings.device == "auto":
        settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.dtype == "auto":
        settings.dtype = "bfloat16" if settings.device.startswith("cuda") else "float32"
    settings.check()
    return settings


# ----------------------------------------------------------------------------------------------------------------
# The Transformer: one forward for training, prefill and decoding.
# Shapes: B batch, T time, C channels (width), H heads, G query heads per KV head, D head size, S cached time, V vocabulary.


def rotary_frequencies(config):
    """Angle per position of each pair of channels, (D/2,) float32; with Llama-3.1's stretching of the slow ones."""
    freq = config.rope_theta ** -(torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size)
    if config.rope_scaling:
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # full turns within the old context
        slow, fast = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - slow) / (fast - slow)).clamp(0, 1)  # 1: fast, unchanged; 0: slow, stretched by factor
        freq = freq * keep + freq / s["factor"] * (1 - keep)
    return freq


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864) in Llama's layout: channel i turns with channel i + D/2. x (B, H, T, D)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index = index
        C, D, F_ = config.width, config.head_size, config.hidden
        self.heads, self.kv_heads, self.head_size, self.mlp = config.heads, config.kv_heads, D, config.mlp
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.qkv = nn.Linear(C, (config.heads + 2 * config.kv_heads) * D, bias=config.qkv_bias)
        self.out = nn.Linear(config.heads * D, C, bias=config.out_bias)
        self.up = nn.Linear(C, 2 * F_ if config.mlp == "swiglu" else F_, bias=config.mlp_bias)
        self.down = nn.Linear(F_, C, bias=config.mlp_bias)

    def forward(self, x, position, rope, cache=None, mask=None):
        """x (B, T, C) at position (B or 1, T) -> (B, T, C). No mask means causal attention among these T."""
        x = x + self.attention(self.norm1(x), position, rope, cache, mask)
        h = self.up(self.norm2(x))  # (B, T, F) or, gate and value side by side, (B, T, 2F)
        if self.mlp == "swiglu":
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        else:
            h = F.gelu(h, approximate="tanh")
        return x + self.down(h)

    def attention(self, x, position, rope, cache, mask):
        B, T, _ = x.shape
        H, K, D = self.heads, self.kv_heads, self.head_size
        qkv = self.qkv(x).view(B, T, H + 2 * K, D).transpose(1, 2)  # (B, H+2K, T, D)
        qk, v = qkv.split([H + K, K], dim=1)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.split([H, K], dim=1)
        if cache is not None:
            cache.write(self.index, position, k, v)
        if mask is None:  # training, prefill and scoring: no mask is built, so CUDA serves it with Flash attention
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
        else:
            # The G query heads that share a KV head go in as G times more queries of that one head, so that keys
            # and values are read once, not repeated G times.
            k, v = cache.read(self.index, B)  # (B, K, S, D)
            q = q.reshape(B, K, H // K * T, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))


def make_norm(config):
    return {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[config.norm](config.width, eps=config.eps)


class Transformer(nn.Module):
    """GPT-2 and Llama in one: they differ by fields of model.Config, and its parameter names are model.py's."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context, config.width) if config.position == "learned" else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = make_norm(config)
        self.head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.frequencies = rotary_frequencies(config) if config.position == "rotary" else None  # float32 whatever dtype

    @property
    def device(self):
        return self.embed.weight.device

    def forward(self, tokens, cache=None):
        """Token ids (B, T) -> hidden states after the last norm (B, T, C); logits() turns these into logits.

        Without a cache, or with an empty one, rows start at position 0 and attention is plainly causal: rows are padded
        on the right, where nothing that counts can see the padding. With a filled cache, row b continues at position
        cache.length[b]; the caller moves cache.length on, since only it knows what was padding.
        """
        B, T = tokens.shape
        position = torch.arange(T, device=tokens.device)[None]  # (1, T)
        mask = None
        if cache is not None:
            position = position + cache.length[:B, None]  # (B, T)
            filled = cache.used > 0
            cache.used = min(cache.used + T, cache.k.shape[2])
            if filled:
                mask = cache.mask(position, self.config)
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position(position)
        rope = None
        if self.frequencies is not None:
            angle = position[:, None, :, None] * self.frequencies.to(tokens.device)  # (B, 1, T, D/2)
            rope = angle.cos(), angle.sin()
        for layer in self.layers:
            x = layer(x, position, rope, cache, mask)
        return self.norm(x)

    def logits(self, hidden):
        """(..., C) -> (..., V)"""
        return F.linear(hidden, self.embed.weight if self.head is None else self.head.weight)


def new_model(config, seed):
    """Random weights as GPT-2 draws them: normal(0, 0.02), the layers' outputs scaled down with depth."""
    net, generator = Transformer(config), torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if p.dim() == 2:
            deep = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * config.layers) if deep else 0.02, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    return net


def load_model(directory, device, dtype=torch.float32):
    """The checkpoint of a Hugging Face directory as a Transformer."""
    config = models.read_config(directory)
    with torch.device("meta"):  # no memory and no time spent on weights that are about to be replaced
        net = Transformer(config)
    net.load_state_dict(models.read_weights(directory, config, dtype), assign=True)
    if net.frequencies is not None:
        net.frequencies = rotary_frequencies(config)
    return net.to(device)


# ----------------------------------------------------------------------------------------------------------------
# KV cache and sampler


class KVCache:
    """Keys and values of many rows, each filled from position 0 to its own length. The sampler owns it."""

    def __init__(self, config, rows, capacity, device, dtype):
        shape = (config.layers, rows, capacity, config.kv_heads, config.head_size)
        # Zeros, not empty: masked places get weight 0, but 0 * NaN of uninitialised memory would be NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(rows, device=device, dtype=torch.long)  # valid positions of each row
        self.used = 0  # no row is longer than this; known to the host, so that attention reads no further

    def write(self, layer, position, k, v):
        """k, v (B, K, T, D) to the places position (B, T) of the first B rows."""
        row = torch.arange(len(position), device=position.device)[:, None]
        self.k[layer][row, position] = k.transpose(1, 2)
        self.v[layer][row, position] = v.transpose(1, 2)

    def read(self, layer, rows):
        """All places in use of the first rows: (B, K, S, D), twice."""
        return self.k[layer, :rows, :self.used].transpose(1, 2), self.v[layer, :rows, :self.used].transpose(1, 2)

    def mask(self, position, config):
        """What queries at position (B, T) may see of the S places in use: 0 or -inf, (B, 1, G*T, S)."""
        place = torch.arange(self.used, device=position.device)
        seen = place <= position[:, None, :, None]  # (B, 1, T, S)
        mask = torch.zeros(seen.shape, device=place.device, dtype=self.k.dtype).masked_fill(~seen, -math.inf)
        return mask.repeat(1, 1, config.heads // config.kv_heads, 1) if position.shape[1] > 1 else mask

    def move(self, source, target):
        """Copy whole rows: from the rows source to the rows target."""
        self.k[:, target, :self.used] = self.k[:, source, :self.used]
        self.v[:, target, :self.used] = self.v[:, source, :self.used]
        self.length[target] = self.length[source]

    def fill(self, start, prompts, samples):
        """Rows start, start + 1, ...: the rows of the cache prompts, each one samples times."""
        rows = slice(start, start + len(prompts.length) * samples)
        self.k[:, rows, :prompts.used] = prompts.k.repeat_interleave(samples, dim=1)
        self.v[:, rows, :prompts.used] = prompts.v.repeat_interleave(samples, dim=1)
        self.length[rows] = prompts.length.repeat_interleave(samples)
        self.used = max(self.used, prompts.used)


def pick(logits, uniform, temperature, top_p):
    """Logits (B, V) and one random number in [0, 1) per row (B,) -> token ids (B,), by inverting the CDF."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        # The nucleus without a sort: bisect for the probability above which the tokens add up to top_p. (Tokens that
        # differ from it by less than 2^-24 stay in together.) Sorting (B, V) costs five times more on CPU and GPU.
        low, high = torch.zeros_like(probs[:, :1]), probs.amax(-1, keepdim=True)
        for _ in range(24):
            middle = (low + high) / 2
            enough = probs.where(probs >= middle, 0).sum(-1, keepdim=True) >= top_p
            low, high = low.where(~enough, middle), high.where(enough, middle)
        probs = probs.where(probs >= low, 0)
    cdf = probs.cumsum(-1)
    return torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]


def random_numbers(seed, round, prompt, number, count):
    """The (count,) numbers in [0, 1) that sample `number` of a prompt's ids draws with, whatever runs beside it."""
    key = int.from_bytes(hashlib.sha256(np.array(prompt, dtype=np.int64)).digest()[:8], "little")
    return np.random.default_rng([seed, round, key, number]).random(count, dtype=np.float32)


class Flight:
    """The rows being sampled, dense in 0 .. active-1. A row that ends leaves, the last row takes its place, and the
    samples of the next prompt come in behind. All state is on the device, so that a step waits for nothing."""

    def __init__(self, model, rows, capacity, max_new_tokens, stop_ids, temperature, top_p):
        device = model.device
        self.model, self.temperature, self.top_p = model, temperature, top_p
        self.stop_ids = torch.tensor(stop_ids, device=device)
        self.cache = KVCache(model.config, rows, capacity, device, model.embed.weight.dtype)
        self.token, self.count, self.limit = torch.zeros(3, rows, device=device, dtype=torch.long)
        self.done = torch.zeros(rows, device=device, dtype=torch.bool)
        # One column more than an answer can have: a row that has ended goes on writing there until it is taken out.
        self.answer = torch.zeros(rows, max_new_tokens + 1, device=device, dtype=torch.long)
        self.uniform = torch.zeros(rows, max_new_tokens + 1, device=device)
        self.owner = []  # (prompt, sample number) of each active row

    def admit(self, prompts, samples, uniform, limit):
        """Prefill prompts, a list of (index, ids), once each, and start `samples` rows for each."""
        tokens, length = pad([ids for _, ids in prompts], self.model.device)
        cache = KVCache(self.model.config, *tokens.shape, tokens.device, self.cache.k.dtype)
        hidden = self.model(tokens, cache)
        cache.length = length
        start = len(self.owner)
        self.cache.fill(start, cache, samples)
        self.owner += [(index, number) for index, _ in prompts for number in range(samples)]
        new = slice(start, len(self.owner))
        self.count[new], self.done[new] = 0, False
        self.limit[new] = torch.tensor(limit, device=tokens.device).repeat_interleave(samples)
        self.uniform[new, :-1] = torch.from_numpy(uniform).to(tokens.device)
        last = hidden[torch.arange(len(prompts), device=tokens.device), length - 1]  # (prompts, C)
        self.emit(new, self.model.logits(last).repeat_interleave(samples, dim=0))

    def step(self):
        active = slice(0, len(self.owner))
        hidden = self.model(self.token[active, None], self.cache)
        self.cache.length[active] += ~self.done[active]
        self.emit(active, self.model.logits(hidden[:, 0]))

    def emit(self, rows, logits):
        """Draw the next token of these rows and put it down."""
        count = self.count[rows]
        uniform = self.uniform[rows].gather(1, count[:, None])[:, 0]
        token = self.token[rows] = pick(logits, uniform, self.temperature, self.top_p)
        self.answer[rows].scatter_(1, count[:, None], token[:, None])
        count += ~self.done[rows]  # in place: count is a view
        self.done[rows] |= torch.isin(token, self.stop_ids) | (count >= self.limit[rows])

    def land(self):
        """Take out the rows that have ended: a list of ((prompt, sample number), ids, finish)."""
        done = self.done[:len(self.owner)].tolist()
        ended = [row for row, d in enumerate(done) if d]
        if not ended:
            return []
        stop_ids, answers = self.stop_ids.tolist(), []
        for row, count, ids in zip(ended, self.count[ended].tolist(), self.answer[ended].tolist()):
            ids = ids[:count]
            answers.append((self.owner[row], ids, "stop" if ids[-1] in stop_ids else "length"))
        left = len(done) - len(ended)
        holes = [row for row in ended if row < left]
        movers = [row for row in range(left, len(done)) if not done[row]]
        if movers:
            for state in (self.token, self.count, self.limit, self.done, self.answer, self.uniform):
                state[holes] = state[movers]
            self.cache.move(movers, holes)
        for hole, mover in zip(holes, movers):
            self.owner[hole] = self.owner[mover]
        del self.owner[left:]
        self.cache.used = int(self.cache.length[:left].max()) if left else 0
        return answers


@torch.inference_mode()
def generate(model, prompts, samples, *, stop_ids, seed, round=0, temperature=1.0, top_p=1.0, max_new_tokens, rows,
             on_token=None):
    """Sample answers: yields (prompt index, sample number, ids with the end token, "stop" or "length") as they end.

    prompts: lists of token ids, each shorter than the context. rows: sequences in flight at once. on_token(id): told
    each token of the only row as it is drawn.
    """
    config = model.config
    rows = max(samples, min(rows, len(prompts) * samples) // samples * samples)  # room for whole prompts
    capacity = min(config.context, max(map(len, prompts)) + max_new_tokens)
    flight = Flight(model, rows, capacity, max_new_tokens, stop_ids, temperature, top_p)
    # Asking the GPU which rows have ended makes the host wait for it, so ask only now and then.
    steps = 16 if model.device.type == "cuda" and on_token is None else 1
    waiting = deque(enumerate(prompts))
    while waiting or flight.owner:
        room = (rows - len(flight.owner)) // samples
        if waiting and room:
            group = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            uniform = np.stack([random_numbers(seed, round, ids, number, max_new_tokens)
                                for _, ids in group for number in range(samples)])
            flight.admit(group, samples, uniform, [min(max_new_tokens, config.context - len(ids)) for _, ids in group])
            if on_token:
                on_token(int(flight.token[0]))
        for (index, number), ids, finish in flight.land():
            yield index, number, ids, finish
        for _ in range(steps if flight.owner else 0):
            flight.step()
            if on_token:
                on_token(int(flight.token[0]))


def pad(sequences, device):
    """Lists of token ids -> (B, T) padded on the right with zeros, and their lengths (B,)."""
    length = torch.tensor([len(s) for s in sequences])
    tokens = torch.zeros(len(sequences), int(length.max()), dtype=torch.long)
    for row, s in enumerate(sequences):
        tokens[row, :len(s)] = torch.tensor(s)
    return tokens.to(device), length.to(device)


# ----------------------------------------------------------------------------------------------------------------
# Sequence log-probabilities

LOGITS = 2**26  # float32 logits in memory at once: 256 MB, 523 tokens of Llama-3's vocabulary


def token_logprobs(model, hidden, targets):
    """log softmax(logits(hidden))[target]: (N, C) and (N,) -> (N,) float32.

    The logits of a batch would be its largest tensor by far (4096 tokens of Llama-3: 2 GB in float32), so they are made
    in chunks, and made again in the backward pass instead of being kept.
    """
    def chunk(hidden, targets):
        logits = model.logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (n, V)
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)

    size = max(1, LOGITS // model.config.vocab_size)
    if len(hidden) <= size:
        return chunk(hidden, targets)
    return torch.cat([checkpoint(chunk, h, t, use_reentrant=False)
                      for h, t in zip(hidden.split(size), targets.split(size))])


def sequence_logprobs(model, prompts, answers):
    """log pi(answer | prompt), summed over the answer's tokens: lists of B token id lists -> (B,) float32.

    The end token is part of the answer and counts; the prompt does not. Padding needs no mask: it stands on the right,
    where causal attention cannot see it, and its own outputs are not read.
    """
    tokens, _ = pad([p + a for p, a in zip(prompts, answers)], model.device)
    T = tokens.shape[1] - 1
    hidden = model(tokens[:, :-1])  # (B, T, C)
    # Subtle: the token at t is scored by the output at t - 1, so the answer's scores start at len(prompt) - 1.
    place = [row * T + t for row, (p, a) in enumerate(zip(prompts, answers))
             for t in range(len(p) - 1, len(p) + len(a) - 1)]
    place = torch.tensor(place, device=tokens.device)  # (N,) answer tokens of the batch
    scores = token_logprobs(model, hidden.flatten(0, 1)[place], tokens[:, 1:].flatten()[place])
    return scores.new_zeros(tokens[:, 1:].numel()).index_put((place,), scores).view(-1, T).sum(1)


def batches(lengths, tokens):
    """Indices 0 .. N-1 in groups of similar length, each of at most `tokens` tokens with its padding."""
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens:  # the first of a group is its longest
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@torch.no_grad()
def score(model, prompts, answers, tokens, what="scoring"):
    """Sequence log-probs of any number of answers, as floats; `tokens` bounds one forward pass."""
    lengths, result = [len(p) + len(a) for p, a in zip(prompts, answers)], [0.0] * len(answers)
    with tqdm(total=len(answers), desc=what, unit="answer", leave=False) as bar:
        for group in batches(lengths, tokens):
            scores = sequence_logprobs(model, [prompts[i] for i in group], [answers[i] for i in group])
            for i, value in zip(group, scores.tolist()):
                result[i] = value
            bar.update(len(group))
    return result


# ----------------------------------------------------------------------------------------------------------------
# The formulas: pure functions of tensors or arrays


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    """-log sigmoid(beta * D), with D = (p_w - r_w) - (p_l - r_l), on summed log-probs (B,) -> (B,). arXiv 2305.18290 eq. 7"""
    return -F.logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))


def implicit_reward(policy, reference):
    """log pi_t(y|x) - log pi_{t-1}(y|x), free of beta. DICE eq. 5; a constant per prompt cancels within pairs."""
    return policy - reference


def best_and_worst(reward, length, valid, alpha):
    """The pair of each prompt: (P, K) arrays -> index of the best and of the worst answer, (P,) each.

    By the shaped reward, reward - alpha * length, among the valid answers. DICE section 3.2
    """
    shaped = reward - alpha * length
    return (np.where(valid, shaped, -np.inf).argmax(1), np.where(valid, shaped, np.inf).argmin(1))


def length_gap(reward, length, valid, alpha):
    """Mean signed length difference, chosen minus rejected, of the pairs that alpha makes."""
    best, worst = best_and_worst(reward, length, valid, alpha)
    prompt = np.arange(len(reward))
    return float((length[prompt, best] - length[prompt, worst]).mean())


def search_alpha(reward, length, valid):
    """The alpha >= 0 whose pairs have a length gap nearest to 0: the middle of the best interval. DICE eq. 8

    As alpha grows, the best can only get shorter and the worst only longer, so the gap is a falling staircase and
    bisection finds its steps exactly.
    """
    def step(below):
        """The last alpha before and the first alpha at which below(gap) holds."""
        low, high = 0.0, 2.0**-20
        while not below(length_gap(reward, length, valid, high)):
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if below(length_gap(reward, length, valid, middle)) else (middle, high)
        return low, high

    if length_gap(reward, length, valid, 0.0) <= 0:
        return 0.0
    before, after = step(lambda gap: gap <= 0)
    best = min((length_gap(reward, length, valid, a) for a in (before, after)), key=abs)
    start = step(lambda gap: gap <= best)[1] if length_gap(reward, length, valid, 0.0) > best else 0.0
    if length_gap(reward, length, valid, 1e12) == best:  # the last stair has no end
        return start
    return (start + step(lambda gap: gap < best)[0]) / 2


# ----------------------------------------------------------------------------------------------------------------
# What flows through the loop


@dataclass
class Prompt:
    content: object  # the text of one user turn, or a list of {"role", "content"}
    ids: list  # its token ids in the chat format, up to where the answer begins

    @property
    def key(self):
        """Equal for equal prompts."""
        return json.dumps(self.content)


@dataclass
class Sample:
    prompt: Prompt
    tokens: list  # ids of the answer, the end token included
    text: str
    number: int = 0  # which of the prompt's K
    finish: str = "stop"  # or "length": cut by the limit
    policy: float = math.nan  # log-prob under the model that the coming training starts from, which is its reference
    reference: float = math.nan  # log-prob under the model before that one
    reward: float = math.nan
    shaped: float = math.nan


@dataclass
class Pair:
    chosen: Sample
    rejected: Sample
    source: str  # "generated" or "replayed"

    @property
    def prompt(self):
        return self.chosen.prompt


class ReplayBuffer:
    """The offline pairs. Each round draws its share from them, which keeps the policy near human data. DICE section 3.3"""

    def __init__(self, pairs):
        self.pairs = pairs

    def mix(self, generated, gamma, rng):
        """Generated and offline pairs with a share gamma of offline ones, shuffled; no prompt is on both sides.

        The sizes are the largest that keep the ratio: the smaller part is as large as can be, the larger part is the
        whole number nearest to the ratio. InputError when a part that gamma asks for is empty.
        """
        offline = [self.pairs[i] for i in rng.permutation(len(self.pairs))]
        generated = [generated[i] for i in rng.permutation(len(generated))]
        on_prompt = {}  # offline pairs per prompt
        for pair in offline:
            on_prompt[pair.prompt.key] = on_prompt.get(pair.prompt.key, 0) + 1
        generated.sort(key=lambda pair: pair.prompt.key in on_prompt)  # first those that cost no offline pair
        left = np.cumsum([len(offline)] + [-on_prompt.get(pair.prompt.key, 0) for pair in generated])
        if (gamma < 1 and not generated) or (gamma > 0 and not offline):
            raise InputError(f"--gamma {gamma}: cannot mix {len(generated)} generated with {len(offline)} offline pairs; "
                             "give --preferences for a gamma above 0, or --gamma 0 to train on generated pairs alone")
        if gamma in (0, 1):
            new, old = (0, len(offline)) if gamma else (len(generated), 0)
        elif gamma < 0.5:
            sizes = [(round(old * (1 - gamma) / gamma), old) for old in range(1, len(offline) + 1)]
        else:
            sizes = [(new, round(new * gamma / (1 - gamma))) for new in range(1, len(generated) + 1)]
        if gamma not in (0, 1):
            sizes = [(new, old) for new, old in sizes if new <= len(generated) and old <= left[new]]
            # Too few pairs for even the smallest mixture: the nearest one is all of the larger part.
            new, old = max(sizes, default=(0, len(offline)) if gamma > 0.5 else (len(generated), 0))
        taken = {pair.prompt.key for pair in generated[:new]}
        mixture = generated[:new] + [pair for pair in offline if pair.prompt.key not in taken][:old]
        return [mixture[i] for i in rng.permutation(len(mixture))]


# ----------------------------------------------------------------------------------------------------------------
# Training


def sft_losses(model, samples, settings):
    """Mean negative log-likelihood per answer token, (B,), and what to log of it."""
    logprobs = sequence_logprobs(model, [s.prompt.ids for s in samples], [s.tokens for s in samples])
    lengths = torch.tensor([float(len(s.tokens)) for s in samples], device=logprobs.device)
    losses = -logprobs / lengths
    return losses, {"loss": losses, "answer_tokens": lengths}


def dpo_losses(model, pairs, settings):
    """DPO losses (B,) of pairs whose reference log-probs are stored with them, and what to log of them."""
    samples = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    logprobs = sequence_logprobs(model, [s.prompt.ids for s in samples], [s.tokens for s in samples])
    reference = torch.tensor([s.policy for s in samples], device=logprobs.device)  # where training began
    (chosen, rejected), (reference_chosen, reference_rejected) = logprobs.chunk(2), reference.chunk(2)
    losses = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, settings.beta)
    margin = settings.beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    lengths = torch.tensor([float(len(s.tokens)) for s in samples], device=logprobs.device)
    return losses, {"loss": losses, "accuracy": (margin > 0).float(), "margin": margin, "chosen_logprob": chosen,
                    "rejected_logprob": rejected, "chosen_tokens": lengths[:len(pairs)],
                    "rejected_tokens": lengths[len(pairs):]}


def train(run, stage, model, losses_of, items, lengths, *, lr, steps, epochs, batch, decay=False):
    """AdamW over shuffled items, which losses_of turns into losses. lengths: padded tokens that each item costs.

    A step's items are split into micro-batches of similar length; gradients add up over them, so the split changes
    nothing but the memory. Raises InputError before the step that a non-finite loss or gradient would spoil.
    """
    s = run.settings
    rng = np.random.default_rng([s.seed, *stage.encode()])
    order = np.concatenate([rng.permutation(len(items)) for _ in range(epochs)])
    steps = min(steps, math.ceil(len(order) / batch))
    device = model.device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    for step in tqdm(range(steps), desc=stage, unit="step"):
        started, chosen = time.perf_counter(), order[step * batch:(step + 1) * batch]
        rate = lr * min(1, (step + 1) / max(1, s.warmup))
        if decay:
            rate *= (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        totals = {}
        for group in batches([lengths[i] for i in chosen], s.train_tokens):
            with torch.autocast(device, torch.bfloat16, enabled=s.dtype == "bfloat16"):
                losses, stats = losses_of(model, [items[chosen[i]] for i in group], s)
            (losses.sum() / len(chosen)).backward()
            for name, values in stats.items():
                totals[name] = totals.get(name, 0) + values.detach().double().sum()
        norm = nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        row = {name: float(total) / len(chosen) for name, total in totals.items()}
        row["grad_norm"] = float(norm)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise InputError(f"{stage}, step {step + 1}: loss {row['loss']}, gradient norm {row['grad_norm']}: stopped "
                             "before this step; try a lower learning rate, or --dtype float32")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(lengths[i] for i in chosen)
        run.log({"stage": stage, "step": step + 1, "lr": rate, **row,
                 "tokens_per_second": round(tokens / (time.perf_counter() - started))})


def train_pairs(run, stage, model, pairs, *, lr, steps):
    """DPO on pairs, from this model, whose log-probs of all answers are known (score_pairs)."""
    lengths = [2 * (len(p.prompt.ids) + max(len(p.chosen.tokens), len(p.rejected.tokens))) for p in pairs]
    s = run.settings
    train(run, stage, model, dpo_losses, pairs, lengths, lr=lr, steps=steps, epochs=s.epochs, batch=s.batch)


def score_samples(run, model, samples, what):
    return score(model, [x.prompt.ids for x in samples], [x.tokens for x in samples], run.settings.score_tokens, what)


def score_pairs(run, model, pairs):
    """Put the log-probs under the model that training is to start from, its reference, into the pairs."""
    samples = [x for p in pairs for x in (p.chosen, p.rejected)]
    for x, value in zip(samples, score_samples(run, model, samples, "reference log-probs")):
        x.policy = value


# ----------------------------------------------------------------------------------------------------------------
# The run: its directory, its data, and what it writes down


class Run:
    """Settings, tokenizer, data and output directory of one run."""

    def __init__(self, settings):
        self.settings, self.out = settings, Path(settings.out)
        self.is_tiny = settings.model == "tiny"
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise InputError(f"{self.out}: holds files already; choose another --out, or delete it")
        self.base = None if self.is_tiny else models.resolve(settings.model)
        if settings.reference:
            self.reference = models.resolve(settings.reference)
        self.out.mkdir(parents=True, exist_ok=True)
        if self.is_tiny:
            self.base = self.out / "base"
            write_tiny_base(self.base, settings.seed)
        self.config = models.read_config(self.base)
        self.tokenizer = models.read_tokenizer(self.base, settings.chat)
        self.read_data()
        write_text(self.out / "settings.json", json.dumps(asdict(settings), indent=1) + "\n")

    def read_data(self):
        s = self.settings
        if s.preferences:
            offline = jsonl.read_preferences(s.preferences)
        else:
            offline = [("", r["prompt"], r["chosen"], r["rejected"]) for r in tiny.preferences(s.seed)] if self.is_tiny else []
        if s.prompts:
            prompts = jsonl.read_prompts(s.prompts)
        elif self.is_tiny:
            prompts = [("", text) for text in tiny.training_prompts(s.seed)]
        else:
            prompts = list({json.dumps(p): (where, p) for where, p, _, _ in offline}.values())
        if not prompts:
            raise InputError("no prompts: give --prompts FILE or --preferences FILE")
        self.prompts = [self.prompt(content, where) for where, content in prompts]
        self.offline = self.fitting([self.pair(*row) for row in offline], len(offline))

    def prompt(self, content, where):
        ids = self.tokenizer.prompt(content)
        if len(ids) >= self.config.context:
            raise InputError(f"{where or 'a prompt'}: the prompt has {len(ids)} tokens, which leaves no room for an answer "
                             f"in the model's context of {self.config.context}; shorten or remove it")
        return Prompt(content, ids)

    def pair(self, where, content, *answers):
        prompt = Prompt(content, self.tokenizer.prompt(content))
        return Pair(*(Sample(prompt, self.tokenizer.answer(text), text) for text in answers), "replayed")

    def fitting(self, pairs, given):
        """The pairs that differ and fit the context whole; the others are counted aloud, never cut."""
        limit = min(self.settings.max_tokens, self.config.context)
        same = [p for p in pairs if p.chosen.text == p.rejected.text]
        fit = [p for p in pairs if p.chosen.text != p.rejected.text and
               len(p.prompt.ids) + max(len(p.chosen.tokens), len(p.rejected.tokens)) <= limit]
        if len(fit) < len(pairs):
            say(f"{len(fit)} of {len(pairs)} offline pairs are used: {len(pairs) - len(fit) - len(same)} are longer than "
                f"{limit} tokens, {len(same)} have equal answers")
        if pairs and not fit:
            raise InputError(f"{self.settings.preferences}: no pair fits {limit} tokens; raise --max-tokens or take a model with a longer context")
        return fit

    def log(self, row):
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, model, name):
        dtype = torch.bfloat16 if self.settings.dtype == "bfloat16" else torch.float32
        models.write_checkpoint(self.out / name, self.config, model.state_dict(), self.tokenizer, dtype)
        return self.out / name

    def load(self, directory, training=False):
        """A model for sampling and scoring in the run's dtype, or for training, whose weights are always float32: a
        step of lr 5e-7 is lost in the rounding of bfloat16."""
        low = self.settings.dtype == "bfloat16" and not training
        return load_model(directory, self.settings.device, torch.bfloat16 if low else torch.float32)


def say(text):
    tqdm.write(text, file=sys.stderr)


def write_text(path, text):
    path.write_text(text, encoding="utf-8")


def write_rows(path, rows):
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_tiny_base(directory, seed):
    """The tiny world's starting point as a checkpoint like any other: its tokenizer and random weights."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny.write_tokenizer(Path(scratch))
        tokenizer = models.read_tokenizer(scratch)
        config = models.Config(vocab_size=tokenizer.vocab_size, context=128, layers=3, width=64, heads=4, kv_heads=2,
                               head_size=16, hidden=176, tied=True)
        models.write_checkpoint(directory, config, new_model(config, seed).state_dict(), tokenizer)


# ----------------------------------------------------------------------------------------------------------------
# The stages before the first round


def first_models(run):
    """(policy, reference) to start the rounds from: the two that were given, or SFT and DPO from the base."""
    s, policy = run.settings, run.base
    if s.reference:
        return policy, run.reference
    if s.sft_steps:
        policy = supervised(run, policy)
    if not run.offline:
        raise InputError("DICE starts from a policy and the model it was DPO-trained from: give --reference DIR, or "
                         "--preferences FILE to train the policy with DPO first")
    model, reference = run.load(policy, training=True), policy
    score_pairs(run, model, run.offline)
    train_pairs(run, "dpo", model, run.offline, lr=s.dpo_lr, steps=s.dpo_steps)
    return run.save(model, "dpo"), reference


def supervised(run, base):
    """Fine-tune on answers: the tiny world's writer's, or the chosen ones of the offline pairs."""
    s = run.settings
    if run.is_tiny and not s.preferences:
        texts = {}  # equal prompts share one Prompt
        rows = [(r["prompt"], r["chosen"]) for r in tiny.sft_examples(s.seed)]
        samples = [Sample(texts.setdefault(p, Prompt(p, run.tokenizer.prompt(p))), run.tokenizer.answer(a), a)
                   for p, a in rows]
    else:
        samples = [pair.chosen for pair in run.offline]
    if not samples:
        raise InputError("--sft-steps needs --preferences FILE, whose chosen answers it trains on")
    lengths = [len(x.prompt.ids) + len(x.tokens) for x in samples]
    model = run.load(base, training=True)
    train(run, "sft", model, sft_losses, samples, lengths, lr=s.sft_lr, steps=s.sft_steps,
          epochs=math.ceil(s.sft_steps * s.sft_batch / len(samples)), batch=s.sft_batch, decay=True)
    return run.save(model, "sft")


# ----------------------------------------------------------------------------------------------------------------
# DICE


def dice_round(run, number, policy, reference):
    """One round: from the directories of pi_t and pi_{t-1} to the directory of pi_{t+1}."""
    model = run.load(policy)
    samples = sample_answers(run, model, number)
    score_answers(run, model, samples, reference)
    alpha, chosen = shape_and_pair(run, samples)
    write_samples(run, number, samples)
    pairs = [Pair(best, worst, "generated") for best, worst in chosen]
    mixture = ReplayBuffer(run.offline).mix(pairs, run.settings.gamma, np.random.default_rng([run.settings.seed, number]))
    score_pairs(run, model, [p for p in mixture if p.source == "replayed"])
    write_pairs(run, number, mixture)
    log_round(run, number, alpha, samples, mixture)
    model = run.load(policy, training=True)
    train_pairs(run, f"round-{number}", model, mixture, lr=run.settings.lr, steps=run.settings.steps)
    return run.save(model, f"round-{number}/policy")


def sample_answers(run, model, number):
    """K answers per prompt, a list of K samples each in the order of the prompts. Chunks of prompts, one after the other,
    are sampled for themselves: what a chunk gives does not depend on what was sampled before."""
    s, answers = run.settings, []
    bar = tqdm(total=len(run.prompts) * s.samples, desc=f"round-{number} sampling", unit="answer")
    for start in range(0, len(run.prompts), s.chunk):
        prompts = run.prompts[start:start + s.chunk]
        chunk = [[None] * s.samples for _ in prompts]
        for index, k, ids, finish in generate(
                model, [p.ids for p in prompts], s.samples, stop_ids=run.tokenizer.stop_ids, seed=s.seed, round=number,
                temperature=s.temperature, top_p=s.top_p, max_new_tokens=s.max_new_tokens, rows=s.rows):
            chunk[index][k] = Sample(prompts[index], ids, run.tokenizer.decode(ids), k, finish)
            bar.update()
        answers += chunk
    bar.close()
    return answers


def score_answers(run, model, samples, reference):
    """Fill in the log-probs under pi_t (this model) and pi_{t-1} (the directory reference), and the reward."""
    flat = [x for row in samples for x in row]
    for x, value in zip(flat, score_samples(run, model, flat, "policy log-probs")):
        x.policy = value
    for x, value in zip(flat, score_samples(run, run.load(reference), flat, "reference log-probs")):
        x.reference = value
    for x in flat:
        x.reward = implicit_reward(x.policy, x.reference)
        if run.settings.labeller == "gold":
            x.reward = tiny.judge(x.prompt.content, x.text)
        if not math.isfinite(x.reward):
            raise InputError(f"a reward is {x.reward} (log-probs {x.policy} and {x.reference}) for the prompt "
                             f"{str(x.prompt.content)[:80]!r}; check the two models, or try --dtype float32")


def shape_and_pair(run, samples):
    """Length shaping and pairing: alpha, and (best, worst) of each prompt with enough valid and different answers."""
    s, kept = run.settings, []
    for row in samples:
        valid = [x for x in row if x.finish == "stop" and s.min_chars < len(x.text) < s.max_chars]
        texts = {x.text: x for x in reversed(valid)}  # one answer of each text: a text is never paired with itself
        if len(valid) >= max(2, s.min_valid * s.samples) and len(texts) > 1:
            kept.append(list(texts.values()))
    if not kept:
        cut = sum(x.finish == "length" for row in samples for x in row)
        raise InputError(f"no prompt has enough valid and different answers ({s.min_valid:.0%} of {s.samples} needed; "
                         f"{cut} of {len(samples) * s.samples} were cut at the length limit): raise --max-new-tokens or "
                         "--temperature, or lower --min-valid")
    width = max(map(len, kept))
    reward, length, valid = np.zeros((3, len(kept), width))
    for i, row in enumerate(kept):
        reward[i, :len(row)] = [x.reward for x in row]
        length[i, :len(row)] = [len(x.text) for x in row]
        valid[i, :len(row)] = 1
    valid = valid.astype(bool)
    alpha = search_alpha(reward, length, valid) if s.alpha == "auto" else float(s.alpha)
    for row in samples:
        for x in row:
            x.shaped = x.reward - alpha * len(x.text)
    pairs = [(row[b], row[w]) for row, b, w in zip(kept, *best_and_worst(reward, length, valid, alpha))]
    return alpha, [(best, worst) for best, worst in pairs if best.shaped > worst.shaped]


def write_samples(run, number, samples):
    (run.out / f"round-{number}").mkdir(exist_ok=True)
    write_rows(run.out / f"round-{number}" / "samples.jsonl", (
        {"prompt": x.prompt.content, "sample": x.number, "tokens": x.tokens, "text": x.text, "finish": x.finish,
         "policy_logprob": x.policy, "reference_logprob": x.reference, "reward": x.reward, "shaped_reward": x.shaped}
        for row in samples for x in row))


def write_pairs(run, number, pairs):
    """TRL's form of a preference set, and where each pair comes from."""
    write_rows(run.out / f"round-{number}" / "pairs.jsonl", (
        {"prompt": p.prompt.content, "chosen": p.chosen.text, "rejected": p.rejected.text, "source": p.source} for p in pairs))


def log_round(run, number, alpha, samples, pairs):
    flat, new = [x for row in samples for x in row], [p for p in pairs if p.source == "generated"]
    row = {"stage": f"round-{number}", "alpha": alpha, "generated_pairs": len(new), "replayed_pairs": len(pairs) - len(new),
           "prompts": len(samples), "answer_chars": float(np.mean([len(x.text) for x in flat])),
           "truncated": float(np.mean([x.finish == "length" for x in flat])),
           "pair_length_gap": float(np.mean([len(p.chosen.text) - len(p.rejected.text) for p in new])) if new else None}
    if run.is_tiny and new:
        gold = [[tiny.judge(x.prompt.content, x.text) for x in (p.chosen, p.rejected)] for p in new]
        row["pairs_right"] = float(np.mean([a > b for a, b in gold]))
    run.log(row)
    say(f"round-{number}: alpha {alpha:.4g} nats per character, {len(new)} generated and {len(pairs) - len(new)} replayed pairs")


# ----------------------------------------------------------------------------------------------------------------
# Evaluation in the tiny world: nothing below feeds back into training

EVALUATION = 2**31  # stands for the round in the random numbers of the held-out answers


def evaluate(run, stage, policy, reference=None):
    """Write evaluation/STAGE.jsonl: held-out answers with gold score and implicit reward."""
    s, model = run.settings, run.load(policy)
    prompts = [run.prompt(text, "") for text in tiny.held_out_prompts(s.seed)]
    answers = list(generate(model, [p.ids for p in prompts], 4, stop_ids=run.tokenizer.stop_ids, seed=s.seed,
                            round=EVALUATION, temperature=s.temperature, top_p=s.top_p,
                            max_new_tokens=s.max_new_tokens, rows=1024))
    samples = [Sample(prompts[index], ids, run.tokenizer.decode(ids), number, finish)
               for index, number, ids, finish in sorted(answers, key=lambda a: a[:2])]
    reward = [math.nan] * len(samples)
    if reference:
        now = score_samples(run, model, samples, "held-out log-probs")
        before = score_samples(run, run.load(reference), samples, "held-out log-probs")
        reward = [implicit_reward(p, r) for p, r in zip(now, before)]
    (run.out / "evaluation").mkdir(exist_ok=True)
    write_rows(run.out / "evaluation" / f"{stage}.jsonl", (
        {"prompt": x.prompt.content, "sample": x.number, "text": x.text, "reward": r,
         "gold": tiny.judge(x.prompt.content, x.text)} for x, r in zip(samples, reward)))


def run_all(settings):
    run = Run(settings)
    policy, reference = first_models(run)
    if run.is_tiny:
        evaluate(run, "sft", reference)
        evaluate(run, "dpo", policy, reference)
    for number in range(1, settings.rounds + 1):
        policy, reference = dice_round(run, number, policy, reference), policy
        if run.is_tiny:
            evaluate(run, f"round-{number}", policy, reference)
