"""Which model, and where it lives: presets, config.json, weights, placement on devices. dice.py runs it.

A checkpoint is a Hugging Face directory: config.json, safetensors, tokenizer files. Two families are read and
written: GPT-2 and Llama (2, 3, 3.1, 3.2, Mistral, Qwen2, Qwen3). Both become ONE `Config` and ONE set of
names, the state_dict of `dice.Transformer`. Features that this network does not compute are refused by name;
pickled and quantised weights are not read."""
import hashlib
import math
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from data import tiny
from data.files import InputError, read_json, require, whole, write_json
from data.hub import download_repository
from data.jsonl import PAPER
from data.processes import backend_for, world
from data.tokenizer import TOKENIZER_FILES, StandIn, Tokenizer, read_tokenizer

# ---------------------------------------------------------------------------------------- shape of a network
@dataclass(frozen=True)
class Config:
    """The shape of a network. The two families differ by these fields, not by classes."""
    vocab_size: int
    context: int  # the most tokens of prompt and answer together
    layers: int
    width: int
    heads: int
    kv_heads: int  # fewer than heads: grouped-query attention
    head_size: int
    hidden: int  # inner size of the MLP
    position: str = "rotary"  # or "learned"
    norm: str = "rms"  # or "layer", which always has a bias
    mlp: str = "swiglu"  # or "gelu" (tanh approximation)
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head of q and k, before the rotation
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False  # the output head is the embedding
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = field(default=None, hash=False)  # the four numbers of LLAMA3_SCALING
    num_labels: int | None = None  # a reward model: outputs of its head, instead of the vocabulary
    pad: int | None = None  # a reward model: the padding id, which its head skips
    raw: dict = field(default_factory=dict, compare=False, repr=False)  # config.json as it was read

LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

def parameter_shapes(config: Config) -> dict[str, tuple]:
    """Name -> shape of every parameter, in the order of `dice.Transformer`'s state_dict."""
    C, V, hidden = config.width, config.vocab_size, config.hidden
    q, kv = config.heads * config.head_size, config.kv_heads * config.head_size
    up = 2 * hidden if config.mlp == "swiglu" else hidden
    norm_bias = config.norm == "layer"
    shapes = {"embed.weight": (V, C)}
    if config.position == "learned":
        shapes["position.weight"] = (config.context, C)

    def add(name, *shape, bias):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    for i in range(config.layers):
        add(f"layers.{i}.norm1", C, bias=norm_bias)
        add(f"layers.{i}.qkv", q + 2 * kv, C, bias=config.qkv_bias)  # rows of q, then k, then v
        if config.qk_norm:
            add(f"layers.{i}.q_norm", config.head_size, bias=False)
            add(f"layers.{i}.k_norm", config.head_size, bias=False)
        add(f"layers.{i}.out", C, q, bias=config.out_bias)
        add(f"layers.{i}.norm2", C, bias=norm_bias)
        add(f"layers.{i}.up", up, C, bias=config.mlp_bias)           # rows of gate, then up
        add(f"layers.{i}.down", C, hidden, bias=config.mlp_bias)
    add("norm", C, bias=norm_bias)
    if config.num_labels or not config.tied:
        shapes["head.weight"] = (config.num_labels or V, C)
    return shapes

def count_parameters(config: Config) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())

@lru_cache  # a step asks for them before its graph is captured: they are no part of the graph
def rotary_frequencies(config, device):
    """Angle per position of each channel, (D,) float32. Llama-3.1 stretches the slow ones."""
    pair = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=device)
    freq = config.rope_theta ** (-pair / config.head_size)
    if s := config.rope_scaling:
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # in pre-training's context
        slow, fast = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - slow) / (fast - slow)).clamp(0, 1)  # 1: fast, as it was; 0: slow, stretched
        freq = freq * keep + freq / s["factor"] * (1 - keep)
    return torch.cat((-freq, freq))  # see dice.rotate

