"""DICE: bootstrapping language models with DPO implicit rewards (arXiv 2406.09760), in one file.

A model pi_t that was trained with DPO from pi_{t-1} carries a reward: log pi_t(y|x) - log pi_{t-1}(y|x).
One round of DICE turns that reward into new training data, with no outside labels:

    1. sample   K answers per prompt from pi_t
    2. score    their log-probs under pi_t and pi_{t-1}; the difference is the implicit reward
    3. shape    reward - alpha * length, with the alpha that takes the length bias out of the pairs
    4. pair     the best answer of each prompt against its worst
    5. replay   mix in a share gamma of the original offline pairs, on other prompts
    6. train    DPO from pi_t with reference pi_t gives pi_{t+1}; go to 1

The file reads from top to bottom: settings, Transformer, KV cache and sampler, sequence log-probs, the
formulas, replay, training, the rounds. Which model (checkpoints, tokenizers, chat formats) is model.py's
business.

Done differently from the paper and its code:
- the tokens that were sampled are the tokens that are scored and trained on; text is never tokenised again
- alpha is found by bisection, as the length gap falls with it, not by a scan; it is in nats per character,
  since the reward is kept free of beta (beta would rescale both)
- training holds one model: its reference is where it starts from, whose log-probs are known numbers
- no judge for real models: sample.py writes answers for AlpacaEval's own package to score

    python dice.py                                                  laptop: the tiny world, SFT, DPO, DICE
    python dice.py --model llama3-8b                                GPU: the paper's run
    torchrun --nproc-per-node=8 dice.py --model llama3-8b           GPUs: the same run, shared
"""

import argparse
import hashlib
import inspect
import json
import math
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import model as models
from data import jsonl, report, runs, tiny
from data.runs import Budget, RunDirectory, safe_point, say, shard, whole, within_memory, write_rows
from model import InputError

# ----------------------------------------------------------------------------------------------------------
# Settings: every knob once. The command line, --help and the checks are made from this class.


def knob(default, help, least=-math.inf, most=math.inf, choices=None):
    return field(default=default, metadata=dict(help=help, least=least, most=most, choices=choices))


TINIEST = sys.float_info.min  # as a least value: anything above 0


@dataclass
class Settings:
    # what goes in and out
    model: str = knob("tiny", "the policy: a name or a Hugging Face directory; tiny is made from nothing")
    reference: str = knob("", "what the policy was DPO-trained from, a name or a directory; without it the "
                              "policy gets DPO first")
    prompts: str = knob("", "JSON lines of prompts to sample for; without it those of --preferences")
    preferences: str = knob("", "JSON lines of offline pairs, for the DPO stage and the replay")
    out: str = knob("", "directory of the run; without it out/NAME_OF_MODEL")
    weights: str = knob("real", "dummy: random weights in the shape of the name, a stand-in tokenizer, no "
                                "download: to measure speed and memory", choices=("real", "dummy"))
    chat: str = knob("auto", "chat format", choices=("auto", "llama3", "zephyr", "chatml", "plain"))
    # the method, with the values of the paper
    rounds: int = knob(2, "DICE rounds; the paper saw no gain past the third", 0)
    samples: int = knob(16, "K, answers sampled per prompt and round", 2)
    gamma: float = knob(0.5, "share of offline pairs in a round's training mixture", 0, 1)
    alpha: str = knob("auto", "length penalty, nats per unit of length; auto: alpha*, the one that leaves no "
                              "length gap; 2x: twice that")
    length: str = knob("chars", "the unit of that length", choices=("chars", "tokens"))
    labeller: str = knob("implicit", "who ranks the samples: implicit, DICE's reward; gold, the tiny world's "
                                     "judge, an upper bound; or the directory of a reward model")
    reward_reference: str = knob("previous", "pi_{t-1} in the implicit reward: the previous policy, or the "
                                             "first round's", choices=("previous", "first"))
    rejected: str = knob("worst", "what the best answer is paired with", choices=("worst", "random"))
    filter: str = knob("none", "fdpo: before each epoch, drop the pairs whose chosen answer is no "
                               "better than what the policy says by then", choices=("none", "fdpo"))
    # the objective, and what some of the losses add to it
    loss: str = knob("dpo", "one of the losses named below")
    beta: float = knob(0.1, "how strongly the policy is held to its reference", TINIEST)
    label_smoothing: float = knob(0.1, "cdpo: share of pairs taken to be labelled wrongly", 0, 0.5)
    length_margin: float = knob(0.02, "lr-dpo: reward per token by which the chosen answer is longer", 0)
    offset: float = knob(1.0, "odpo: reward per nat of log(score difference)", 0)
    kl_weight: float = knob(0.5, "tdpo2: its alpha, the weight of the difference of sequence KLs", 0)
    target_margin: float = knob(1.0, "simpo: its gamma, the reward by which the chosen answer should win", 0)
    # sampling
    temperature: float = knob(0.9, "0 is greedy", 0)
    top_p: float = knob(1.0, "sample from the smallest set of tokens with this probability", TINIEST, 1)
    max_new_tokens: int = knob(2048, "longest answer; what reaches it counts as cut and is not trained on", 1)
    min_chars: int = knob(3, "an answer of no more characters is not trained on", 0)
    max_chars: int = knob(6700, "nor one of no fewer", 1)
    min_valid: float = knob(0.5, "share of its samples that a prompt must keep, to be trained on", 0, 1)
    # training
    lr: float = knob(5e-7, "learning rate of the rounds, constant after the warm-up", TINIEST)
    warmup: int = knob(50, "steps of linear warm-up of each stage", 0)
    batch: int = knob(32, "pairs per optimizer step", 1)
    steps: int = knob(300, "optimizer steps of a round, at most", 1)
    epochs: int = knob(1, "passes over a stage's pairs, at most", 1)
    clip: float = knob(1.0, "largest gradient norm", TINIEST)
    max_tokens: int = knob(4096, "longest prompt and answer of an offline pair; longer pairs are not used", 1)
    held_out: int = knob(256, "offline pairs, the last ones and at most an eighth, that are not trained on: "
                              "does the reward still agree with them?", 0)
    # the stages before the first round
    sft_steps: int = knob(0, "steps of supervised fine-tuning on the chosen answers first; 0: none", 0)
    sft_lr: float = knob(2e-5, "its peak learning rate, cosine to zero", TINIEST)
    sft_batch: int = knob(32, "its answers per step", 1)
    dpo_steps: int = knob(300, "steps at most of the DPO stage, for a policy without --reference; 0: none", 0)
    dpo_lr: float = knob(5e-7, "its learning rate", TINIEST)
    # the machine
    seed: int = knob(0, "of everything random", 0)
    device: str = knob("auto", "cpu, cuda, cuda:1, ...; auto: cuda if there is one")
    dtype: str = knob("auto", "of the arithmetic (weights are trained in float32); auto: bfloat16 on cuda",
                      choices=("auto", "float32", "bfloat16"))
    offload: str = knob("auto", "keep weights, gradients and moments of training in main memory; auto: where "
                                "a GPU would have less than 10 GB to spare", choices=("auto", "yes", "no"))
    recompute: str = knob("auto", "keep no activations of a layer for the backward pass, but work them out "
                                  "again; auto: above 1e9 parameters", choices=("auto", "yes", "no"))
    rows: int = knob(256, "sequences in flight while sampling", 1)
    chunk: int = knob(64, "prompts that are one unit of work: what an interruption loses, at most", 1)
    score_tokens: int = knob(4096, "padded tokens in one forward pass of scoring", 1)
    train_tokens: int = knob(2048, "padded tokens in one training pass", 1)
    save_steps: int = knob(100, "training steps from one checkpoint of the training to the next", 1)

    def settle(self):
        """Decide what device and dtype "auto" are. InputError if a value is not among its choices, not in its
        range, or does not go with another one."""
        for f in fields(self):
            value, flag = getattr(self, f.name), "--" + f.name.replace("_", "-")
            least, most, choices = (f.metadata[key] for key in ("least", "most", "choices"))
            if choices and value not in choices:
                raise InputError(f"{flag} {value}: choose one of {', '.join(choices)}")
            if f.type in (int, float) and not (least <= value <= most and math.isfinite(value)):
                bound = "above 0" if least == TINIEST else f"at least {least}"
                bound += f" and at most {most}" if most < math.inf else ""
                raise InputError(f"{flag} {value}: must be {bound}")
        try:
            alpha, _ = read_alpha(self.alpha)
        except ValueError:
            alpha = math.nan
        if not 0 <= alpha < math.inf:
            raise InputError(f"--alpha {self.alpha}: must be auto, 2x (twice what auto finds), or a number "
                             "of at least 0")
        self.settle_loss()
        if self.labeller == "gold" and (self.model != "tiny" or self.prompts or self.preferences):
            raise InputError("--labeller gold: judges the tiny world alone; leave out --model, --prompts and "
                             "--preferences")
        if self.labeller != "implicit" and self.reward_reference != "previous":
            raise InputError(f"--reward-reference {self.reward_reference}: is of the implicit reward alone; "
                             f"--labeller {self.labeller} has no reference")
        if self.weights == "dummy" and self.model == "tiny":
            raise InputError("--weights dummy: stands in for a --model NAME; tiny has weights of its own")
        if self.reference and self.model == "tiny":
            raise InputError(f"--reference {self.reference}: needs --model, what was trained from it")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.dtype == "auto":
            self.dtype = "bfloat16" if self.device.startswith("cuda") else "float32"
        try:
            torch.empty(1, device=runs.own_device(self.device))
        except (RuntimeError, AssertionError) as error:  # an unknown name, or a device that is not there
            raise InputError(f"--device {self.device}: {str(error).splitlines()[0]}")

    def settle_loss(self):
        """InputError if there is no such loss, or if a setting was given that it does not read."""
        if self.loss not in LOSSES:
            raise InputError(f"--loss {self.loss}: choose one of {', '.join(LOSSES)}")
        for f in fields(self):
            readers = [name for name in LOSSES if f.name in loss_inputs(name)]
            if readers and self.loss not in readers and getattr(self, f.name) != f.default:
                raise InputError(f"--{f.name.replace('_', '-')} {getattr(self, f.name)}: --loss {self.loss} "
                                 f"does not read it; it belongs to --loss {' or '.join(readers)}")