def random_weights(config: Config, seed: int):
    """Yields (name, tensor): random weights as GPT-2 draws them. They are normal(0, 0.02), smaller where a
    layer adds to the residual stream; biases are 0, and weights of a norm are 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in parameter_shapes(config).items():
        tensor = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        if len(shape) == 2:
            residual = name.endswith(("out.weight", "down.weight"))
            tensor.normal_(std=0.02 / math.sqrt(2 * config.layers) if residual else 0.02, generator=generator)
        yield name, tensor

# ---------------------------------------------------------------------------------------- presets
@dataclass(frozen=True)
class Preset:
    """What `--model NAME` or, of a reward model, `--reward NAME` stands for."""
    repository: str  # on the Hugging Face hub; "": dice.py makes the model from nothing
    shape: Config | None  # for --weights dummy, which reads no config.json
    settings: dict  # where they differ from dice.Settings, the paper's for Llama-3

# Models that the paper starts from, on cards of 80 GB and more.
LARGE = PAPER | dict(chunk=256, score_tokens=32768, train_tokens=8192)
LLAMA3 = LARGE | dict(chat="llama3")
ZEPHYR = LARGE | dict(chat="zephyr", temperature=0.7, top_p=0.9)
# Base models: SFT on the chosen answers of the paper's 10k pairs (3 epochs), DPO on the pairs (1 epoch), DICE
# on their prompts. Lengths and rows are for cards of 24 GB (gpt2-xl: 48). Usual values, not tuned here.
# The tokens of a pass are estimates: training keeps of each token, in bfloat16, 0.3 MB (gpt2) to 1.7 MB
# (qwen3-0.6b) of what the layers made, beside 16 bytes a parameter (2 to 10 GB) and 2 GB for logits.
# llama3.2-1b has its state in main memory and makes its layers again. Where memory runs out, a run goes on
# with fewer.
BASE = dict(preferences=PAPER["preferences"], max_new_tokens=1024, max_tokens=2048, rows=64, sft_steps=900,
            dpo_lr=1e-6, lr=1e-6, score_tokens=16384, train_tokens=4096)
# The smallest models take larger steps.
SMALL_BASE = BASE | dict(sft_lr=1e-4, dpo_lr=5e-6, lr=5e-6, train_tokens=8192)
# Instruct models so small that a laptop or a card of 8 GB trains them: DPO on the paper's pairs, then DICE.
# On a CPU a round of a few hundred prompts takes hours (--preferences FILE), the paper's 10k take days. The
# system message is that of their template. The settings are not tuned.
LAPTOP = PAPER | dict(
    chat="chatml", system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    temperature=0.7, top_p=0.9, samples=4, max_prompts=64, max_new_tokens=448, max_tokens=384, held_out=64,
    dpo_lr=1e-5, dpo_steps=24, lr=1e-5, steps=16, warmup=5, batch=8, rows=64, chunk=32, train_tokens=1024,
    recompute="yes", save_steps=8)

LLAMA3_8B = Config(vocab_size=128256, context=8192, layers=32, width=4096, heads=32, kv_heads=8,
                   head_size=128, hidden=14336, rope_theta=500000.0)
LLAMA31_SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                       original_max_position_embeddings=8192)
SKYWORK_8B = replace(LLAMA3_8B, context=131072, num_labels=1, rope_scaling=LLAMA31_SCALING)
LLAMA32_1B = replace(LLAMA3_8B, context=131072, layers=16, width=2048, head_size=64, hidden=8192, tied=True,
                     rope_scaling=LLAMA31_SCALING | dict(factor=32.0))
MISTRAL_7B = replace(LLAMA3_8B, vocab_size=32000, context=4096, rope_theta=10000.0)
QWEN25_05B = Config(vocab_size=151936, context=32768, layers=24, width=896, heads=14, kv_heads=2,
                    head_size=64, hidden=4864, qkv_bias=True, tied=True, eps=1e-6, rope_theta=1000000.0)
QWEN3_06B = Config(vocab_size=151936, context=32768, layers=28, width=1024, heads=16, kv_heads=8,
                   head_size=128, hidden=3072, qk_norm=True, tied=True, eps=1e-6, rope_theta=1000000.0)
SMOLLM2_135M = Config(vocab_size=49152, context=8192, layers=30, width=576, heads=9, kv_heads=3, head_size=64,
                      hidden=1536, tied=True, rope_theta=100000.0)
SMOLLM2_360M = replace(SMOLLM2_135M, layers=32, width=960, heads=15, kv_heads=5, hidden=2560)

def gpt2_shape(layers, width):
    return Config(vocab_size=50257, context=1024, layers=layers, width=width, heads=width // 64,
                  kv_heads=width // 64, head_size=64, hidden=4 * width, position="learned", norm="layer",
                  mlp="gelu", qkv_bias=True, out_bias=True, mlp_bias=True, tied=True)

SHORT = dict(chat="plain", max_new_tokens=512, max_tokens=1024)  # GPT-2: no special tokens, 1024 positions
PRESETS = {
    "tiny": Preset("", None, dict(  # so small that a GPU is no faster
        device="cpu", temperature=1.0, top_p=0.9, max_new_tokens=96, rows=512, chunk=256, batch=16, steps=32,
        epochs=2, lr=6e-5, warmup=0, sft_steps=1400, sft_lr=6e-3, dpo_steps=128, dpo_lr=5e-5,
        train_tokens=8192)),
    "llama3-8b": Preset("princeton-nlp/Llama-3-Base-8B-SFT-DPO", LLAMA3_8B,
                        LLAMA3 | dict(reference="llama3-8b-sft")),
    "llama3-8b-sft": Preset("princeton-nlp/Llama-3-Base-8B-SFT", LLAMA3_8B, LLAMA3),
    "zephyr-7b": Preset("HuggingFaceH4/zephyr-7b-beta", MISTRAL_7B, ZEPHYR | dict(reference="zephyr-7b-sft")),
    "zephyr-7b-sft": Preset("HuggingFaceH4/mistral-7b-sft-beta", MISTRAL_7B, ZEPHYR),
    "gpt2": Preset("openai-community/gpt2", gpt2_shape(12, 768), SMALL_BASE | SHORT),
    "gpt2-medium": Preset("openai-community/gpt2-medium", gpt2_shape(24, 1024), BASE | SHORT),
    "gpt2-large": Preset("openai-community/gpt2-large", gpt2_shape(36, 1280),
                         BASE | SHORT | dict(rows=32, train_tokens=2048)),
    "gpt2-xl": Preset("openai-community/gpt2-xl", gpt2_shape(48, 1600), BASE | SHORT | dict(rows=32)),
    "llama3.2-1b": Preset("meta-llama/Llama-3.2-1B", LLAMA32_1B,
                          BASE | dict(chat="llama3", train_tokens=8192)),
    "qwen2.5-0.5b": Preset("Qwen/Qwen2.5-0.5B", QWEN25_05B, BASE | dict(chat="chatml")),
    "qwen3-0.6b": Preset("Qwen/Qwen3-0.6B-Base", QWEN3_06B, BASE | dict(chat="chatml")),
    "smollm2-135m": Preset("HuggingFaceTB/SmolLM2-135M", SMOLLM2_135M, SMALL_BASE | dict(chat="chatml")),
    "smollm2-135m-instruct": Preset("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2_135M, LAPTOP),
    "smollm2-360m-instruct": Preset("HuggingFaceTB/SmolLM2-360M-Instruct", SMOLLM2_360M,
                                    LAPTOP | dict(rows=16)),
    # A reward model: for --reward, and data/judge.py
    "skywork-8b": Preset("Skywork/Skywork-Reward-Llama-3.1-8B-v0.2", SKYWORK_8B, dict(chat="llama3")),
}

# ORGANISATION/NAME, as the hub allows it.
REPOSITORY = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)

def place(repository: str) -> Path:
    """The directory of a repository of the hub, which may not be there yet."""
    return Path(os.path.expanduser(os.environ.get("DICE_WEIGHTS") or "weights"), repository)

def resolve(name: str) -> Path:
    """What `--model` is given, a preset's name, a directory or ORGANISATION/NAME on the Hugging Face hub ->
    the directory of the model. A directory that exists is taken as it is. What is on the hub is downloaded to
    weights/ORGANISATION/NAME if it is not there. DICE_WEIGHTS may name another directory than ./weights."""
    path = Path(os.path.expanduser(name))
    repository = PRESETS[name].repository if name in PRESETS else name
    require(name != "tiny", "tiny: is made by dice.py from nothing; give a policy of its runs, like "
            "out/tiny/round-2/policy")
    if name in PRESETS or not path.exists() and REPOSITORY.fullmatch(name):
        path = place(repository)
        if not path.exists():
            download_repository(repository, path)
    require((path / "config.json").is_file(), f"{path}: not a model directory (no config.json in it); give a "
            "directory in Hugging Face format, ORGANISATION/NAME of a model on the Hugging Face hub, or one "
            f"of the names {', '.join(PRESETS)}")
    return path

def stand_in(name: str) -> tuple[Config, Tokenizer]:
    """For --weights dummy: the shape of a preset's model, and a tokenizer that needs no file. Random weights
    give any id. One id in 400 ends an answer, so answers are about as long as a real model's."""
    known = [name for name, preset in PRESETS.items() if preset.shape and not preset.shape.num_labels]
    require(name in known, f"--weights dummy: stands in for {', '.join(known)}, not for {name}")
    config = PRESETS[name].shape
    ends = range(config.vocab_size - config.vocab_size // 400, config.vocab_size)
    id_to_bytes = {i: f"{i:04x}".encode() for i in range(config.vocab_size)}
    return config, Tokenizer(StandIn(ids=ends[0]), id_to_bytes, special_tokens={}, bos=None, stop_ids=ends,
                             chat="plain", files={})

def tiny_model() -> tuple[Config, Tokenizer]:
    """Shape and tokenizer of the tiny world's model, 0.2 million parameters."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny.write_tokenizer(Path(scratch))
        tokenizer = read_tokenizer(scratch)
    config = Config(vocab_size=tokenizer.vocab_size, context=128, layers=3, width=64, heads=4, kv_heads=2,
                    head_size=16, hidden=176, tied=True)
    return config, tokenizer

def random_model(run, seed):
    """Random weights of the tiny world's model, or of a dummy in the shape of a preset."""
    for name, tensor in random_weights(run.config, seed):
        # A dummy must draw all tokens about equally often. A tied head alone would repeat the last token.
        yield name, tensor * 0.05 if name == "norm.weight" and not run.is_tiny else tensor

def find_models(settings, out):
    """(policy_dir, prev_dir or None, config, tokenizer) of a run in the directory `out`: the models that
    --model and --reference name, downloaded if they are missing, and checked. For the tiny world and
    --weights dummy the run makes them, in out/base and out/reference."""
    s = settings
    if s.model == "tiny" or s.weights == "dummy":
        config, tokenizer = tiny_model() if s.model == "tiny" else stand_in(s.model)
        tokenizer.system = s.system
        return out / "base", out / "reference" if s.reference else None, config, tokenizer
    policy_dir = resolve(s.model)
    config, tokenizer = read_config(policy_dir), read_tokenizer(policy_dir, s.chat)
    tokenizer.system = s.system
    prev_dir = resolve(s.reference) if s.reference else None
    require(not prev_dir or s.reward != "implicit" or not prev_dir.samefile(policy_dir),
            f"--reference {s.reference}: is --model itself, so all rewards would be 0; give the model that "
            "--model was DPO-trained from")
    for directory in filter(None, [policy_dir, prev_dir]):
        other = read_config(directory)
        require(not other.num_labels, f"{directory}: is a reward model; give it to --reward of dice.py")
        require(other.vocab_size >= tokenizer.vocab_size and other.context >= config.context,
                f"{directory}: has fewer embeddings than the tokenizer has ids, or a shorter context than "
                "the policy; policy and reference must belong together")
        check_weights(directory, other)
    return policy_dir, prev_dir, config, tokenizer

def find_reward_model(reward):
    """(directory, tokenizer) of a reward model, a sequence classifier with one output; (None, None) of
    implicit and gold. InputError if it is something else, or if its weights do not fit."""
    if reward in ("", "implicit", "gold"):
        return None, None
    directory = resolve(reward)
    chat = PRESETS[reward].settings.get("chat", "auto") if reward in PRESETS else "auto"
    config, tokenizer = read_config(directory), read_tokenizer(directory, chat)
    require(config.num_labels == 1, f"{directory}: not a reward model; its config.json must name an "
            "architecture ...ForSequenceClassification and one label")
    require(config.vocab_size >= tokenizer.vocab_size,
            f"{directory}: has fewer embeddings than its tokenizer has ids")
    check_weights(directory, config)
    return directory, tokenizer

# ---------------------------------------------------------------------------------------- config.json
MOST_PARAMETERS = 1e13

# Fields that change what a network computes, and the values that we support. Absent or null is fine too.
GPT2_ONLY = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,),
             "add_cross_attention": (False,), "quantization_config": ()}
LLAMA_ONLY = {"hidden_act": ("silu",), "partial_rotary_factor": (1,), "quantization_config": ()}
ONLY = {"gpt2": GPT2_ONLY} | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA_ONLY)

def read_config(directory) -> Config:
    """config.json of one of the model types in ONLY. Raises InputError naming file and field."""
    path = Path(directory) / "config.json"
    require(path.is_file(), f"{path}: not found; a model directory holds config.json and *.safetensors")
    return parse_config(read_json(path), path)

def checked(fields, key, path, default, good, what):
    """fields[key], or the default where it is absent or null. InputError if good(value) is false."""
    value = default if fields.get(key) is None else fields[key]
    require(good(value), f"{path}: {key} must be {what}, not {str(value)[:60]!r}")
    return value

def positive(fields, key, path, default=None):
    return checked(fields, key, path, default, lambda v: type(v) in (int, float) and 0 < v < 1e12,
                   "a positive number")

def parse_config(raw: dict, path) -> Config:
    """The fields of a config.json -> Config. `path` is only for messages."""
    kind = raw.get("model_type")
    require(isinstance(kind, str) and kind in ONLY,
            f"{path}: model_type {str(kind)[:60]!r} is not supported; supported: {', '.join(ONLY)}")
    for key, values in ONLY[kind].items():
        require(raw.get(key) is None or raw[key] in values,
                f"{path}: {key} {str(raw.get(key))[:60]!r} is not supported by this code")

    def size(key, default=None, most=2 ** 24):
        return checked(raw, key, path, default, lambda v: type(v) is int and 1 <= v <= most,
                       f"a whole number from 1 to {most}")

    def flag(key, default=False):
        return checked(raw, key, path, default, lambda v: type(v) is bool, "true or false")

    gpt2 = kind == "gpt2"
    width = size("n_embd" if gpt2 else "hidden_size")
    heads = size("n_head" if gpt2 else "num_attention_heads")
    require(width % heads == 0 or (not gpt2 and raw.get("head_dim")),
            f"{path}: the width {width} is not a multiple of the number of heads {heads}")
    if gpt2:
        config = Config(
            vocab_size=size("vocab_size"), context=size("n_positions"), layers=size("n_layer", most=4096),
            width=width, heads=heads, kv_heads=heads, head_size=width // heads,
            hidden=size("n_inner", 4 * width), position="learned", norm="layer", mlp="gelu",
            qkv_bias=True, out_bias=True, mlp_bias=True, tied=flag("tie_word_embeddings", True),
            eps=positive(raw, "layer_norm_epsilon", path, 1e-5), raw=raw)
    else:
        kv_heads = size("num_key_value_heads", heads if kind == "llama" else None)
        require(heads % kv_heads == 0, f"{path}: num_attention_heads {heads} is not a multiple of "
                                       f"num_key_value_heads {kv_heads}")
        head_size = size("head_dim", None if kind == "qwen3" else width // heads)
        require(head_size % 2 == 0, f"{path}: the head size (head_dim) {head_size} must be even")
        context = size("max_position_embeddings")
        window = size("sliding_window", context)
        if kind == "mistral" or (kind in ("qwen2", "qwen3") and flag("use_sliding_window")):
            context = min(context, window)  # within its first window a token sees everything, as here
        bias = kind in ("llama", "qwen3") and flag("attention_bias")
        rope_theta, rope_scaling = rotary(raw, path)
        config = Config(
            vocab_size=size("vocab_size"), context=context, layers=size("num_hidden_layers", most=4096),
            width=width, heads=heads, kv_heads=kv_heads, head_size=head_size,
            hidden=size("intermediate_size"), qkv_bias=bias or kind == "qwen2", qk_norm=kind == "qwen3",
            out_bias=bias, mlp_bias=kind == "llama" and flag("mlp_bias"), tied=flag("tie_word_embeddings"),
            eps=positive(raw, "rms_norm_eps", path, 1e-6), rope_theta=rope_theta, rope_scaling=rope_scaling,
            num_labels=count_labels(raw, path), raw=raw,
            pad=checked(raw, "pad_token_id", path, None, lambda v: type(v) in (int, type(None)), "an id"))
    per_layer = width * 2 * (heads * config.head_size + config.hidden)
    require(config.layers * per_layer + config.vocab_size * width < MOST_PARAMETERS,
            f"{path}: its sizes describe a network of more than {MOST_PARAMETERS:.0e} parameters")
    return config

def count_labels(raw, path):
    """The number of outputs of a sequence classifier (a reward model has one). None for a language model."""
    names = raw.get("architectures") or [""]
    if not (isinstance(names, list) and str(names[-1]).endswith("ForSequenceClassification")):
        return None
    two = {"0": "LABEL_0", "1": "LABEL_1"}  # transformers' default
    return len(checked(raw, "id2label", path, two, lambda v: type(v) is dict and v, "an object of labels"))

def rotary(raw, path):
    """(rope_theta, rope_scaling), from the fields of those names or transformers 5's `rope_parameters`."""
    found = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        found |= checked(raw, key, path, {}, lambda v: isinstance(v, dict), "an object or null")
    kind = found.get("rope_type", found.get("type", "default"))
    per_layer = [key for key in found if isinstance(found[key], dict)]
    require(kind in ("default", "llama3") and not per_layer and found.get("partial_rotary_factor", 1) == 1,
            f"{path}: rotary scaling {str(per_layer or kind)[:60]!r} is not supported; supported: default "
            "and llama3, the same in every layer, over the whole head")
    theta = float(positive(found, "rope_theta", path, 10000.0))
    if kind == "default":
        return theta, None
    scaling = {key: positive(found, key, path) for key in LLAMA3_SCALING}
    require(scaling["low_freq_factor"] < scaling["high_freq_factor"],
            f"{path}: rotary scaling needs low_freq_factor < high_freq_factor")
    return theta, scaling

def config_json(config: Config) -> dict:
    """The config.json that was read, if it still holds, or a new one. InputError if no architecture fits."""
    c = config
    if c.raw and parse_config(c.raw, "config.json") == c:
        return dict(c.raw)
    fields = {"vocab_size": c.vocab_size, "tie_word_embeddings": c.tied}
    if c.position == "learned":
        fields |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": c.context,
                   "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads, "n_inner": c.hidden,
                   "activation_function": "gelu_new", "layer_norm_epsilon": c.eps}
    else:
        # Qwen2 has biases of q, k and v alone.
        name = "Qwen3" if c.qk_norm else "Llama" if c.qkv_bias == c.out_bias else "Qwen2"
        fields |= {
            "architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), "hidden_size": c.width,
            "max_position_embeddings": c.context, "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_size,
            "intermediate_size": c.hidden, "hidden_act": "silu", "rms_norm_eps": c.eps,
            "attention_bias": c.out_bias, "mlp_bias": c.mlp_bias, "rope_theta": c.rope_theta,
            "rope_scaling": c.rope_scaling and {"rope_type": "llama3", **c.rope_scaling}}
    read = parse_config(fields, "config.json")
    require(replace(read, num_labels=c.num_labels, pad=c.pad) == c,
            f"no Hugging Face architecture has this shape, so it cannot be saved: {config}")
    return fields