def read_alpha(text):
    """--alpha -> (a number, is it a multiple of alpha*?). ValueError if it is neither "auto" nor a number."""
    return (1.0, True) if text == "auto" else (float(text.removesuffix("x")), text.endswith("x"))


def parse_settings(argv=None):
    """Command line -> Settings. What is not given there is the loss's or the model's own, or the default."""
    own = [f"{name} has settings of its own: {values}"
           for name, values in {**models.SETTINGS, **LOSS_SETTINGS}.items()]
    losses = [f"  {name:8}{', '.join(x for x in loss_inputs(name) if hasattr(Settings, x))}"
              for name in LOSSES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(["losses, and the settings that each reads:", *losses, *own]))
    for f in fields(Settings):
        default = f"default: {f.default}" if f.default != "" else "default: none"
        options = f"{', '.join(f.metadata['choices'])}; " if f.metadata["choices"] else ""
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, metavar=f.type.__name__.upper(),
                            help=f"{f.metadata['help']} ({options}{default})")
    parser.add_argument("--dry-run", action="store_true", help="check what can be checked, measure the "
                        "machine, print the plan with sizes and times; write nothing to --out")
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    dry_run = given.pop("dry_run")
    model, loss = given.get("model", Settings.model), given.get("loss", Settings.loss)
    named = dict(models.SETTINGS.get(model, {}))
    if "preferences" in given:
        named.pop("prompts", None)  # they belong to the name's own preferences
    settings = Settings(**{**named, **LOSS_SETTINGS.get(loss, {}), **given})
    settings.out = settings.out or f"out/{Path(model).name}"
    settings.settle()
    return settings, dry_run


# ----------------------------------------------------------------------------------------------------------
# The Transformer: one forward for training, prefill and decoding
# Shapes: B batch, T time, S cached time, C channels, H heads, G heads of keys, D head size, V vocabulary


def rotary_frequencies(config, device):
    """Angle per position of each pair of channels, (D/2,) float32. Llama-3.1 stretches the slow ones."""
    pair = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device)
    freq = config.rope_theta ** (-pair / config.head_size)
    if config.rope_scaling:
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # in pre-training's context
        slow, fast = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - slow) / (fast - slow)).clamp(0, 1)  # 1: fast, as it was; 0: slow, stretched
        freq = freq * keep + freq / s["factor"] * (1 - keep)
    return freq


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864) of x (B, H, T, D): channel i turns with channel i + D/2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)  # the angles are float32


torch.backends.cuda.enable_cudnn_sdp(False)  # Flash instead: cuDNN plans anew for each shape


class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        C, H, G, D = config.width, config.heads, config.kv_heads, config.head_size
        self.config, self.index = config, index
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.qkv = nn.Linear(C, (H + 2 * G) * D, bias=config.qkv_bias)
        self.out = nn.Linear(H * D, C, bias=config.out_bias)
        self.up = nn.Linear(C, config.hidden * (2 if config.mlp == "swiglu" else 1), bias=config.mlp_bias)
        self.down = nn.Linear(config.hidden, C, bias=config.mlp_bias)

    def forward(self, x, position, rope, cache=None, sees=None):
        """x (B, T, C) at position (1 or B, T) -> (B, T, C). sees: what of the cache, or None for causal
        attention among these T."""
        x = x + self.attention(self.norm1(x), position, rope, cache, sees)
        h = self.up(self.norm2(x))
        if self.config.mlp == "swiglu":
            gate, h = h.chunk(2, dim=-1)
            h = F.silu(gate) * h
        else:
            h = F.gelu(h, approximate="tanh")
        return x + self.down(h)

    def attention(self, x, position, rope, cache, sees):
        B, T, _ = x.shape
        H, G, D = self.config.heads, self.config.kv_heads, self.config.head_size
        qkv = self.qkv(x).view(B, T, H + 2 * G, D).transpose(1, 2)  # (B, H+2G, T, D)
        qk, v = qkv.split([H + G, G], dim=1)
        if rope:
            qk = rotate(qk, *rope)
        q, k = qk.split([H, G], dim=1)
        if cache:
            cache.write(self.index, position, k, v)
        if sees is None:
            # Training, prefill and scoring: no mask is ever built, so that CUDA can take Flash attention.
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != G)
        else:
            y = cache.attend(self.index, q, sees)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))


def make_norm(config):
    return {"rms": nn.RMSNorm, "layer": nn.LayerNorm}[config.norm](config.width, eps=config.eps)


class Transformer(nn.Module):
    """GPT-2 and Llama in one: they differ by fields of model.Config. Parameter names:
    model.parameter_shapes."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context, config.width) if config.position == "learned" else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = make_norm(config)
        self.recompute = False  # in training: activation checkpointing, layer by layer
        self.computes = None  # device and dtype of the arithmetic, where the weights' own are others
        self.head = None
        if config.labels or not config.tied:
            self.head = nn.Linear(config.width, config.labels or config.vocab_size, bias=False)

    @property
    def device(self):
        return self.computes[0] if self.computes else self.embed.weight.device

    @property
    def dtype(self):
        return self.computes[1] if self.computes else self.embed.weight.dtype

    def forward(self, tokens, cache=None):
        """Token ids (B, T) -> hidden states after the last norm (B, T, C), which logits() takes.

        Without a cache, or with an empty one, rows start at position 0 and attention is plainly causal:
        rows are padded on the right, where nothing that counts can see the padding. With a filled cache row
        b goes on at cache.length[b]. The caller moves cache.length and cache.used on: it alone knows what was
        padding.
        """
        B, T = tokens.shape
        position = torch.arange(T, device=tokens.device)[None]  # (1, T)
        sees = None
        if cache:
            position = position + cache.length[:B, None]  # (B, T)
            if cache.used:
                sees = cache.sees(position)
        x, rope = self.embed(tokens), None
        if self.position is not None:
            x = x + self.position(position.clamp(max=self.config.context - 1))  # padding may reach beyond
        else:
            angle = position[:, None, :, None] * rotary_frequencies(self.config, tokens.device)
            rope = angle.cos(), angle.sin()  # (1 or B, 1, T, D/2)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, position, rope, use_reentrant=False)
            else:
                x = layer(x, position, rope, cache, sees)
        return self.norm(x)

    @property
    def head_weight(self):
        return self.embed.weight if self.head is None else self.head.weight  # (V, C)

    def logits(self, hidden):
        """(..., C) -> (..., V)"""
        return F.linear(hidden, self.head_weight)


def new_model(config, seed):
    """Random weights as GPT-2 draws them: normal(0, 0.02), smaller for what is added to the residual."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):  # shapes alone: PyTorch's own random weights would take as long again
        net = Transformer(config)
    for name, p in net.to_empty(device="cpu").named_parameters():
        if p.dim() == 2:
            deep = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.layers) if deep else 0.02, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        else:  # of a norm
            nn.init.ones_(p)
    return net


def load_model(directory, device, dtype=torch.float32):
    """The checkpoint in a Hugging Face directory as a Transformer."""
    config = models.read_config(directory)
    with torch.device("meta"):  # shapes alone: the weights are about to be replaced
        net = Transformer(config)
    net.load_state_dict(models.read_weights(directory, config, dtype), assign=True)
    return net.to(device)


# ----------------------------------------------------------------------------------------------------------
# KV cache and sampler


def has_ragged_attention(config, device, dtype):
    """Is there a kernel here that looks at as many places of each row as that row has? (Flash attention 2)"""
    if torch.device(device).type != "cuda" or dtype != torch.bfloat16 or torch.version.hip:
        return False
    new = torch.cuda.get_device_capability(device) >= (8, 0)
    return new and config.head_size % 8 == 0 and config.head_size <= 256