# ---------------------------------------------------------------------------------------- weights
SHARD_BYTES = 5 * 10 ** 9
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Our name of a module -> its name in Hugging Face files. Several names: their rows are stacked in ours.
GPT2 = {"embed": ["wte"], "position": ["wpe"], "norm": ["ln_f"], "norm1": ["ln_1"], "norm2": ["ln_2"],
        "qkv": ["attn.c_attn"], "out": ["attn.c_proj"], "up": ["mlp.c_fc"], "down": ["mlp.c_proj"]}
LLAMA = {"embed": ["embed_tokens"], "norm": ["norm"], "norm1": ["input_layernorm"],
         "norm2": ["post_attention_layernorm"], "out": ["self_attn.o_proj"], "down": ["mlp.down_proj"],
         "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
         "q_norm": ["self_attn.q_norm"], "k_norm": ["self_attn.k_norm"],
         "up": ["mlp.gate_proj", "mlp.up_proj"]}
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|h\.\d+\.attn\.(bias|masked_bias)$")  # not parameters

def stored_parts(config: Config, name: str, rows: int, bare=False) -> tuple[list[tuple[str, int]], bool]:
    """One of our parameters -> ([(name in the file, its rows), ...], whether it is stored transposed).

    Llama files hold q, k, v and gate, up apart; we stack their rows. The linear layers of GPT-2 ("Conv1D")
    are stored as (in, out), the transpose of torch's (out, in). bare: GPT-2 names without "transformer."."""
    *layer, module, kind = name.split(".")  # layers.3.qkv.weight: ["layers", "3"], "qkv", "weight"
    if module == "head":
        return [("score.weight" if config.num_labels else "lm_head.weight", rows)], False
    gpt2 = config.position == "learned"
    prefix = "" if bare else "transformer." if gpt2 else "model."
    if layer:
        prefix += f"{'h' if gpt2 else 'layers'}.{layer[1]}."
    parts = (GPT2 if gpt2 else LLAMA)[module]
    q, kv = config.heads * config.head_size, config.kv_heads * config.head_size
    sizes = {1: [rows], 2: [config.hidden, config.hidden], 3: [q, kv, kv]}[len(parts)]
    transposed = gpt2 and kind == "weight" and module in ("qkv", "out", "up", "down")
    return [(f"{prefix}{part}.{kind}", size) for part, size in zip(parts, sizes)], transposed