class KVCache:
    """Keys and values of many rows, each filled from position 0 to its own length. The sampler owns it."""

    def __init__(self, config, rows, capacity, device, dtype):
        shape = (config.layers, rows, capacity, config.kv_heads, config.head_size)
        # Zeros, not empty: a masked place has weight 0, but fresh memory may hold NaN, and 0 * NaN is NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity, self.ragged = capacity, has_ragged_attention(config, device, dtype)
        self.row = torch.arange(rows + 1, device=device)  # one more: the end of the last
        self.length = torch.zeros(rows, device=device, dtype=torch.long)  # valid places of each row
        self.used = 0  # no row is longer than this; the host knows it, so attention need not look further

    def write(self, layer, position, k, v):
        """k, v (B, G, T, D) to the places position (B, T) of the first B rows."""
        row = self.row[:len(position), None]
        self.k[layer][row, position] = k.transpose(1, 2)
        self.v[layer][row, position] = v.transpose(1, 2)

    def sees(self, position):
        """What attend() lets the queries at position (B, T) look at, each at all places up to its own: a mask
        of the places then in use, 0 or -inf, (B, 1, T, S); with ragged attention their numbers, (B,)."""
        if self.ragged:
            return position[:, -1].int() + 1
        S = min(self.used + position.shape[1], self.capacity)
        hidden = torch.arange(S, device=position.device) > position[:, None, :, None]
        return self.k.new_zeros(hidden.shape).masked_fill(hidden, -math.inf)

    def attend(self, layer, q, sees):
        """Attention of q (B, H, T, D) to the first B rows -> (B, H, T, D)."""
        B, H, T, D = q.shape
        if self.ragged:
            # The rows as one long sequence: row b has T queries from b * T on, and keys from b * capacity on,
            # sees[b] of them for its last query, one less for the one before, and so on.
            # Called by its inner name: torch.nn.attention.varlen knows no seqused_k before torch 2.12.
            q, k, v = (x.flatten(0, 1) for x in (q.transpose(1, 2), self.k[layer], self.v[layer]))  # (.., D)
            row = self.row[:B + 1].int()
            y, *_ = torch.ops.aten._flash_attention_forward(
                q, k, v, row * T, row * self.capacity, T, self.capacity,
                dropout_p=0.0, is_causal=True, return_debug_mask=False, seqused_k=sees)
            return y.view(B, T, H, D).transpose(1, 2)
        # Subtle: the H/G query heads that share a head of keys go in as more queries (along T) of that one
        # head, so that cached keys and values are read once and not repeated H/G times.
        k, v = (x[layer, :B, :sees.shape[-1]].transpose(1, 2) for x in (self.k, self.v))  # (B, G, S, D)
        G = k.shape[1]
        mask = sees if T == 1 else sees.repeat(1, 1, H // G, 1)  # the mask of one query broadcasts
        return F.scaled_dot_product_attention(q.reshape(B, G, -1, D), k, v, attn_mask=mask).view(B, H, T, D)

    def copy(self, source, rows, places):
        """Copy rows of another cache, or of this one, to these places."""
        for row, place in zip(rows, places):  # one by one: together they would need memory in between
            for mine, theirs in ((self.k, source.k), (self.v, source.v)):
                mine[:, place, :source.used] = theirs[:, row, :source.used]
        self.length[places] = source.length[rows]
        self.used = max(self.used, source.used)


def prefill(model, prompts):
    """Read P prompts, lists of ids: a cache that holds them, and the states (P, C) of their last tokens."""
    tokens, length = pad(prompts, model.device)
    cache = KVCache(model.config, *tokens.shape, tokens.device, model.dtype)
    hidden = model(tokens, cache)
    cache.length, cache.used = length, tokens.shape[1]
    return cache, hidden[torch.arange(len(prompts), device=tokens.device), length - 1]


def pick(logits, uniform, temperature, top_p):
    """Logits (B, V) and one random number in [0, 1) a row (B,) -> token ids (B,), by inverting the CDF."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, token = (logits.float() / temperature).softmax(-1), None  # (B, V)
    if top_p < 1:
        # The nucleus is nearly always among the 64 likeliest tokens, which take a fraction of a sort to find.
        # But to ask if they were enough would make the host wait for a GPU: there, everything is sorted.
        V = logits.shape[-1]
        count = 64 if logits.is_cpu else V
        while True:
            likeliest, token = probs.topk(min(count, V))  # in falling order
            if count >= V or (likeliest.sum(-1) >= top_p).all():
                break
            count *= 8
        probs = likeliest.where(likeliest.cumsum(-1) - likeliest < top_p, 0)
    cdf = probs.cumsum(-1)
    place = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)  # (B, 1)
    place = place.clamp(max=cdf.shape[-1] - 1)  # where probs are NaN the search runs off the end
    return (place if token is None else token.gather(1, place))[:, 0]


EVALUATION, FILTER = 2**31, 2**32  # in place of the round's number, so that other answers draw other numbers


def random_numbers(seed, round, prompt, sample, count):
    """The numbers in [0, 1), (count,), that this sample of these prompt ids draws with, come what may."""
    key = int.from_bytes(hashlib.sha256(np.array(prompt, dtype=np.int64)).digest()[:8], "little")
    return np.random.default_rng([seed, round, key, sample]).random(count, dtype=np.float32)


def record(work, device):
    """What work() does on a GPU as a graph to replay(): one launch instead of a thousand. Nothing is done
    yet; addresses are taken down, so work() must find all that it needs in the same place every time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
    return graph


class Flight:
    """The rows being sampled, 0 .. len(owner) - 1. When a row ends, the last one takes its place, and samples
    of waiting prompts come in behind. All state is on the device, so that a step waits for nothing."""

    def __init__(self, model, rows, capacity, max_new_tokens, stop_ids, temperature, top_p):
        device = model.device
        self.model, self.temperature, self.top_p = model, temperature, top_p
        self.stop_ids = set(stop_ids)
        self.stops = torch.zeros(model.config.vocab_size, device=device, dtype=torch.bool)  # the same, by id
        self.stops[list(stop_ids)] = True
        self.cache = KVCache(model.config, rows, capacity, device, model.dtype)
        self.owner = []  # (prompt, sample) of each row
        self.token, self.count, self.limit = torch.zeros(3, rows, device=device, dtype=torch.long)
        self.done = torch.ones(rows, device=device, dtype=torch.bool)
        # A row that has ended goes on writing, behind its answer, until land(): hence one column more.
        self.answer = torch.zeros(rows, max_new_tokens + 1, device=device, dtype=torch.long)
        self.uniform = torch.zeros(rows, max_new_tokens + 1, device=device)
        self.graphs = {}  # number of rows -> a recorded step of them

    def admit(self, prompts, samples, uniform, limits):
        """Prefill prompts, (index, ids) each, once, and start as many rows for each as it gets samples."""
        cache, last = prefill(self.model, [ids for _, ids in prompts])
        new = slice(len(self.owner), len(self.owner) + len(prompts) * samples)
        rows = [row for row in range(len(prompts)) for _ in range(samples)]
        self.cache.copy(cache, rows, list(range(new.start, new.stop)))
        self.owner += [(index, sample) for index, _ in prompts for sample in range(samples)]
        self.count[new], self.done[new] = 0, False
        self.limit[new] = torch.tensor(limits, device=last.device).repeat_interleave(samples)
        self.uniform[new, :-1] = torch.from_numpy(uniform).to(last.device)
        self.emit(new, self.model.logits(last).repeat_interleave(samples, dim=0))

    def step(self):
        """One more token for every row."""
        rows = len(self.owner)
        if self.cache.ragged:  # else attention depends on cache.used, and no two steps are the same
            rows = min(max(16, 1 << (rows - 1).bit_length()), len(self.done))  # few numbers, so few graphs
        if rows in self.graphs:
            self.graphs[rows].replay()
        else:
            self.advance(rows)
            if self.cache.ragged:  # only now: what a kernel sets up at its first use cannot be recorded
                self.graphs[rows] = record(partial(self.advance, rows), self.model.device)
        self.cache.used = min(self.cache.used + 1, self.cache.capacity)

    def advance(self, rows):
        """One more token for the first rows, those that are done aside. Here the host waits for nothing, and
        on a ragged cache does the same every time."""
        rows = slice(0, rows)
        hidden = self.model(self.token[rows, None], self.cache)
        self.cache.length[rows] += ~self.done[rows]
        self.emit(rows, self.model.logits(hidden[:, 0]))

    def emit(self, rows, logits):
        place = self.count[rows, None]  # (B, 1)
        uniform = self.uniform[rows].gather(1, place)[:, 0]
        token = self.token[rows] = pick(logits, uniform, self.temperature, self.top_p)
        self.answer[rows].scatter_(1, place, token[:, None])
        self.count[rows] += ~self.done[rows]
        self.done[rows] |= self.stops[token] | (self.count[rows] >= self.limit[rows])

    def land(self):
        """Take out the rows that have ended: a list of (owner, ids, finish)."""
        done = self.done[:len(self.owner)].tolist()
        ended = [row for row, d in enumerate(done) if d]
        if not ended:
            return []
        landed = []
        for row, count, ids in zip(ended, self.count[ended].tolist(), self.answer[ended].tolist()):
            finish = "stop" if ids[count - 1] in self.stop_ids else "length"
            landed.append((self.owner[row], ids[:count], finish))
        left = len(done) - len(ended)
        holes = [row for row in ended if row < left]
        movers = [row for row in range(left, len(done)) if not done[row]]
        if holes:
            for state in (self.token, self.count, self.limit, self.done, self.answer, self.uniform):
                state[holes] = state[movers]
            self.cache.copy(self.cache, movers, holes)
        for hole, mover in zip(holes, movers):
            self.owner[hole] = self.owner[mover]
        del self.owner[left:]
        self.done[left:], self.cache.length[left:] = True, 0
        self.cache.used = int(self.cache.length[:left].max()) if left else 0
        return landed


@torch.inference_mode()
def generate(model, prompts, samples, *, stop_ids, seed, max_new_tokens, rows, round=0, temperature=1.0,
             top_p=1.0, on_token=None):
    """Sample answers. Yields (prompt index, sample, ids with the end token, "stop" or "length") as they end.

    prompts: lists of token ids, each shorter than the context. rows: sequences in flight. on_token: called
    with each id as it is drawn, for a single row.
    """
    config = model.config
    rows = max(samples, min(rows, len(prompts) * samples) // samples * samples)  # whole prompts only
    capacity = min(config.context, max(map(len, prompts)) + max_new_tokens)
    flight = Flight(model, rows, capacity, max_new_tokens, stop_ids, temperature, top_p)
    # To ask a GPU which rows have ended is to wait for it, so ask only now and then.
    steps = 16 if flight.cache.ragged and on_token is None else 1
    waiting = deque(enumerate(prompts))
    while waiting or flight.owner:
        room = (rows - len(flight.owner)) // samples
        if waiting and room:
            group = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            uniform = np.stack([random_numbers(seed, round, ids, sample, max_new_tokens)
                                for _, ids in group for sample in range(samples)])
            limits = [min(max_new_tokens, config.context - len(ids)) for _, ids in group]
            flight.admit(group, samples, uniform, limits)
            if on_token:
                on_token(int(flight.token[0]))
        for (index, sample), ids, finish in flight.land():
            yield index, sample, ids, finish
        for _ in range(steps if flight.owner else 0):
            flight.step()
            if on_token:
                on_token(int(flight.token[0]))


def pad(sequences, device):
    """Lists of token ids -> (B, T), padded on the right with zeros, and their lengths (B,)."""
    length = [len(ids) for ids in sequences]
    tokens = torch.tensor([ids + [0] * (max(length) - len(ids)) for ids in sequences])
    return tokens.to(device), torch.tensor(length, device=device)


# ----------------------------------------------------------------------------------------------------------
# Sequence log-probs

LOGITS = 2**24  # logits in memory at once on a CPU: 64 MB of float32, those of 130 tokens of Llama-3


def chunk_size(weight):
    """Tokens whose logits, the product with weight (V, C), are in memory at once. On a GPU more of them: each
    chunk reads all of the weight there."""
    return max(1, LOGITS * (8 if weight.is_cuda else 1) // len(weight))


class TokenLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target]: (N, C), (V, C), (N,) -> (N,), in float32 or better.

    The logits of a batch would be its largest tensor by far (4096 tokens of Llama-3: 2 GB in float32). So
    they are made chunk by chunk, and made again in the backward pass, where they turn into their own gradient
    in place: d logprob / d logits = onehot(target) - softmax(logits).
    """

    @staticmethod
    def chunks(hidden, weight, targets):
        size = chunk_size(weight)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = hidden[rows] @ weight.T  # (n, V)
            yield rows, logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[rows, None]

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        logprobs, totals = [], []
        for _, logits, target in TokenLogprobs.chunks(hidden, weight, targets):
            chosen = logits.gather(-1, target)
            top = logits.amax(-1, keepdim=True)
            totals.append(top + logits.sub_(top).exp_().sum(-1, keepdim=True).log())  # log of the sum of exp
            logprobs.append(chosen - totals[-1])
        ctx.save_for_backward(hidden, weight, targets, torch.cat(totals))
        return torch.cat(logprobs)[:, 0]

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, total = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=grad.dtype)
        for rows, logits, target in TokenLogprobs.chunks(hidden, weight, targets):
            g = grad[rows, None]
            slope = logits.sub_(total[rows]).exp_().mul_(-g).scatter_add_(-1, target, g).to(weight.dtype)
            grad_hidden[rows] = slope @ weight
            grad_weight += slope.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None


def answer_states(model, prompts, answers):
    """What scores the tokens of B answers, N in all, given B prompts, as lists of ids.

    Returns hidden states (N, C), the tokens (N,), and a function that sums (N,) over each answer, to (B,).
    The end token belongs to the answer; the prompt does not. Padding is on the right, where causal attention
    cannot see it, so no mask is needed; what comes out at the padding is not looked at.
    """
    tokens, _ = pad([p + a for p, a in zip(prompts, answers)], model.device)
    hidden = model(tokens[:, :-1])  # (B, T, C)
    # Subtle: a token is scored by the output one place before it: answers begin at len(prompt) - 1.
    return states_of(hidden, tokens[:, 1:], [len(p) - 1 for p in prompts], answers)


def states_of(hidden, targets, starts, answers):
    """What answer_states returns, of hidden states (B, T, C) and targets (B, T) in which the answers start at
    these places."""
    T = targets.shape[1]
    place = torch.tensor([row * T + t for row, (start, answer) in enumerate(zip(starts, answers))
                          for t in range(start, start + len(answer))], device=targets.device)  # (N,)

    def total(values):
        return values.new_zeros(targets.numel()).index_put((place,), values).view(-1, T).sum(1)

    return hidden.flatten(0, 1)[place], targets.flatten()[place], total


def sequence_logprobs(model, prompts, answers):
    """log pi(answer | prompt), summed over the answer's tokens: B lists of ids each -> (B,)."""
    return total_logprobs(model, *answer_states(model, prompts, answers))


def total_logprobs(model, hidden, targets, total):
    return total(TokenLogprobs.apply(hidden, model.head_weight, targets))


def continued_logprobs(model, prompts, last, rows, answers):
    """sequence_logprobs of B answers, each to the prompt in one of the rows that prefill() has read."""
    tokens, _ = pad(answers, model.device)  # (B, T)
    hidden = last[rows, None]  # (B, 1, C): the prompt's last state scores the first token
    T = tokens.shape[1]
    if T > 1:
        cache = KVCache(model.config, len(rows), prompts.used + T, model.device, model.dtype)
        cache.copy(prompts, rows, list(range(len(rows))))
        hidden = torch.cat((hidden, model(tokens[:, :-1], cache)), dim=1)
    return total_logprobs(model, *states_of(hidden, tokens, [0] * len(answers), answers))


def sequence_logprobs_and_kl(model, reference, prompts, answers):
    """log pi(answer | prompt) and SeqKL(ref || pi), both (B,), of TDPO (arXiv 2404.11999).

    SeqKL sums KL(ref(.|prefix) || pi(.|prefix)) over the places of the answer. Whole distributions of both
    models stand side by side for a chunk of places at a time, and are made again in the backward pass.
    """
    hidden, targets, total = answer_states(model, prompts, answers)
    with torch.no_grad():
        fixed, _, _ = answer_states(reference, prompts, answers)  # (N, C of the reference)

    def chunk(hidden, fixed, targets):
        policy, ref = (F.log_softmax(net.logits(x), -1, dtype=torch.promote_types(x.dtype, torch.float32))
                       for net, x in ((model, hidden), (reference, fixed)))  # (n, V)
        kl = F.kl_div(policy, ref, reduction="none", log_target=True).sum(-1)
        return torch.stack((policy.gather(-1, targets[:, None])[:, 0], kl))  # (2, n)

    parts = zip(*(x.split(chunk_size(model.head_weight)) for x in (hidden, fixed, targets)))
    logprobs, kl = torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts], dim=1)
    return total(logprobs), total(kl)