@contextmanager
def open_safetensors(path):
    """safe_open, which checks the header. A failure becomes an InputError that names the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: missing, cut short or damaged ({error}); fetch it again, or remove its "
                         "directory if a run has made it") from None

def find_tensors(directory: Path) -> dict[str, tuple[Path, tuple, str]]:
    """Every tensor of a checkpoint, one file or several: name -> (file, shape, type). Reads headers only."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    listed = {}  # tensor -> file, in the index of a sharded checkpoint
    if not single.exists():
        pickled = sorted(path.name for end in ("bin", "pt", "pth") for path in directory.glob(f"*.{end}"))
        hint = f"; {pickled[0]} is a pickle (it can run code): convert to safetensors" if pickled else ""
        require(index.exists(), f"{directory}: has no {single.name} or {index.name}{hint}")
        listed = read_json(index).get("weight_map")
        require(isinstance(listed, dict) and listed, f"{index}: has no weight_map")
        for file in listed.values():
            require(isinstance(file, str) and re.fullmatch(r"[\w-][\w.-]*", file),
                    f"{index}: {str(file)[:80]!r} is not a plain file name")
    tensors = {}
    for file in sorted(set(listed.values())) or [single.name]:
        with open_safetensors(directory / file) as opened:
            for name in opened.keys():
                require(name not in tensors, f"{directory / file}: {name} is in another file too")
                part = opened.get_slice(name)
                tensors[name] = directory / file, tuple(part.get_shape()), part.get_dtype()
    for name, file in listed.items():
        require(name in tensors, f"{directory / file}: lacks {name}, which the index says it holds")
    return tensors