def prompts_and_answers(samples):
    return [x.prompt.ids for x in samples], [x.tokens for x in samples]


def batches(sizes, tokens):
    """Indices of sizes in groups of similar size, largest first, no group above `tokens` when padded."""
    groups = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if groups and sizes[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens:  # its first is its largest
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@torch.no_grad()
def in_passes(samples, sizes, work, budget, update=lambda count: None):
    """work(indices of samples) -> a value for each, for all of them, in groups of similar size that the
    budget and memory allow. update: is told how many more are done."""
    result, todo = [math.nan] * len(samples), deque(batches(sizes, budget.tokens))
    while todo:
        safe_point()
        group = todo.popleft()
        values = within_memory(work, group)
        if values is None:
            budget.shrink([samples[i] for i in group], sizes[group[0]])
            left = [i for g in (group, *todo) for i in g]
            todo = deque([left[j] for j in g] for g in batches([sizes[i] for i in left], budget.tokens))
            continue
        for i, value in zip(group, values):
            result[i] = value
        update(len(group))
    return result


def score(model, samples, budget, update=lambda count: None):
    """Sequence log-probs of any number of samples, as floats. A prompt is read once for all its answers."""
    answers = {}
    for x in samples:
        answers.setdefault(tuple(x.prompt.ids), []).append(x)
    answers = list(answers.values())  # of one prompt each

    def of_prompts(group):
        prompts, last = prefill(model, [answers[i][0].prompt.ids for i in group])
        mine = [(row, x) for row, i in enumerate(group) for x in answers[i]]

        def of_answers(some):
            rows, ids = zip(*((mine[i][0], mine[i][1].tokens) for i in some))
            return continued_logprobs(model, prompts, last, list(rows), ids).tolist()

        sizes = [prompts.used + len(x.tokens) for _, x in mine]
        logprobs = iter(in_passes([x for _, x in mine], sizes, of_answers, budget, update))
        return [list(islice(logprobs, len(answers[i]))) for i in group]

    firsts = [group[0] for group in answers]
    found = in_passes(firsts, [len(x.prompt.ids) for x in firsts], of_prompts, budget)
    logprob = {id(x): value for group, values in zip(answers, found) for x, value in zip(group, values)}
    return [logprob[id(x)] for x in samples]


# ----------------------------------------------------------------------------------------------------------
# The formulas: pure functions of tensors or arrays
# w and l: chosen (won) and rejected (lost) answer. p and r: their log-probs under policy and reference;
# n: their tokens; score: their shaped reward, or the score in their data; kl: SeqKL(ref || pi). All (B,).
# beta * (p - r) is the reward that the policy itself carries. A loss says what it needs by the names of its
# parameters, no more.


def dpo_loss(p_w, p_l, r_w, r_l, beta):
    """-log sigmoid(beta * ((p_w - r_w) - (p_l - r_l))), (B,). arXiv 2305.18290 eq. 7"""
    return -F.logsigmoid(beta * ((p_w - r_w) - (p_l - r_l)))


def cdpo_loss(p_w, p_l, r_w, r_l, beta, label_smoothing):
    """DPO where each label is wrong with this probability: Mitchell, "A note on DPO with noisy preferences"
    (2023)."""
    right, wrong = dpo_loss(p_w, p_l, r_w, r_l, beta), dpo_loss(p_l, p_w, r_l, r_w, beta)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def lr_dpo_loss(p_w, p_l, r_w, r_l, n_w, n_l, beta, length_margin):
    """DPO with a length margin, the loss of iLR-DPO (arXiv 2406.11817; R-DPO 2403.19159).

    Mind the sign: a longer winner has part of its margin for free, so less is learned from it.
    """
    return -F.logsigmoid(beta * ((p_w - r_w) - (p_l - r_l)) + length_margin * (n_w - n_l))


def odpo_loss(p_w, p_l, r_w, r_l, score_w, score_l, beta, offset):
    """DPO whose winner must win by more, the better its score: arXiv 2402.10571, with the authors'
    log as its f. score_w > score_l is the caller's to see to: else this is infinite, or not a number."""
    return -F.logsigmoid(beta * ((p_w - r_w) - (p_l - r_l)) - offset * (score_w - score_l).log())


def tdpo1_loss(p_w, p_l, r_w, r_l, kl_w, kl_l, beta):
    """Token-level DPO, held to the reference at every token of both answers. arXiv 2404.11999"""
    return -F.logsigmoid(beta * ((p_w - r_w) - (p_l - r_l) - (kl_l - kl_w)))


def tdpo2_loss(p_w, p_l, r_w, r_l, kl_w, kl_l, beta, kl_weight):
    """TDPO1, but the KL of the chosen answer is a fixed standard for that of the rejected one. Same paper"""
    return -F.logsigmoid(beta * ((p_w - r_w) - (p_l - r_l) - kl_weight * (kl_l - kl_w.detach())))


def ipo_loss(p_w, p_l, r_w, r_l, n_w, n_l, beta):
    """Squared distance of the margin from 1 / (2 beta), which no number of steps can overshoot:
    arXiv 2310.12036 eq. 17, beta being its tau.

    With MEANS over tokens, as its authors' own code and TRL's: the target is one number for all pairs, which
    sums, that grow with the answers, would reach by a few long answers alone.
    """
    return ((p_w - r_w) / n_w - (p_l - r_l) / n_l - 1 / (2 * beta)).square()


def simpo_loss(p_w, p_l, n_w, n_l, beta, target_margin):
    """No reference; the mean log-prob of the tokens is the reward. arXiv 2405.14734 eq. 6"""
    return -F.logsigmoid(beta * (p_w / n_w - p_l / n_l) - target_margin)


LOSSES = {"dpo": dpo_loss, "cdpo": cdpo_loss, "lr-dpo": lr_dpo_loss, "odpo": odpo_loss, "tdpo1": tdpo1_loss,
          "tdpo2": tdpo2_loss, "ipo": ipo_loss, "simpo": simpo_loss}
LOSS_SETTINGS = {"simpo": {"beta": 2.0}}  # --loss NAME -> its own defaults: its beta is another thing


def loss_inputs(name):
    return tuple(inspect.signature(LOSSES[name]).parameters)


def fdpo_keeps(sample, chosen):
    """Keep a pair while its chosen answer scores above what the policy says by itself. arXiv 2404.13846"""
    return sample < chosen


def implicit_reward(policy, reference):
    """log pi_t(y|x) - log pi_{t-1}(y|x): DPO's reward over beta, up to a constant per prompt. DICE 3.1"""
    return policy - reference


def best_and_worst(reward, length, valid, alpha, lots=None):
    """Which answers of each prompt have the highest and the lowest shaped reward, reward - alpha * length,
    among the valid ones: (P, K) arrays -> two arrays (P,). DICE section 3.2

    lots: random numbers (P, K); the second answer is then any but the best, by the lowest of these.
    """
    shaped, prompt = reward - alpha * length, np.arange(len(reward))
    best = np.where(valid, shaped, -np.inf).argmax(1)
    low = np.where(valid, shaped if lots is None else lots, np.inf)
    if lots is not None:
        low[prompt, best] = np.inf
    return best, low.shape[1] - 1 - low[:, ::-1].argmin(1)  # of equals the last: no answer meets itself


def length_gap(reward, length, valid, alpha, lots=None):
    """Mean over the prompts of length(best) - length(worst)."""
    best, worst = best_and_worst(reward, length, valid, alpha, lots)
    prompt = np.arange(len(reward))
    return float((length[prompt, best] - length[prompt, worst]).mean())


def search_alpha(reward, length, valid, lots=None):
    """The alpha >= 0 that brings the length gap nearest to 0, the middle of all that do. DICE section 3.2

    With more alpha the best answer can only get shorter and the worst only longer. So the gap is a
    staircase that only falls, and bisection finds its steps exactly. (Against random answers it can rise
    a little where the best answer changes places with the random one; a crossing is found all the same.)
    """
    def gap(alpha):
        return length_gap(reward, length, valid, alpha, lots)

    def step(below):
        """The last alpha before, and the first at which below(gap) holds."""
        low, high = 0.0, 1e-6
        while not below(gap(high)) and high < 1e12:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if below(gap(middle)) else (middle, high)
        return low, high

    if gap(0) <= 0:  # the chosen are shorter as it is
        return 0.0
    nearest = min((gap(alpha) for alpha in step(lambda g: g <= 0)), key=abs)
    first = 0.0 if gap(0) == nearest else step(lambda g: g <= nearest)[1]
    if gap(1e12) == nearest:  # the lowest stair has no end
        return first
    return (first + step(lambda g: g < nearest)[0]) / 2


# ----------------------------------------------------------------------------------------------------------
# What flows through the loop


@dataclass
class Prompt:
    content: object  # the text of one user turn, or a list of {"role", "content"}
    ids: list  # its token ids in the chat format, up to where the answer begins
    steps: str | None = None  # Step-DPO: how the answer begins, which ids have too; only what follows counts

    @property
    def key(self):
        """Equal for equal prompts, however their answers begin."""
        return json.dumps(self.content)


@dataclass
class Sample:
    prompt: Prompt
    tokens: list  # ids of the answer, the end token included (but not after a step of Step-DPO)
    text: str
    number: int = 0  # which of the prompt's K
    finish: str = "stop"  # or "length": cut by the limit
    logprob: float = math.nan  # under pi_t, from which training starts and which is its reference
    previous: float = math.nan  # log-prob under pi_{t-1}
    reward: float = math.nan  # the labeller's
    shaped: float = math.nan  # reward less the penalty for length; of an offline answer the score in its data

    def __len__(self):
        """Tokens of prompt and answer."""
        return len(self.prompt.ids) + len(self.tokens)

    @property
    def padded(self):
        """What it costs in a batch of its own."""
        return len(self)


@dataclass
class Pair:
    chosen: Sample
    rejected: Sample
    source: str  # "generated" or "replayed"

    def __len__(self):
        return len(self.chosen) + len(self.rejected)

    @property
    def padded(self):
        return 2 * max(len(self.chosen), len(self.rejected))

    @property
    def prompt(self):
        return self.chosen.prompt


class ReplayBuffer:
    """The offline pairs. Each round draws a share from them, to stay near human data. DICE section 3.3"""

    def __init__(self, pairs):
        self.pairs = pairs

    def mix(self, generated, gamma, rng):
        """Generated pairs and a share gamma of offline ones, shuffled. No prompt is on both sides."""
        if (gamma < 1 and not generated) or (gamma > 0 and not self.pairs):
            raise InputError(f"--gamma {gamma}: cannot mix {len(generated)} generated and {len(self.pairs)} "
                             "offline pairs; give --preferences FILE, or --gamma 0 to do without")
        offline = [self.pairs[i] for i in rng.permutation(len(self.pairs))]
        generated = [generated[i] for i in rng.permutation(len(generated))]
        cost = Counter(pair.prompt.key for pair in offline)  # offline pairs that a generated one shuts out
        generated.sort(key=lambda pair: cost[pair.prompt.key])
        left = np.cumsum([len(offline)] + [-cost[pair.prompt.key] for pair in generated])
        new, old = mixture_sizes(left.tolist(), gamma)
        taken = {pair.prompt.key for pair in generated[:new]}
        mixture = generated[:new] + [pair for pair in offline if pair.prompt.key not in taken][:old]
        return [mixture[i] for i in rng.permutation(len(mixture))]


def mixture_sizes(left, gamma):
    """How many (generated, offline) pairs make the largest mixture with a share gamma of offline ones.

    left[g]: the offline pairs to choose from when g generated pairs are used, g = 0 .. len(left) - 1. The
    smaller part counts up, the larger is the nearest whole number; if that never fits, all of what should
    be larger.
    """
    most = len(left) - 1
    if gamma in (0, 1):
        return (0, left[0]) if gamma else (most, 0)
    if gamma < 0.5:
        sizes = [(round(old * (1 - gamma) / gamma), old) for old in range(1, left[0] + 1)]
    else:
        sizes = [(new, round(new * gamma / (1 - gamma))) for new in range(1, most + 1)]
    fitting = [(new, old) for new, old in sizes if new <= most and old <= left[new]]
    return max(fitting, default=(most, 0) if gamma <= 0.5 else (0, left[0]))


# ----------------------------------------------------------------------------------------------------------
# Training


def lengths(samples, device):
    """Tokens of each answer, (B,)."""
    return torch.tensor([float(len(x.tokens)) for x in samples], device=device)


def sft_losses(model, samples, settings):
    """Mean negative log-likelihood of the tokens of each answer (B,), and what to log."""
    tokens = lengths(samples, model.device)
    losses = -sequence_logprobs(model, *prompts_and_answers(samples)) / tokens
    return losses, {"loss": losses, "answer_tokens": tokens}


def preference_losses(model, pairs, settings, reference=None):
    """--loss of pairs (B,) whose samples know their log-prob under the reference, and what to log. The
    reference itself is needed by losses with a KL alone."""
    samples = [p.chosen for p in pairs] + [p.rejected for p in pairs]  # one batch through the model
    texts = prompts_and_answers(samples)
    if reference:
        logprobs, kl = sequence_logprobs_and_kl(model, reference, *texts)
    else:
        logprobs, kl = sequence_logprobs(model, *texts), None
    known = {"p": logprobs, "r": logprobs.new_tensor([x.logprob for x in samples]), "kl": kl,
             "n": lengths(samples, model.device), "score": logprobs.new_tensor([x.shaped for x in samples])}
    terms = {f"{name}_{side}": part for name, values in known.items() if values is not None
             for side, part in zip("wl", values.chunk(2))}
    inputs = vars(settings) | terms
    losses = LOSSES[settings.loss](**{name: inputs[name] for name in loss_inputs(settings.loss)})
    margin = settings.beta * ((terms["p_w"] - terms["r_w"]) - (terms["p_l"] - terms["r_l"]))
    stats = {"loss": losses, "accuracy": (margin > 0).float(), "margin": margin,
             "chosen_logprob": terms["p_w"], "rejected_logprob": terms["p_l"],
             "chosen_tokens": terms["n_w"], "rejected_tokens": terms["n_l"]}
    if reference:
        stats |= {"chosen_kl": terms["kl_w"], "rejected_kl": terms["kl_l"]}
    return losses, stats


def training_order(items, epochs, rng, keep, history):
    """Indices of items, shuffled anew in every epoch, of those that keep(epoch, indices) still wants. What
    was kept goes into history, from which an interrupted training goes on."""
    kept = list(range(len(items)))
    for epoch in range(epochs):
        if keep and epoch == len(history):
            history.append(keep(epoch, kept))
        kept = history[epoch] if keep else kept
        yield from rng.permutation(kept).tolist()


def load_to_train(directory, settings, device):
    """The checkpoint in a directory, ready for training."""
    # First in the dtype of the arithmetic, in which it is its own reference.
    model = load_model(directory, "cpu", getattr(torch, settings.dtype))
    count = sum(p.numel() for p in model.parameters())
    if settings.dtype == "float32" and runs.world() == 1 and not runs.offloads(settings, count, device):
        model.to(device)
    else:
        shard(model, settings, device)
    large = count > 1e9
    model.recompute = settings.recompute == "yes" or (settings.recompute == "auto" and large)
    return model


def mean_gradient(model, losses_of, items, settings, budget):
    """Gradient of the mean loss of some items, and the means of what is to be logged.

    Items go through the model in micro-batches of similar size, over which gradients add up: the split
    changes the memory needed and nothing else. Processes share the items.
    """
    world, rank = runs.world(), runs.rank()
    mine = sorted(items, key=lambda x: -x.padded)[rank::world]

    def one_pass(group, weight):
        losses, stats = losses_of(model, group, settings)
        (losses.sum() * weight / len(items)).backward()
        sums = torch.stack([values.detach().double().sum() for values in stats.values()]).tolist()
        return dict(zip(stats, sums))

    while True:
        totals, groups = Counter(), batches([x.padded for x in mine], budget.tokens)
        passes = int(runs.over_all(float(len(groups)), "MAX"))  # every process must take part in every pass
        for turn in range(passes):
            counts = turn < len(groups)  # else it goes along with what counts nothing
            group = [mine[i] for i in groups[turn]] if counts else [(mine or items)[-1]]
            sums = within_memory(one_pass, group, world * counts)  # FSDP takes the mean over processes
            if sums is None:
                break
            if counts:
                totals.update(sums)
        else:
            means = runs.over_all([totals[name] / len(items) for name in sums])
            return dict(zip(sums, means))
        if world > 1:
            raise InputError("out of memory in training, and several processes cannot split their passes on "
                             "the way: begin anew with a lower --train-tokens")
        budget.shrink(group, group[0].padded)
        if model.computes:  # sharded: a pass that broke off leaves FSDP in the middle of things
            raise runs.Shrunk
        model.zero_grad(set_to_none=True)


def train(run, stage, model, losses_of, items, *, lr, steps, epochs, batch, decay=False, keep=None):
    """AdamW on losses_of(model, some items, settings), items being Samples or Pairs. keep: fdpo, or None.

    Goes on from the stage's last checkpoint, if there is one. InputError before the step that a non-finite
    loss or gradient would spoil.
    """
    s, history = run.settings, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    first = saved = run.resume_training(stage, model, optimizer, history)
    rng, keep = np.random.default_rng([s.seed, *stage.encode()]), keep and partial(keep, model)
    order = training_order(items, epochs, rng, keep, history)
    for _ in islice(order, first * batch):  # what is behind us already
        pass
    steps = min(steps, math.ceil(epochs * len(items) / batch))
    for step in tqdm(range(first, steps), desc=stage, unit="step", initial=first, total=steps):
        stop = runs.over_all(float(bool(runs.STOP)), "MAX")  # all processes, or none
        if step > saved and (stop or step % s.save_steps == 0):
            run.save_training(stage, model, optimizer, step, history)
            saved = step
        if stop:
            raise runs.Interrupted
        chosen = [items[i] for i in islice(order, batch)]
        if not chosen:  # the filter has left nothing more to train on
            break
        started = time.perf_counter()
        rate = lr * min(1, (step + 1) / max(1, s.warmup))
        if decay:
            rate *= (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        row = mean_gradient(model, losses_of, chosen, s, run.train_budget)
        row["grad_norm"] = float(whole(nn.utils.clip_grad_norm_(model.parameters(), s.clip)))
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            optimizer.zero_grad(set_to_none=True)
            if step > saved:
                run.save_training(stage, model, optimizer, step, history)
            culprits = run.save_culprits(stage, model, chosen)
            raise InputError(f"{stage}, step {step + 1}: loss {row['loss']}, gradient norm "
                             f"{row['grad_norm']}; the step was not taken, and the model before it is kept. "
                             f"Its prompts, answers and log-probs are in {culprits}; look there, or begin "
                             "anew with a lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log({"stage": stage, "step": step + 1, **row, "lr": rate})
        run.log_speed(stage, time.perf_counter() - started, tokens=sum(map(len, chosen)))


def train_from(run, stage, directory, *what, **options):
    """train() the model in a directory; returns it. Where memory ran out, anew from the state kept last."""
    while True:
        model = run.load(directory, training=True)
        try:
            train(run, stage, model, *what, **options)
            return model
        except runs.Shrunk:
            model = None  # before the next one is loaded


def snapshot(model, dtype):
    """A model in training as one to sample from."""
    state = {name: whole(tensor).detach().to(model.device, dtype)
             for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        net = Transformer(model.config)
    net.load_state_dict(state, assign=True)
    return net


def train_pairs(run, stage, pairs, policy, *, lr, steps, keep=None):
    """Train the model in the directory `policy` on pairs whose samples hold its log-probs; return it."""
    s, reference = run.settings, None
    if "kl_w" in loss_inputs(s.loss):
        reference = run.load(policy)
    return train_from(run, stage, policy, partial(preference_losses, reference=reference), pairs, lr=lr,
                      steps=steps, epochs=s.epochs, batch=s.batch, keep=keep)


# ----------------------------------------------------------------------------------------------------------
# The run: its data, and what it keeps in its directory (see data/runs.py)


class Run(RunDirectory):
    """Settings, tokenizer, data and directory of a run. All input is read before open() writes anything."""

    def __init__(self, settings):
        super().__init__(settings.out)
        self.settings, self.device = settings, runs.join_processes(settings.device)
        self.is_tiny, self.made = settings.model == "tiny", []  # made: models that begin with random weights
        for name in (settings.prompts, settings.preferences):  # before anything is downloaded
            if name in models.PAPER.values() and not Path(name).exists():
                raise InputError(f"{name}: not there; python data/ultrafeedback.py makes it")
        if self.is_tiny or settings.weights == "dummy":
            self.base = self.out / "base"
            self.config, self.tokenizer = tiny_model() if self.is_tiny else models.stand_in(settings.model)
            self.made.append(self.base)
        else:
            self.base = models.resolve(settings.model)
            self.config = models.read_config(self.base)
            self.tokenizer = models.read_tokenizer(self.base, settings.chat)
        self.reference = None
        if settings.reference and self.made:
            self.reference = self.out / "reference"
            self.made.append(self.reference)
        elif settings.reference:
            self.reference = models.resolve(settings.reference)
        for directory in {self.base, self.reference} - {None, *self.made}:
            config = models.read_config(directory)
            if config.labels:
                raise InputError(f"{directory}: is a reward model, which cannot speak; give it to --labeller")
            if config.vocab_size < self.tokenizer.vocab_size or config.context < self.config.context:
                raise InputError(f"{directory}: has fewer embeddings than the tokenizer has ids, or a "
                                 "shorter context than the policy; they must belong together")
            models.check_weights(directory, config)
        self.labeller = None
        if settings.labeller not in ("implicit", "gold"):
            self.labeller = RewardModel(models.resolve(settings.labeller))
        self.score_budget = Budget(settings.score_tokens, "scoring")
        self.train_budget = Budget(settings.train_tokens, "training")
        self.rows, self.chunk_answers = settings.rows, settings.chunk * settings.samples
        self.read_data()

    def open(self):
        """Begin the run in its directory, or go on with it."""
        s = self.settings
        contents = {f"contents of --{key}": hashlib.sha256(Path(name).read_bytes()).hexdigest()
                    for key, name in (("prompts", s.prompts), ("preferences", s.preferences)) if name}
        self.begin(asdict(s) | contents)
        for number, directory in enumerate(self.made):
            if runs.over_all(float(not directory.exists()), "MAX"):
                self.save(self.random_model(s.seed + number), directory.name)

    def read_data(self):
        """The offline pairs, and the prompts to sample for."""
        s, offline = self.settings, []
        if s.preferences:
            offline = jsonl.read_preferences(s.preferences)
        elif self.is_tiny:
            offline = [jsonl.preference(row, "") for row in tiny.preferences(s.seed)]
        if s.prompts:
            prompts = jsonl.read_prompts(s.prompts)
        elif self.is_tiny:
            prompts = [("", text) for text in tiny.training_prompts(s.seed)]
        elif offline:
            prompts = []  # those of the usable pairs, below
        else:
            raise InputError("nothing to sample for: give --prompts FILE or --preferences FILE")
        if s.sft_steps and self.reference:
            raise InputError(f"--sft-steps {s.sft_steps}: a policy with a --reference is trained already; "
                             "give --sft-steps 0, or no --reference")
        if s.sft_steps and not offline:
            raise InputError(f"--sft-steps {s.sft_steps}: needs answers to learn; give --preferences FILE")
        if s.labeller == "implicit" and not self.reference and not s.dpo_steps:
            raise InputError("--dpo-steps 0: the implicit reward needs a policy that DPO has trained, and "
                             "what it was trained from: give --reference DIR, or leave --dpo-steps alone")
        if not offline and not self.reference and s.dpo_steps:
            raise InputError("DICE starts from a policy and the model it was DPO-trained from: give "
                             "--reference DIR, or --preferences FILE to train the policy with DPO first")
        if not offline and s.gamma and s.rounds:
            raise InputError(f"--gamma {s.gamma}: there are no offline pairs to replay; give --preferences "
                             "FILE, or --gamma 0 to do without")
        pairs = self.fitting(offline)
        count = len(pairs) - min(s.held_out, len(pairs) // 8)
        self.offline, self.held_out = pairs[:count], pairs[count:]
        prompts = prompts or {p.prompt.key: ("", p.prompt.content) for p in self.offline}.values()
        self.prompts = [self.prompt(content, where) for where, content in prompts]

    def random_model(self, seed):
        """Where the tiny world's road begins, or what --weights dummy measures."""
        model = new_model(self.config, seed)
        if not self.is_tiny:
            model.norm.weight.data.mul_(0.05)  # nearly even odds: a tied head would repeat the last token
        return model

    def prompt(self, content, where=""):
        prompt = Prompt(content, self.tokenizer.prompt(content))
        if len(prompt.ids) >= self.config.context:
            raise InputError(f"{where}: the prompt has {len(prompt.ids)} tokens and leaves no room for an "
                             f"answer in the model's context of {self.config.context}; shorten or remove it")
        return prompt

    def fitting(self, rows):
        """Pairs from rows as data/jsonl.py reads them. Those too long are counted, left out, not cut."""
        s, pairs, same = self.settings, [], 0
        limit = min(s.max_tokens, self.config.context)
        for where, content, chosen, rejected, scores, steps in rows:
            if "score_w" in loss_inputs(s.loss) and not (scores and scores[0] > scores[1]):
                raise InputError(f'{where}: --loss {s.loss} needs a "score_chosen" above its '
                                 f'"score_rejected", and has {scores or "none"}; mend or remove the row')
            prompt, encode = Prompt(content, self.tokenizer.prompt(content), steps), self.tokenizer.answer
            if steps is not None:  # one step of an answer: what comes before it is given, and it ends nothing
                encode = partial(self.tokenizer.encode, start=False)
                prompt.ids += encode(steps)
            best, worst = (Sample(prompt, encode(text), text, shaped=score)
                           for text, score in zip((chosen, rejected), scores or (math.nan, math.nan)))
            same += chosen == rejected
            if chosen != rejected and max(len(best), len(worst)) <= limit:
                pairs.append(Pair(best, worst, "replayed"))
        if len(pairs) < len(rows):
            say(f"{len(pairs)} of {len(rows)} offline pairs are used: {len(rows) - len(pairs) - same} are "
                f"longer than {limit} tokens, {same} have the same answer twice")
        if rows and not pairs:
            raise InputError(f"{self.settings.preferences}: no pair can be used within {limit} tokens; raise "
                             "--max-tokens, or take a model with a longer context")
        return pairs

    def load(self, directory, training=False):
        """A model to sample from and score with, in the run's dtype; or one to train."""
        runs.free_last_model()
        if training:
            return load_to_train(directory, self.settings, self.device)
        return load_model(directory, self.device, getattr(torch, self.settings.dtype))

    def save(self, model, name):
        """The checkpoint of a stage, which ends it."""
        dtype, state = getattr(torch, self.settings.dtype), {}
        for key, tensor in model.state_dict().items():
            tensor = whole(tensor)  # all processes take part
            if runs.rank() == 0:
                state[key] = tensor.to("cpu", dtype)
        if runs.rank() == 0:
            models.write_checkpoint(self.out / name, self.config, state, self.tokenizer)
        self.end_stage()
        return self.out / name

    def sample(self, what, load, prompts, count, round):
        """`count` samples of each prompt, in order, from the model that load() gives. The prompts are worked
        through in fixed chunks, each for itself, so that a chunk done again gives the same bytes."""
        s = self.settings

        def work(model, chunk, update):
            answers = {}
            for index, number, ids, finish in generate(
                    model, [p.ids for p in chunk], count, stop_ids=self.tokenizer.stop_ids, seed=s.seed,
                    round=round, temperature=s.temperature, top_p=s.top_p, rows=self.rows,
                    max_new_tokens=s.max_new_tokens):
                answers[index, number] = ids, finish
                update(1)
                safe_point()
            return [answers[key] for key in sorted(answers)]

        def work_with_fewer_rows(*args):
            while True:
                answers = within_memory(work, *args)
                if answers is not None:
                    return answers
                if self.rows <= count:
                    raise InputError(f"out of memory with the {count} samples of one prompt; lower --samples "
                                     "or --max-new-tokens")
                self.rows = max(count, self.rows * 3 // 4 // count * count)
                say(f"out of memory in sampling: from here on with {self.rows} sequences in flight")

        drawn = self.in_chunks(what, load, prompts, s.chunk, work_with_fewer_rows, count)
        owners = ((prompt, number) for prompt in prompts for number in range(count))
        return [Sample(prompt, ids, self.tokenizer.decode(ids), number, finish)
                for (prompt, number), (ids, finish) in zip(owners, drawn)]

    def score(self, what, directory, samples):
        """Log-probs of samples under the model in a directory."""
        return self.in_chunks(what, partial(self.load, directory), samples, self.chunk_answers,
                              lambda model, chunk, update: score(model, chunk, self.score_budget, update))

    def score_pairs(self, what, directory, pairs):
        """Give offline pairs their log-probs under the model that training starts from, its reference."""
        samples = [x for p in pairs for x in (p.chosen, p.rejected)]
        for x, logprob in zip(samples, self.score(what, directory, samples)):
            x.logprob = logprob

    def save_culprits(self, stage, model, items):
        """What a step went wrong on, for inspection; returns the file."""
        path = self.out / f"{stage}-not-finite.jsonl"
        samples = [x for item in items
                   for x in ((item.chosen, item.rejected) if isinstance(item, Pair) else (item,))]
        write_rows(path, (
            {"prompt": x.prompt.content, "text": x.text, "tokens": x.tokens, "reference_logprob": x.logprob,
             "logprob": logprob} for x, logprob in zip(samples, score(model, samples, self.score_budget))))
        return path


def tiny_model():
    """Shape and tokenizer of the tiny world's model, 0.2 million parameters."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny.write_tokenizer(Path(scratch))
        tokenizer = models.read_tokenizer(scratch)
    config = models.Config(vocab_size=tokenizer.vocab_size, context=128, layers=3, width=64, heads=4,
                           kv_heads=2, head_size=16, hidden=176, tied=True)
    return config, tokenizer


# ----------------------------------------------------------------------------------------------------------
# The stages before the first round


def first_models(run):
    """Directories of (policy, reference) for the first round: those given, or the base after SFT, DPO."""
    s, policy = run.settings, run.base
    if run.reference:
        return policy, run.reference
    if s.sft_steps:
        policy = run.out / "sft"
        if not policy.exists():
            run.save(supervised(run), "sft")
    if not s.dpo_steps:
        return policy, None
    if not (run.out / "dpo").exists():
        run.score_pairs("dpo log-probs of the pairs", policy, run.offline)
        keep = None
        if s.labeller != "implicit":  # there is no implicit reward before there is DPO
            keep = epoch_filter(run, 0, policy, None, run.offline)
        model = train_pairs(run, "dpo", run.offline, policy, lr=s.dpo_lr, steps=s.dpo_steps, keep=keep)
        run.save(model, "dpo")
    return run.out / "dpo", policy


def supervised(run):
    """Supervised fine-tuning on the answers of the tiny world's writer, or the chosen ones of the pairs."""
    s, samples = run.settings, [pair.chosen for pair in run.offline]
    if run.is_tiny and not s.preferences:
        rows = tiny.sft_examples(s.seed)
        prompts = {text: run.prompt(text) for text in {row["prompt"] for row in rows}}
        samples = [Sample(prompts[r["prompt"]], run.tokenizer.answer(r["chosen"]), r["chosen"]) for r in rows]
    epochs = math.ceil(s.sft_steps * s.sft_batch / len(samples))
    return train_from(run, "sft", run.base, sft_losses, samples, lr=s.sft_lr, steps=s.sft_steps,
                      epochs=epochs, batch=s.sft_batch, decay=True)


# ----------------------------------------------------------------------------------------------------------
# DICE


def dice_round(run, number, policy, reference):
    """One round: from the directories of pi_t and pi_{t-1} to the directory of pi_{t+1}. Each step loads the
    model that it needs. Without a reference, the samples' rewards must come from another labeller."""
    s, stage = run.settings, f"round-{number}"
    if (run.out / stage / "policy").exists():
        return run.out / stage / "policy"
    samples = run.sample(f"{stage} samples", partial(run.load, policy), run.prompts, s.samples, number)
    score_answers(run, f"{stage} samples", samples, policy, reference)
    reward_answers(run, f"{stage} samples", samples)
    alpha, pairs = shape_and_pair(samples, s, np.random.default_rng([s.seed, number, 1]))
    mixture = ReplayBuffer(run.offline).mix(pairs, s.gamma, np.random.default_rng([s.seed, number]))
    run.score_pairs(f"{stage} replayed", policy, [p for p in mixture if p.source == "replayed"])
    record_round(run, stage, alpha, samples, mixture, agreement(run, stage, policy, reference))
    keep = epoch_filter(run, number, policy, reference, mixture)
    model = train_pairs(run, stage, mixture, policy, lr=s.lr, steps=s.steps, keep=keep)
    return run.save(model, f"{stage}/policy")


def score_answers(run, what, samples, policy, reference):
    """Give samples their log-probs under the models in two directories."""
    for x, logprob in zip(samples, run.score(f"{what} policy log-probs", policy, samples)):
        x.logprob = logprob
    if reference:
        for x, logprob in zip(samples, run.score(f"{what} reference log-probs", reference, samples)):
            x.previous = logprob


def agreement(run, stage, policy, reference):
    """Share of the held-out offline pairs that the labeller orders as their data does; None without any."""
    if not run.held_out:
        return None
    samples = [x for p in run.held_out for x in (p.chosen, p.rejected)]
    score_and_reward(run, f"{stage} held-out pairs", samples, policy, reference)
    return sum(p.chosen.reward > p.rejected.reward for p in run.held_out) / len(run.held_out)


def score_and_reward(run, what, samples, policy, reference):
    """Give samples the labeller's rewards; policy and reference are directories."""
    if run.settings.labeller == "implicit":
        score_answers(run, what, samples, policy, reference)
    reward_answers(run, what, samples)


def reward_answers(run, what, samples):
    """Give samples the labeller's rewards; for the implicit one, DICE's, they must have their log-probs."""
    if run.labeller:
        def work(model, chunk, update):
            return run.labeller.score(model, chunk, run.score_budget, update)

        load = partial(run.load, run.labeller.directory)
        rewards = run.in_chunks(f"{what} rewards", load, samples, run.chunk_answers, work)
        for x, reward in zip(samples, rewards):
            x.reward = reward
        return
    for x in samples:
        if run.settings.labeller == "gold":
            x.reward = tiny.judge(x.prompt.content, x.text)
            continue
        x.reward = implicit_reward(x.logprob, x.previous)
        if not math.isfinite(x.reward):
            raise InputError(f"reward {x.reward} (log-probs {x.logprob} and {x.previous}) for an answer to "
                             f"{str(x.prompt.content)[:60]!r}; check the two models, or try --dtype float32")


class RewardModel:
    """A Hugging Face sequence-classification model with one output, iLR-DPO's labeller: a Llama body whose
    head reads the hidden state of a conversation's last token."""

    def __init__(self, directory):
        self.directory = directory
        self.config, self.tokenizer = models.read_config(directory), models.read_tokenizer(directory)
        if self.config.labels != 1:
            raise InputError(f"--labeller {directory}: not a reward model; its config.json must name an "
                             "architecture ...ForSequenceClassification, and one label")
        if self.config.vocab_size < self.tokenizer.vocab_size:
            raise InputError(f"--labeller {directory}: has fewer embeddings than its tokenizer has ids")
        models.check_weights(directory, self.config)

    def score(self, net, samples, budget, update=lambda count: None):
        """The reward of each sample by net, what load_model(self.directory, ...) gives; nan, so that it is
        not used, where the text is too long for it."""
        texts = [self.tokenizer.prompt(x.prompt.content, (x.prompt.steps or "") + x.text) for x in samples]
        fits = [i for i, ids in enumerate(texts) if len(ids) <= self.config.context]
        if len(fits) < len(texts):
            say(f"{len(texts) - len(fits)} of {len(texts)} answers are longer than the labeller's context of "
                f"{self.config.context} tokens and are not used")

        def work(group):
            rows = [texts[fits[i]] for i in group]
            # As transformers: the last token unlike the padding, even where the end token serves as such.
            last = [max((t for t, token in enumerate(ids) if token != self.config.pad), default=0)
                    for ids in rows]
            hidden = net(pad(rows, net.device)[0])[torch.arange(len(rows)), last]  # (B, C)
            return net.logits(hidden)[:, 0].tolist()

        scores = [math.nan] * len(texts)
        sizes = [len(texts[i]) for i in fits]
        for i, reward in zip(fits, in_passes([samples[i] for i in fits], sizes, work, budget, update)):
            scores[i] = reward
        return scores


def epoch_filter(run, number, policy, reference, pairs):
    """What train() is to call before each epoch: fdpo of these pairs; None without --filter."""
    if run.settings.filter == "none":
        return None
    unknown = [p.chosen for p in pairs if math.isnan(p.chosen.reward)]
    score_and_reward(run, f"round-{number} fDPO chosen", unknown, policy, reference)
    return partial(fdpo, run, number, policy, reference, pairs)


def fdpo(run, number, policy, reference, pairs, model, epoch, kept):
    """Filtered DPO: which of the pairs `kept` the labeller still finds better than what the model says now.

    The labeller's implicit reward is the round's, of pi_t over pi_{t-1}, its penalty for length left out.
    """
    prompts = {pairs[i].prompt.key: pairs[i].prompt for i in kept}
    draw = FILTER + number * 2**16 + epoch
    what = f"round-{number} fDPO epoch {epoch + 1}"
    now = snapshot(model, getattr(torch, run.settings.dtype))
    own = run.sample(what, lambda: now, list(prompts.values()), 1, draw)
    score_and_reward(run, what, own, policy, reference)
    said = {x.prompt.key: x.reward for x in own}
    left = [i for i in kept if fdpo_keeps(said[pairs[i].prompt.key], pairs[i].chosen.reward)]
    say(f"fDPO, epoch {epoch + 1}: {len(left)} of {len(kept)} pairs are kept")
    if not left and not epoch:
        raise InputError("--filter fdpo: leaves no pair to train on; by the labeller the policy's own "
                         "answers are as good as every chosen one. Do without the filter, or stop here")
    return left


def shape_and_pair(samples, settings, rng=None):
    """alpha, and the best against the worst answer of each prompt that keeps enough answers; sets x.shaped.

    Answers cut by the limit, or of extreme length, are not valid. Of answers with the same text one is
    kept, so no text meets itself. A prompt whose answers all have the same shaped reward gives no pair.
    """
    s, kept = settings, []
    for _, group in groupby(samples, key=lambda x: id(x.prompt)):
        valid = [x for x in group if x.finish == "stop" and s.min_chars < len(x.text) < s.max_chars
                 and math.isfinite(x.reward)]
        different = list({x.text: x for x in reversed(valid)}.values())  # the first of each text
        if len(valid) >= s.min_valid * s.samples and len(different) >= 2:
            kept.append(different)
    if not kept:
        cut = sum(x.finish == "length" for x in samples)
        unknown = sum(math.isnan(x.reward) for x in samples)
        raise InputError(f"no prompt has {s.min_valid * s.samples:g} valid answers and two different ones "
                         f"({cut} of {len(samples)} were cut by the length limit, {unknown} got no reward "
                         "from the labeller); raise --max-new-tokens or --temperature, or lower --min-valid")
    reward, length = np.zeros((2, len(kept), s.samples))
    valid = np.zeros((len(kept), s.samples), dtype=bool)
    for i, group in enumerate(kept):
        reward[i, :len(group)] = [x.reward for x in group]
        length[i, :len(group)] = [answer_length(x, s) for x in group]
        valid[i, :len(group)] = True
    lots = rng.random(reward.shape) if s.rejected == "random" else None
    alpha, multiple = read_alpha(s.alpha)
    if multiple:
        alpha *= search_alpha(reward, length, valid, lots)
    for x in samples:
        x.shaped = x.reward - alpha * answer_length(x, s)
    pairs = [Pair(group[best], group[worst], "generated")
             for group, best, worst in zip(kept, *best_and_worst(reward, length, valid, alpha, lots))]
    pairs = [pair for pair in pairs if pair.chosen.shaped > pair.rejected.shaped]
    if not pairs and s.gamma < 1:
        raise InputError(f"all answers to a prompt have the same reward, for each of {len(kept)} prompts: "
                         "there is nothing to prefer; check the labeller and the two models")
    return alpha, pairs


def answer_length(x, settings):
    return len(x.text) if settings.length == "chars" else len(x.tokens)


def record_round(run, stage, alpha, samples, pairs, agrees):
    """samples.jsonl, pairs.jsonl (TRL's form of a preference set) and the round's line of metrics.jsonl.
    agrees: agreement(...), or None."""
    write_rows(run.out / stage / "samples.jsonl", (
        {"prompt": x.prompt.content, "sample": x.number, "tokens": x.tokens, "text": x.text,
         "finish": x.finish, "policy_logprob": x.logprob, "reference_logprob": x.previous,
         "reward": x.reward, "shaped_reward": x.shaped} for x in samples))
    write_rows(run.out / stage / "pairs.jsonl", (
        {"prompt": p.prompt.content, "chosen": p.chosen.text, "rejected": p.rejected.text, "source": p.source}
        | ({} if p.prompt.steps is None else {"initial_reason_steps": p.prompt.steps}) for p in pairs))
    new = [p for p in pairs if p.source == "generated"]
    gaps = [len(p.chosen.text) - len(p.rejected.text) for p in new]
    row = {"stage": stage, "alpha": alpha,
           "generated_pairs": len(new), "replayed_pairs": len(pairs) - len(new),
           "answer_chars": sum(len(x.text) for x in samples) / len(samples),
           "truncated": sum(x.finish == "length" for x in samples) / len(samples),
           "identical": 1 - len({(x.prompt.key, x.text) for x in samples}) / len(samples),
           "kl": sum(x.logprob - x.previous for x in samples) / len(samples),  # pi_t to pi_{t-1}
           "offline_agreement": agrees,
           "pair_length_gap": sum(gaps) / max(1, len(gaps))}
    if run.is_tiny and not run.settings.prompts:  # for the report alone: how many pairs are right
        gold = [[tiny.judge(p.prompt.content, x.text) for x in (p.chosen, p.rejected)] for p in new]
        row["pairs_right"] = sum(chosen > rejected for chosen, rejected in gold) / max(1, len(new))
    run.log(row)
    unit = {"chars": "character", "tokens": "token"}[run.settings.length]
    say(f"{stage}: alpha {alpha:.4g} nats per {unit}; {len(new)} generated pairs, chosen "
        f"{row['pair_length_gap']:+.1f} characters longer; {len(pairs) - len(new)} replayed pairs")
    kl = "not known" if math.isnan(row["kl"]) else f"{row['kl']:.2f} nats"
    agreed = "not known" if agrees is None else f"{agrees:.0%}"
    say(f"{stage}: KL to pi_{{t-1}} {kl}; answers of {row['answer_chars']:.0f} characters, "
        f"{row['truncated']:.1%} cut, {row['identical']:.1%} the same as another; agreement with the "
        f"held-out offline pairs {agreed}")
    for warning in report.warnings(row, next(old for old in run.metrics if "alpha" in old)):
        say(f"{stage}: WARNING: {warning}")


# ----------------------------------------------------------------------------------------------------------
# Evaluation in the tiny world; nothing of it goes back into training


def evaluate(run, stage, policy, reference=None):
    """evaluation/STAGE.jsonl: four answers to each held-out prompt, with gold score and implicit reward."""
    path = run.out / "evaluation" / f"{stage}.jsonl"
    if path.exists():
        return
    prompts = [run.prompt(text) for text in tiny.held_out_prompts(run.settings.seed)]
    samples = run.sample(f"{stage} held-out answers", partial(run.load, policy), prompts, 4, EVALUATION)
    if reference:
        score_answers(run, f"{stage} held-out answers", samples, policy, reference)
    write_rows(path, (
        {"prompt": x.prompt.content, "sample": x.number, "text": x.text,
         "reward": implicit_reward(x.logprob, x.previous) if reference else None,
         "gold": tiny.judge(x.prompt.content, x.text)} for x in samples))
    run.end_stage()


# ----------------------------------------------------------------------------------------------------------
# The command


def measure(run):
    """For --dry-run: parameters of the policy, seconds a sampled token takes, and one read to be scored."""
    s = run.settings
    if run.made:
        model = run.random_model(s.seed).to(run.device, getattr(torch, s.dtype))
    else:
        model = run.load(run.base)
    prompts = run.prompts[:max(1, s.rows // s.samples)]

    for _ in range(2):  # the first time is not like the others
        started = time.perf_counter()
        drawn = list(generate(model, [p.ids for p in prompts], s.samples, stop_ids=[], seed=s.seed,
                              rows=s.rows, max_new_tokens=min(32, s.max_new_tokens)))
        sampling = (time.perf_counter() - started) / sum(len(ids) for _, _, ids, _ in drawn)
        samples, started = [Sample(prompts[i], ids, "") for i, _, ids, _ in drawn[:64]], time.perf_counter()
        score(model, samples, run.score_budget)
        read = sum(len(x.tokens) for x in samples) + sum(map(len, {tuple(x.prompt.ids) for x in samples}))
        scoring = (time.perf_counter() - started) / read
    return sum(p.numel() for p in model.parameters()), sampling, scoring


def run_rounds(run, policy, reference):
    """--rounds of DICE, from the directories of the first policy and its reference (or None)."""
    first = reference
    for number in range(1, run.settings.rounds + 1):
        rewarding = first if run.settings.reward_reference == "first" else reference
        policy, reference = dice_round(run, number, policy, rewarding), policy
        if run.is_tiny:
            evaluate(run, f"round-{number}", policy, reference)


def main(argv=None):
    """Run everything. Returns the exit code: 2 for bad input, which costs one line on stderr."""
    run = None
    try:
        settings, dry_run = parse_settings(argv)
        run = Run(settings)
        if dry_run:
            if runs.rank() == 0:
                print(runs.plan(run, *measure(run)))
            return 0
        with runs.held_signals():
            run.open()
            policy, reference = first_models(run)
            if run.is_tiny:
                evaluate(run, "sft", reference or policy)
                if reference:
                    evaluate(run, "dpo", policy, reference)
            run_rounds(run, policy, reference)
            run.end_stage()
            if runs.rank() == 0:
                print(report.write(run.out))
            runs.leave_processes()
    except InputError as error:
        print(f"dice.py: {error}", file=sys.stderr)
        return 2
    except runs.Interrupted:
        print(f"dice.py: stopped. What is done is in {run.out}; the same command goes on from there",
              file=sys.stderr)
        return 130
    except (OSError, SafetensorError) as error:
        if "No space left" not in str(error):
            raise
        print(f"dice.py: {run.out}: the disk is full. What is done is safe; free some space, and the same "
              "command goes on from there", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not runs.lost_contact(error):
            raise
        print("dice.py: another process of this run has ended, so this one does too. What is done is in "
              f"{run.out}; the same command goes on from there", file=sys.stderr)
        return 1
    finally:
        if run:
            run.unlock()
    return 0


if __name__ == "__main__":
    sys.exit(main())