def read_tensor(tensors, name):
    with open_safetensors(tensors[name][0]) as file:
        return file.get_tensor(name)

def check_weights(directory, config: Config):
    """Where a checkpoint keeps each of our parameters: (name -> stored_parts, find_tensors). Reads headers.
    Raises InputError for a damaged file and for missing, surplus, misshapen or untied tensors, by name."""
    directory, shapes = Path(directory), parameter_shapes(config)
    tensors = find_tensors(directory)
    bare = config.position == "learned" and "wte.weight" in tensors
    plan = {name: stored_parts(config, name, shape[0], bare) for name, shape in shapes.items()}
    surplus = {name for name in tensors if not BUFFERS.search(name)}
    for name, (parts, transposed) in plan.items():
        for part, rows in parts:
            wanted = (rows, *shapes[name][1:])[::-1 if transposed else 1]
            file, shape, kind = tensors.get(part, (directory, None, None))
            problem = "is missing" if shape is None else f"has shape {shape} and type {kind}"
            require(shape == wanted and kind in FLOATS,
                    f"{file}: {part} {problem}; config.json needs shape {wanted}, floating point")
            surplus.discard(part)
    if config.tied and "lm_head.weight" in surplus:
        head = read_tensor(tensors, "lm_head.weight")
        embedding = read_tensor(tensors, plan["embed.weight"][0][0][0])
        require(head.dtype == embedding.dtype and torch.equal(head, embedding),
                f"{tensors['lm_head.weight'][0]}: lm_head.weight is not the embedding, but config.json says "
                "tie_word_embeddings true; say false there, or take lm_head.weight out of the file")
        surplus.discard("lm_head.weight")
    require(not surplus, f"{directory}: config.json has no place for: {', '.join(sorted(surplus)[:3])}")
    return plan, tensors

def hash_of(*directories):
    """sha256 of what checkpoints contain: config.json, weights and tokenizer files. Not of their paths."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.iterdir()):
            if path.suffix == ".safetensors" or path.name in ("config.json", *TOKENIZER_FILES):
                with open(path, "rb") as file:
                    digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

def read_weights(directory, config: Config, dtype=None) -> dict[str, torch.Tensor]:
    """The state_dict of a checkpoint under our names, on the CPU, as `dtype` (None: as stored). One tensor is
    read at a time, so the memory is that of one copy of the weights. Errors: see check_weights."""
    plan, tensors = check_weights(directory, config)
    shapes, state = parameter_shapes(config), {}
    for name, (parts, transposed) in plan.items():
        state[name] = torch.empty(shapes[name], dtype=dtype or FLOATS[tensors[parts[0][0]][2]])
        for (part, _), rows in zip(parts, state[name].split([rows for _, rows in parts])):
            tensor = read_tensor(tensors, part)
            rows.copy_(tensor.T if transposed else tensor)
    return state

def write_checkpoint(directory, config: Config, state: dict[str, torch.Tensor], tokenizer):
    """Write a directory that transformers and vLLM load: config, weights and tokenizer.
    It is complete or not there. InputError if it exists, ValueError if `state` does not fit `config`."""
    directory = Path(directory)
    require(not directory.exists(), f"{directory}: already exists, is not overwritten; choose another place")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wrong := shapes.items() ^ parameter_shapes(config).items():
        raise ValueError(f"state does not fit config: {sorted(wrong)[:4]}")
    fields = config_json(config)
    kind = str(state["embed.weight"].dtype).removeprefix("torch.")
    fields["dtype" if "dtype" in fields else "torch_dtype"] = kind
    bos, eos = {"bos_token_id": tokenizer.bos}, {"eos_token_id": list(tokenizer.stop_ids)}
    with whole(directory) as scratch:
        scratch.mkdir()
        tokenizer.save(scratch)
        write_json(scratch / "config.json", bos | eos | fields)
        generation = read_json(scratch / "generation_config.json")
        write_json(scratch / "generation_config.json", bos | generation | eos)  # others stop where we stop
        write_weights(scratch, config, state)

def write_weights(directory: Path, config: Config, state):
    """model.safetensors, or shards of at most SHARD_BYTES and their index."""
    shards, sizes = [{}], [0]  # a shard: stored name -> tensor
    for name, tensor in state.items():
        parts, transposed = stored_parts(config, name, len(tensor))
        for (part, _), rows in zip(parts, tensor.detach().split([rows for _, rows in parts])):
            if sizes[-1] and sizes[-1] + rows.nbytes > SHARD_BYTES:
                shards.append({})
                sizes.append(0)
            shards[-1][part] = rows.T if transposed else rows
            sizes[-1] += rows.nbytes
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {part: tensor.contiguous() for part, tensor in shard.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        shutil.copymode(directory / "config.json", directory / file)  # save_file lets nobody else read it
    if len(shards) > 1:
        write_json(directory / "model.safetensors.index.json",
                   {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})

# ---------------------------------------------------------------------------------------- CUDA
def has_varlen_kernel(config, device, dtype):
    """Does Flash attention 2 run here, which reads of each row only as much of the cache as it fills?"""
    if torch.device(device).type != "cuda" or dtype != torch.bfloat16 or torch.version.hip:
        return False
    D, recent = config.head_size, torch.cuda.get_device_capability(device) >= (8, 0)
    return recent and D % 8 == 0 and D <= 256

def capture_cuda_graph(fn, device, graphs):
    """fn() on a GPU as a graph to replay(). fn must read and write the same memory in every call."""
    # Nothing is computed here. The kernels that fn launches are recorded, with the addresses they work on.
    # What fn makes in between shares its memory with the other graphs. Only one of them runs at a time.
    pool = next(iter(graphs.values())).pool() if graphs else None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
        fn()
    return graph

# ---------------------------------------------------------------------------------------- placement
# Training takes 16 bytes for each parameter: weight, gradient and AdamW's two moments, in float32. --offload
# says what of this is in main memory: (bytes that are left on the GPU, in words). Later ones are slower.
OFFLOAD = {"no": (16, "the state of training is on the GPU"), "moments": (8, "AdamW's moments are there"),
           "all": (0, "weights, gradients and AdamW's moments are there")}

def prepare_training(model, settings, device):
    """Place a model that is on the CPU for training on this process' device, in place, and return it."""
    if settings.dtype == "float32" and world() == 1 and settings.offload != "all":
        model.to(device)
    else:
        shard(model, settings, device)
    model.recompute = settings.recompute == "yes"
    return model

def shard(model, settings, device):
    """Shard a model on the CPU for training on this process' device (FSDP2), in place.

    Each process keeps its part of every weight in float32 (one process alone: all of it), because steps of
    5e-7 would be lost in the rounding of bfloat16 weights. For each layer in turn the parts are gathered into
    a copy in the dtype of the arithmetic, which is freed after use. Gradients are summed in float32. Copies
    and gradients stay between the passes of a step, if memory allows it: see before_pass()."""
    if not dist.is_initialized():
        dist.init_process_group(backend_for(device), store=dist.HashStore(), rank=0, world_size=1)
    dtype = getattr(torch, settings.dtype)
    once = gathers_once(settings, sum(p.numel() for p in model.parameters()), device)
    options = {"mesh": init_device_mesh(torch.device(device).type, (world(),)),
               "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
               "reshard_after_forward": False if once else None}
    if settings.offload == "all":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.startswith("cuda"))
    units = [*model.layers, model]  # a unit is gathered at once
    if model.head is not None:  # the embedding is a unit of its own, unless it is the head as well
        units.insert(0, model.embed)
    for unit in units:
        fully_shard(unit.float(), **options)
    model.sharded = torch.device(device), dtype, once

def gathers_once(settings, count, device):
    """Are the weights gathered, and the gradients given back, once a step and not in every pass? That takes
    a whole copy of `count` weights, and of the sums of their gradients, on the device of each process."""
    if not device.startswith("cuda"):
        return settings.offload == "all"
    if world() == 1 and settings.offload != "all":  # nothing travels to another device
        return False
    copies = getattr(torch, settings.dtype).itemsize + 4
    return fits_on_gpu(settings, count, device, OFFLOAD[settings.offload][0] / world() + copies)

def fits_on_gpu(settings, count, device, size):
    """Has a GPU room for `size` bytes for each of `count` weights, for the reference network if the loss
    needs it, and for 10 GB of activations?"""
    if getattr(settings, "loads_reference", False):
        size += getattr(torch, settings.dtype).itemsize
    return size * count + 10e9 <= torch.cuda.get_device_properties(device).total_memory

def before_pass(model, last):
    """Call it before each pass of a training step. If weights are gathered once a step, gradients are given
    back, and the copies of the weights freed, in the backward pass of the last one only."""
    if model.sharded and model.sharded[2]:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)

def full_tensor(tensor):
    """All of a tensor that may be sharded. Every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

def local_shard(tensor):
    """This process' part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
