"""Which model: names, downloads, shapes, checkpoints, tokenizers, chat formats. dice.py runs it.

A checkpoint is a Hugging Face directory: config.json, safetensors, tokenizer files. Two families are read
and written, GPT-2 and Llama (2, 3, 3.1, 3.2, Mistral, Qwen2); both become ONE `Config` and ONE set of names,
the state_dict of `dice.Transformer`. What that network cannot compute is refused by name.

Left out: pickled weights, quantised weights, tokenizers other than BPE, and chat templates as programs (four
formats are built in and recognised by their markers; a template found on disk is never executed).
"""
import base64
import hashlib
import heapq
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import time
import unicodedata
import urllib.error
import urllib.request
import uuid
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import regex
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm


class InputError(Exception):
    """Bad input, in one line: what, where, what to do. main prints it to stderr and exits with code 2."""

    def __init__(self, message: str):
        # It may quote any input: what would break the line, turn it round or flood it is written out or cut.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:900]))


def need(condition, message: str):
    if not condition:
        raise InputError(message)


def parse_json(text):
    """A JSON value; ValueError also for one nested so deep that printing or writing it could fail."""
    def deep(value, levels):
        inside = value.values() if isinstance(value, dict) else value
        return not levels or any(deep(one, levels - 1) for one in inside if type(one) in (dict, list))

    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if type(value) in (dict, list) and deep(value, 100):
        raise ValueError("nested too deep")
    return value


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} if there is no such file."""
    try:
        value = parse_json(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    need(isinstance(value, dict), f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


# -------------------------------------------------------------------------------- the shape of a network
@dataclass(frozen=True)
class Config:
    """The shape of a network. The two families differ by these fields, not by classes."""
    vocab_size: int
    context: int                      # positions it can tell apart: prompt and answer must fit
    layers: int
    width: int
    heads: int
    kv_heads: int                     # fewer than heads: grouped-query attention
    head_size: int
    hidden: int                       # inner size of the MLP
    position: str = "rotary"          # or "learned"
    norm: str = "rms"                 # or "layer", which always has a bias
    mlp: str = "swiglu"               # or "gelu" (tanh approximation)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False                # the output head is the embedding
    eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = field(default=None, hash=False)          # the four LLAMA3_SCALING, or None
    labels: int | None = None         # outputs of the head of a reward model, instead of the vocabulary's
    pad: int | None = None            # a reward model's padding, which its head does not look at
    raw: dict = field(default_factory=dict, compare=False, repr=False)   # config.json as it was read


LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def parameter_shapes(config: Config) -> dict[str, tuple]:
    """Name -> shape of every parameter, in the order of `dice.Transformer`'s state_dict."""
    C, V, q = config.width, config.vocab_size, config.heads * config.head_size
    kv, hidden, gated = config.kv_heads * config.head_size, config.hidden, 1 + (config.mlp == "swiglu")
    shapes = {"embed.weight": (V, C)}
    if config.position == "learned":
        shapes["position.weight"] = (config.context, C)

    def add(name, *shape, bias):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    for i in range(config.layers):
        add(f"layers.{i}.norm1", C, bias=config.norm == "layer")
        add(f"layers.{i}.qkv", q + 2 * kv, C, bias=config.qkv_bias)             # rows of q, then k, then v
        add(f"layers.{i}.out", C, q, bias=config.out_bias)
        add(f"layers.{i}.norm2", C, bias=config.norm == "layer")
        add(f"layers.{i}.up", gated * hidden, C, bias=config.mlp_bias)          # rows of gate, then up
        add(f"layers.{i}.down", C, hidden, bias=config.mlp_bias)
    add("norm", C, bias=config.norm == "layer")
    if config.labels or not config.tied:
        shapes["head.weight"] = (config.labels or V, C)
    return shapes


# -------------------------------------------------------------------------------- names
@dataclass(frozen=True)
class Named:
    """What `--model NAME` stands for."""
    repository: str             # on the Hugging Face hub; "": made by dice.py
    shape: Config | None        # for --weights dummy, which reads no config.json
    settings: dict              # its own defaults for dice.Settings, where the paper's Llama-3 stands


LLAMA3_8B = Config(128256, 8192, 32, 4096, 32, 8, 128, 14336, rope_theta=500000.0)
MISTRAL_7B = Config(32000, 4096, 32, 4096, 32, 8, 128, 14336)
PAPER = dict(prompts="data/uf-10k/prompt.json", preferences="data/uf-10k/preference.json")
WIDE = PAPER | dict(chunk=256, score_tokens=32768, train_tokens=8192)  # for cards of 80 GB and more
# Bases: SFT on the chosen answers of the paper's 10k pairs (3 epochs), DPO on the pairs (1 epoch), DICE on
# their prompts. Lengths and rows are for cards of 24 GB (gpt2-xl: 48); the smallest take larger steps.
# These are usual values, not tuned here.
BASE = dict(preferences=PAPER["preferences"], max_new_tokens=1024, max_tokens=2048, rows=64, sft_steps=900,
            dpo_lr=1e-6, lr=1e-6)
SMALLEST = BASE | dict(sft_lr=1e-4, dpo_lr=5e-6, lr=5e-6)


def gpt2(size, layers, width, settings):
    """GPT-2 in one of its four sizes: no control tokens and 1024 positions."""
    shape = Config(50257, 1024, layers, width, width // 64, width // 64, 64, 4 * width, "learned", "layer",
                   "gelu", True, True, True, True)
    lengths = dict(chat="plain", max_new_tokens=512, max_tokens=1024)
    return Named(f"openai-community/gpt2{size}", shape, settings | lengths)


NAMES = {
    "tiny": Named("", None, dict(  # so small that a GPU is no faster
        device="cpu", temperature=1.0, top_p=0.9, max_new_tokens=96, rows=512, chunk=256, batch=16, steps=32,
        epochs=2, lr=6e-5, warmup=0, sft_steps=1400, sft_lr=6e-3, dpo_steps=128, dpo_lr=5e-5,
        train_tokens=8192)),
    "llama3-8b": Named("princeton-nlp/Llama-3-Base-8B-SFT-DPO", LLAMA3_8B,
                       WIDE | dict(reference="llama3-8b-sft", chat="llama3")),
    "llama3-8b-sft": Named("princeton-nlp/Llama-3-Base-8B-SFT", LLAMA3_8B, WIDE | dict(chat="llama3")),
    "zephyr-7b": Named("HuggingFaceH4/zephyr-7b-beta", MISTRAL_7B, WIDE | dict(
        reference="zephyr-7b-sft", chat="zephyr", temperature=0.7, top_p=0.9)),
    "zephyr-7b-sft": Named("HuggingFaceH4/mistral-7b-sft-beta", MISTRAL_7B, WIDE | dict(
        chat="zephyr", temperature=0.7, top_p=0.9)),
    "gpt2": gpt2("", 12, 768, SMALLEST),
    "gpt2-medium": gpt2("-medium", 24, 1024, BASE),
    "gpt2-large": gpt2("-large", 36, 1280, BASE | dict(rows=32)),
    "gpt2-xl": gpt2("-xl", 48, 1600, BASE | dict(rows=32)),
    "llama3.2-1b": Named("meta-llama/Llama-3.2-1B", Config(
        128256, 131072, 16, 2048, 32, 8, 64, 8192, tied=True, rope_theta=500000.0,
        rope_scaling=dict(zip(LLAMA3_SCALING, (32.0, 1.0, 4.0, 8192)))), BASE | dict(chat="llama3")),
    "qwen2.5-0.5b": Named("Qwen/Qwen2.5-0.5B", Config(
        151936, 32768, 24, 896, 14, 2, 64, 4864, qkv_bias=True, tied=True, eps=1e-6, rope_theta=1000000.0),
        BASE | dict(chat="chatml")),
    "smollm2-135m": Named("HuggingFaceTB/SmolLM2-135M", Config(
        49152, 8192, 30, 576, 9, 3, 64, 1536, tied=True, rope_theta=100000.0),
        SMALLEST | dict(chat="chatml")),
}
SETTINGS = {name: named.settings for name, named in NAMES.items()}


def resolve(name: str) -> Path:
    """What `--model` was given, a name or a directory -> a directory with a model in it.

    A name's is in ./weights, or in the directory that DICE_WEIGHTS names, and is downloaded if missing.
    """
    path = Path(name).expanduser()
    if name in NAMES:
        repository = NAMES[name].repository
        need(repository, f"{name}: is made by dice.py from nothing; give a policy that a run of it has "
                         "left, like out/tiny/round-2/policy")
        path = Path(os.environ.get("DICE_WEIGHTS") or "weights").expanduser() / repository.split("/")[1]
        if not path.exists():
            download_repository(repository, path)
    need((path / "config.json").is_file(),
         f"{path}: not a model directory (no config.json in it); give a directory in Hugging Face format, "
         f"or one of the names {', '.join(NAMES)}")
    return path


# -------------------------------------------------------------------------------- downloads
TRIES, PAUSE = 5, 0.5          # tries that bring nothing new; seconds before the next one, doubling
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


class Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, *answer):
        new = super().redirect_request(request, *answer)
        if new and urlsplit(new.full_url)[:2] != urlsplit(request.full_url)[:2]:
            new.remove_header("Authorization")                 # the token is for the first host alone
        return new


def download(url: str, path: Path, size=None, digest=None, token=""):
    """Fetch a file. It appears under its name when all of it is there, on the disk, and as announced.

    What has come is kept in path.part, from where a broken transfer, or the next call, goes on. Raises
    OSError if it cannot be fetched or written, InputError if it is not of this size and digest.
    """
    part, tries, most = path.with_name(path.name + ".part"), TRIES, 0
    if digest and path.exists() and digest_of(path, digest) == digest:
        return
    with tqdm(desc=path.name, total=size, unit="B", unit_scale=True) as bar:
        while True:
            had = part.stat().st_size if part.exists() else 0
            try:
                if not (had and had == size):
                    receive(url, part, had, size, token, bar)
                break
            except BROKEN as error:
                code = getattr(error, "code", None)            # of an HTTPError
                if code == 416:                                # `part` is longer than the file
                    part.unlink()
                elif code and code < 500 and code not in (408, 429):
                    raise
                had, most = part.stat().st_size if part.exists() else 0, max(most, had)
                tries = TRIES if had > most else tries - 1
                if not tries:
                    raise OSError(f"{url}: {error}") from None
                time.sleep(PAUSE * 2 ** (TRIES - tries))
    found = digest and digest_of(part, digest)
    if found != digest:
        part.unlink()
        raise InputError(f"{url}: its digest is {found}, announced was {digest}; it was thrown away")
    flush(part)
    os.replace(part, path)
    flush(path.parent)


def receive(url, part, start, size, token, bar):
    """Append to `part`, which has `start` bytes, the rest of a file; BROKEN if not all of it came."""
    headers = {"User-Agent": "dice"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(Redirects)
    with opener.open(request, timeout=30) as response, open(part, "ab") as file:
        if not (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            start = 0                                          # it sends all of it, whatever was asked for
            file.truncate(0)
        length = response.headers.get("Content-Length")
        total = start + int(length) if (length or "").isdecimal() else size
        need(size in (None, total), f"{url}: has {total} bytes, announced were {size}")
        bar.total, bar.n = total, start
        while block := response.read(2 ** 20):
            file.write(block)
            bar.update(len(block))
        if total not in (None, file.tell()):
            raise ConnectionError(f"broke off after {file.tell()} of {total} bytes")


def digest_of(path, like):
    """sha256 in hex; or git's name of the contents, where the digest to compare with is a sha1."""
    if len(like) == 64:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest()


def download_repository(repository, directory: Path):
    """Fetch what we read of a repository on the hub. The directory appears when all of it is there."""
    hub, token = os.environ.get("HF_ENDPOINT") or "https://huggingface.co", os.environ.get("HF_TOKEN", "")
    hub, partial = hub.rstrip("/"), directory.with_name(f".{directory.name}.partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(directory.parent / ".lock"):
            if directory.exists():                             # thanks to the process that we waited for
                return
            need(hub.startswith(("http://", "https://")), f"HF_ENDPOINT {hub}: is not an http(s) address")
            partial.mkdir(exist_ok=True)
            files = hub_files(f"{hub}/api/models/{repository}/tree/main", partial / "listing.json", token)
            for path in partial.iterdir():                     # of another day, and gone from the hub
                if path.name.removesuffix(".part") not in files:
                    path.unlink()
            here = sum(path.stat().st_size for path in partial.iterdir())
            missing = sum(size for size, _ in files.values()) - here
            free = shutil.disk_usage(partial).free
            need(missing <= free, f"needs {missing / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free; "
                                  "make room, or set DICE_WEIGHTS to a directory elsewhere")
            print(f"downloading {hub}/{repository} to {directory}", file=sys.stderr)
            for name, (size, digest) in files.items():
                download(f"{hub}/{repository}/resolve/main/{name}", partial / name, size, digest, token)
            os.rename(partial, directory)
            flush(directory.parent)
    except (OSError, InputError) as error:
        way = "try again"
        if getattr(error, "code", None) in (401, 403):
            way = f"accept its terms, if any, on {hub}/{repository}, and set HF_TOKEN to a token of yours"
        raise InputError(f"{repository}: not downloaded: {error}; {way}, or put its config.json, "
                         f"*.safetensors and tokenizer files into {directory} by hand") from None


@contextmanager
def one_at_a_time(path):
    """Wait until no other process is in a block with this lock file; the lock ends with the process."""
    with open(path, "a") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting: another process is downloading to {path.parent}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hub_files(url, listing, token):
    """The files of a repository that we read: name -> (size, sha256 or git's sha1)."""
    for path in (listing, listing.with_name(listing.name + ".part")):
        path.unlink(missing_ok=True)                           # of another day
    download(url, listing, token=token)
    files, every = {}, []
    try:
        for entry in json.loads(listing.read_bytes()):
            name, size = entry["path"], entry["size"]
            digest = (entry.get("lfs") or entry)["oid"]
            every.append(name)
            # By whole name, so that nothing is written outside the directory; folders are not gone into.
            if name in ("config.json", "model.safetensors.index.json", *TOKENIZER_FILES) \
                    or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name):
                if size < 0 or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
                    raise ValueError
                files[name] = size, digest
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{url}: not a list of files with sizes and digests") from None
    finally:
        listing.unlink()
    pickled = sorted(name for name in every if name.endswith((".bin", ".pth")))
    need(any(name.endswith(".safetensors") for name in files),
         f"{url}: lists no safetensors" + (f" but {pickled[0][:60]!r}: convert it" if pickled else ""))
    need("config.json" in files, f"{url}: lists no config.json")
    return files


# -------------------------------------------------------------------------------- config.json
LARGEST = 2 ** 24              # no size in a config is larger
MOST_PARAMETERS = 1e13

# Fields that change what a network computes, with the values that we compute (absent or null is fine).
ONLY = {
    "gpt2": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,),
             "add_cross_attention": (False,), "quantization_config": ()},
    "llama": {"hidden_act": ("silu",), "partial_rotary_factor": (1,), "quantization_config": ()},
}
ONLY["mistral"] = ONLY["qwen2"] = ONLY["llama"]


def read_config(directory) -> Config:
    """config.json of a gpt2, llama, mistral or qwen2 model. Raises InputError naming file and field."""
    path = Path(directory) / "config.json"
    need(path.is_file(), f"{path}: not found; a model directory holds config.json and *.safetensors")
    return parse_config(read_json(path), path)


def checked(fields, key, path, default, good, what):
    """fields[key], or the default where it is absent or null; InputError if it is not good."""
    value = default if fields.get(key) is None else fields[key]
    need(good(value), f"{path}: {key} must be {what}, not {str(value)[:60]!r}")
    return value


def positive(fields, key, path, default=None):
    return checked(fields, key, path, default, lambda v: type(v) in (int, float) and 0 < v < 1e12,
                   "a positive number")


def parse_config(raw: dict, path) -> Config:
    """The fields of a config.json -> Config; `path` is only for messages."""
    kind = raw.get("model_type")
    need(isinstance(kind, str) and kind in ONLY,
         f"{path}: model_type {str(kind)[:60]!r} is not supported; supported: {', '.join(ONLY)}")
    for key, values in ONLY[kind].items():
        need(raw.get(key) is None or raw[key] in values,
             f"{path}: {key} {str(raw.get(key))[:60]!r} is not supported by this code")

    def size(key, default=None, most=LARGEST):
        return checked(raw, key, path, default, lambda v: type(v) is int and 1 <= v <= most,
                       f"a whole number from 1 to {most}")

    def flag(key, default=False):
        return checked(raw, key, path, default, lambda v: type(v) is bool, "true or false")

    gpt2 = kind == "gpt2"
    names = ("n_embd", "n_head") if gpt2 else ("hidden_size", "num_attention_heads")
    width, heads = map(size, names)
    need(width % heads == 0 or (not gpt2 and raw.get("head_dim")),
         f"{path}: the width {width} is not a multiple of the number of heads {heads}")
    if gpt2:
        config = Config(
            size("vocab_size"), size("n_positions"), size("n_layer", most=4096), width, heads, heads,
            width // heads, size("n_inner", 4 * width), "learned", "layer", "gelu", True, True, True,
            flag("tie_word_embeddings", True), positive(raw, "layer_norm_epsilon", path, 1e-5), raw=raw)
    else:
        kv_heads = size("num_key_value_heads", heads if kind == "llama" else None)
        need(heads % kv_heads == 0, f"{path}: num_attention_heads {heads} is not a multiple of "
                                    f"num_key_value_heads {kv_heads}")
        head_size = size("head_dim", width // heads)
        need(head_size % 2 == 0, f"{path}: the head size (head_dim) {head_size} must be even")
        context = size("max_position_embeddings")
        window = size("sliding_window", context)
        if kind == "mistral" or (kind == "qwen2" and flag("use_sliding_window")):
            context = min(context, window)     # in its first window a token sees everything, as here
        bias = kind == "llama" and flag("attention_bias")
        theta, scaling = rotary(raw, path)
        config = Config(
            size("vocab_size"), context, size("num_hidden_layers", most=4096), width, heads, kv_heads,
            head_size, size("intermediate_size"), qkv_bias=bias or kind == "qwen2", out_bias=bias,
            mlp_bias=kind == "llama" and flag("mlp_bias"), tied=flag("tie_word_embeddings"),
            eps=positive(raw, "rms_norm_eps", path, 1e-6), rope_theta=theta, rope_scaling=scaling,
            labels=reward_labels(raw, path), raw=raw,
            pad=checked(raw, "pad_token_id", path, None, lambda v: type(v) in (int, type(None)), "an id"))
    each = width * 2 * (heads * config.head_size + config.hidden)
    need(config.layers * each + config.vocab_size * width < MOST_PARAMETERS,
         f"{path}: its sizes describe a network of more than {MOST_PARAMETERS:.0e} parameters")
    return config


def reward_labels(raw, path):
    """How many numbers a sequence classifier gives (a reward model one); None for a language model."""
    if not str(raw.get("architectures")).endswith("ForSequenceClassification']"):
        return None
    two = {"0": "LABEL_0", "1": "LABEL_1"}  # transformers' default
    return len(checked(raw, "id2label", path, two, lambda v: isinstance(v, dict) and v, "an object of labels"))


def rotary(raw, path):
    """(rope_theta, rope_scaling), from the fields of those names or transformers 5's `rope_parameters`."""
    found = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        found |= checked(raw, key, path, {}, lambda v: isinstance(v, dict), "an object or null")
    kind = found.get("rope_type", found.get("type", "default"))
    per_layer = [key for key in found if isinstance(found[key], dict)]
    need(kind in ("default", "llama3") and not per_layer and found.get("partial_rotary_factor", 1) == 1,
         f"{path}: rotary scaling {str(per_layer or kind)[:60]!r} is not supported; supported: default and "
         "llama3, the same in every layer, over the whole head")
    theta = float(positive(found, "rope_theta", path, 10000.0))
    if kind == "default":
        return theta, None
    scaling = {key: positive(found, key, path) for key in LLAMA3_SCALING}
    need(scaling["low_freq_factor"] < scaling["high_freq_factor"],
         f"{path}: rotary scaling needs low_freq_factor < high_freq_factor")
    return theta, scaling


def config_json(config: Config) -> dict:
    """The config.json of a network: as it was read where that still describes it, else from the fields."""
    c = config
    if c.raw and parse_config(c.raw, "config.json") == c:
        return dict(c.raw)
    written = {"vocab_size": c.vocab_size, "tie_word_embeddings": c.tied}
    family = (c.position, c.norm, c.mlp)
    if family == ("learned", "layer", "gelu") and c.qkv_bias and c.out_bias and c.mlp_bias \
            and c.kv_heads == c.heads and c.heads * c.head_size == c.width:
        written |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_positions": c.context,
                    "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads, "n_inner": c.hidden,
                    "activation_function": "gelu_new", "layer_norm_epsilon": c.eps}
    elif family == ("rotary", "rms", "swiglu") and (c.qkv_bias == c.out_bias or c.qkv_bias > c.mlp_bias):
        kind, name = ("llama", "Llama") if c.qkv_bias == c.out_bias else ("qwen2", "Qwen2")
        written |= {"architectures": [f"{name}ForCausalLM"], "model_type": kind, "hidden_size": c.width,
                    "max_position_embeddings": c.context, "num_hidden_layers": c.layers,
                    "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
                    "head_dim": c.head_size, "intermediate_size": c.hidden, "hidden_act": "silu",
                    "rms_norm_eps": c.eps, "attention_bias": c.out_bias, "mlp_bias": c.mlp_bias,
                    "rope_theta": c.rope_theta,
                    "rope_scaling": c.rope_scaling and {"rope_type": "llama3", **c.rope_scaling}}
    else:
        raise InputError(f"no Hugging Face architecture has this shape, so it cannot be saved: {config}")
    replaced = ("rope_parameters", "sliding_window", "use_sliding_window", "layer_types")
    return {key: value for key, value in c.raw.items() if key not in replaced} | written


# -------------------------------------------------------------------------------- weights
SHARD_BYTES = 5 * 10 ** 9
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GPT2 = {"embed": ["wte"], "position": ["wpe"], "norm": ["ln_f"], "norm1": ["ln_1"], "norm2": ["ln_2"],
        "qkv": ["attn.c_attn"], "out": ["attn.c_proj"], "up": ["mlp.c_fc"], "down": ["mlp.c_proj"]}
LLAMA = {"embed": ["embed_tokens"], "norm": ["norm"], "norm1": ["input_layernorm"],
         "norm2": ["post_attention_layernorm"], "out": ["self_attn.o_proj"], "down": ["mlp.down_proj"],
         "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
         "up": ["mlp.gate_proj", "mlp.up_proj"]}
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|h\.\d+\.attn\.(bias|masked_bias)$")   # not parameters


def stored_parts(config: Config, name: str, rows: int, bare=False) -> tuple[list[tuple[str, int]], bool]:
    """One of our parameters -> ([(Hugging Face name, its rows), ...], is it stored transposed?).

    Llama files hold q, k, v and gate, up separately: we stack their rows. GPT-2's linear layers ("Conv1D")
    are stored as (in, out), the transpose of torch's (out, in). bare: GPT-2 names without "transformer.".
    """
    *layer, module, kind = name.split(".")          # layers.3.qkv.weight: ["layers", "3"], "qkv", "weight"
    if module == "head":
        return [("score.weight" if config.labels else "lm_head.weight", rows)], False
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
    """safe_open, which validates the header; whatever is wrong becomes an InputError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: missing, cut short or damaged ({error}); fetch it again") from None


def find_tensors(directory: Path) -> dict[str, tuple[Path, tuple, str]]:
    """Every tensor of a checkpoint, one file or sharded: name -> (file, shape, type). Reads headers only."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    listed = {}                                                            # tensor -> file
    if not single.exists():
        pickled = sorted(path.name for end in ("bin", "pt", "pth") for path in directory.glob(f"*.{end}"))
        need(index.exists(), f"{directory}: has no model.safetensors or model.safetensors.index.json"
             + (f"; {pickled[0]} is a pickle (it can run code): convert to safetensors" if pickled else ""))
        listed = read_json(index).get("weight_map")
        need(isinstance(listed, dict) and listed, f"{index}: has no weight_map")
        for file in listed.values():
            need(isinstance(file, str) and re.fullmatch(r"[\w-][\w.-]*", file),
                 f"{index}: {str(file)[:80]!r} is not a plain file name")
    tensors = {}
    for file in sorted(set(listed.values())) or [single.name]:
        with open_safetensors(directory / file) as opened:
            for name in opened.keys():
                need(name not in tensors, f"{directory / file}: {name} is in another file too")
                part = opened.get_slice(name)
                tensors[name] = directory / file, tuple(part.get_shape()), part.get_dtype()
    for name, file in listed.items():
        need(name in tensors, f"{directory / file}: lacks {name}, which the index says it holds")
    return tensors


def check_weights(directory, config: Config):
    """Where a checkpoint keeps each of our parameters: (name -> stored_parts, find_tensors). Reads headers.

    Raises InputError for a damaged file and for missing, surplus or misshapen tensors, by name.
    """
    directory, shapes = Path(directory), parameter_shapes(config)
    tensors = find_tensors(directory)
    bare = config.position == "learned" and "wte.weight" in tensors
    plan = {name: stored_parts(config, name, shape[0], bare) for name, shape in shapes.items()}
    surplus = {name for name in tensors if not BUFFERS.search(name)}
    surplus -= {"lm_head.weight"} if config.tied else set()
    for name, (parts, transposed) in plan.items():
        for part, rows in parts:
            wanted = (rows, *shapes[name][1:])[::-1 if transposed else 1]
            file, shape, kind = tensors.get(part, (directory, None, None))
            problem = "is missing" if shape is None else f"has shape {shape} and type {kind}"
            need(shape == wanted and kind in FLOATS,
                 f"{file}: {part} {problem}; config.json asks for {wanted}, floating point")
            surplus.discard(part)
    need(not surplus,
         f"{directory}: tensors that config.json has no place for: {', '.join(sorted(surplus)[:3])}")
    return plan, tensors


def read_weights(directory, config: Config, dtype=None) -> dict[str, torch.Tensor]:
    """The state_dict of a checkpoint under our names, on the CPU, as `dtype` (None: as stored).

    One tensor is read at a time, so the peak is one copy of the weights. Errors: check_weights.
    """
    (plan, tensors), shapes, state = check_weights(directory, config), parameter_shapes(config), {}
    for name, (parts, transposed) in plan.items():
        state[name] = torch.empty(shapes[name], dtype=dtype or FLOATS[tensors[parts[0][0]][2]])
        for (part, _), rows in zip(parts, state[name].split([rows for _, rows in parts])):
            with open_safetensors(tensors[part][0]) as file:
                tensor = file.get_tensor(part)
            rows.copy_(tensor.T if transposed else tensor)
    return state


def write_checkpoint(directory, config: Config, state: dict[str, torch.Tensor], tokenizer, dtype=None):
    """Write a directory that transformers and vLLM load: config, weights (dtype None: as is), tokenizer.

    It is whole or not there. Raises InputError if the directory exists, ValueError if `state` does not fit
    `config`.
    """
    directory = Path(directory)
    need(not directory.exists(), f"{directory}: already exists and is not overwritten; choose another place")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = shapes.items() ^ parameter_shapes(config).items()
    if wrong:
        raise ValueError(f"state does not fit config: {sorted(wrong)[:4]}")
    fields = config_json(config)
    kind = str(dtype or state["embed.weight"].dtype).removeprefix("torch.")
    fields["dtype" if "dtype" in fields else "torch_dtype"] = kind
    bos, eos = {"bos_token_id": tokenizer.bos}, {"eos_token_id": list(tokenizer.stop_ids)}
    with whole_directory(directory) as scratch:
        tokenizer.save(scratch)
        write_json(scratch / "config.json", bos | eos | fields)
        generation = read_json(scratch / "generation_config.json")
        known = generation.get("eos_token_id")
        if not set(tokenizer.stop_ids) <= set(known if isinstance(known, list) else [known]):
            write_json(scratch / "generation_config.json", bos | generation | eos)
        write_weights(scratch, config, state, dtype)


def write_weights(directory: Path, config: Config, state, dtype):
    """model.safetensors, or shards of at most SHARD_BYTES and their index."""
    shards, sizes = [[]], [0]              # a shard: [(stored name, our name, first row, rows, transposed)]
    for name, tensor in state.items():
        parts, transposed = stored_parts(config, name, len(tensor))
        first = 0
        for part, rows in parts:
            count = tensor[first:first + rows].numel() * (dtype or tensor.dtype).itemsize
            if sizes[-1] and sizes[-1] + count > SHARD_BYTES:
                shards.append([])
                sizes.append(0)
            shards[-1].append((part, name, first, rows, transposed))
            sizes[-1] += count
            first += rows
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for part, name, first, rows, transposed in shard:
            tensor = state[name][first:first + rows].detach().to("cpu", dtype)
            tensors[part] = (tensor.T if transposed else tensor).contiguous()
            weight_map[part] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / file)     # it makes them for their owner only
    if len(shards) > 1:
        write_json(directory / "model.safetensors.index.json",
                   {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def write_file(path: Path, write):
    """Make a file by write(scratch): beside its place, flushed, renamed, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(scratch)
        flush(scratch)
        os.replace(scratch, path)
        flush(path.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def whole_directory(directory: Path):
    """Gives a directory beside its place to write into; at the end it is flushed and renamed."""
    scratch = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in (*scratch.iterdir(), scratch):
            flush(path)
        os.rename(scratch, directory)
        flush(directory.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]):
    """Tensors of any names in a safetensors file."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What write_tensors wrote."""
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def flush(path: Path):
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------- byte-pair encoding
def bpe(symbols: list, merges: dict, never=None) -> list:
    """Join the adjacent pair that stands first in `merges`, the leftmost of equals, until no pair is left.

    symbols: ids; merges: {(left id, right id): (rank, joined id)}; never: a joined id not to make.
    A heap over a linked list, O(n log n): a prompt may be megabytes without a blank.
    """
    n = len(symbols)
    symbols = [*symbols, None]                         # None: the end, and later the right half of a join
    after, before = list(range(1, n + 1)), list(range(-1, n))
    heap = []                                          # rank * n + position, as one number

    def push(i):
        found = merges.get((symbols[i], symbols[after[i]]))
        if found and found[1] != never:
            heapq.heappush(heap, found[0] * n + i)

    for i in range(n):
        push(i)
    while heap:
        rank, i = divmod(heapq.heappop(heap), n)
        found = merges.get((symbols[i], symbols[after[i]])) if symbols[i] is not None else None
        if not found or found[0] != rank:              # one of the two was joined to another meanwhile
            continue
        gone = after[i]
        symbols[i], symbols[gone], after[i] = found[1], None, after[gone]
        before[after[i]] = i
        push(i)
        if before[i] >= 0:
            push(before[i])
    return [symbol for symbol in symbols if symbol is not None]


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LONG_BLANK = 500_000           # tiktoken's regex engine panics on a run of a million blanks


class ByteLevelBPE:
    """Text -> pieces (regular expressions) -> bytes -> BPE, by tiktoken. GPT-2, Llama-3, Qwen2, SmolLM2."""
    every_section = False      # see SentencePieceBPE

    def __init__(self, ranks: dict[bytes, int], ids, whole: dict[bytes, int], patterns: list, nfc: bool):
        """ranks: tiktoken's; ids: rank -> id; whole: ranks of tokens that only a whole piece can become."""
        self.ids, self.whole, self.nfc = ids, whole, nfc
        used = {*range(0xF5)} - {0xC0, 0xC1}                   # the bytes that occur in UTF-8
        self.absent = bytes(b for b in used if bytes([b]) not in ranks)
        # What a pattern does not match is a piece of its own too; tiktoken alone would drop it.
        patterns = [rf"(?:{p})|(?:(?!{p})[\s\S])+" for p in patterns]
        self.splits = [regex.compile(p) for p in patterns]
        self.tiktoken = tiktoken.Encoding("", pat_str=patterns[-1], mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str, start=True) -> list[int]:
        sections = [unicodedata.normalize("NFC", text) if self.nfc else text]
        try:
            for split in self.splits[:-1]:
                sections = [match[0] for section in sections
                            for match in split.finditer(section, timeout=60)]
            return [self.ids[rank] for section in sections for rank in self.ranks_of(section)]
        except BaseException as error:          # of this kind is a panic of tiktoken's
            if type(error).__name__ not in ("PanicException", "TimeoutError"):
                raise
            raise InputError(f"the tokenizer's pattern fails on the text {text[:60]!r}, or takes too long; "
                             "take another tokenizer.json, or shorten the text") from None

    def ranks_of(self, text: str) -> list[int]:
        blanks = max(map(len, re.findall(r"\s+", text)), default=0) if len(text) > LONG_BLANK else 0
        lacking = self.absent and not {*self.absent}.isdisjoint(text.encode())
        if blanks < LONG_BLANK and not self.whole and not lacking:
            return self.tiktoken.encode_ordinary(text)
        ranks = []
        for match in self.splits[-1].finditer(text, timeout=60):
            piece = match[0].encode()
            kept = piece.translate(None, self.absent)  # a byte without a token is dropped (as in HF)
            if piece in self.whole:
                ranks.append(self.whole[piece])
            elif kept:
                ranks += self.tiktoken._encode_single_piece(kept)
        return ranks


def tiktoken_ranks(words: dict[bytes, int], merges: dict, ignore_merges: bool):
    """Vocabulary and merge list -> (ranks, ids, whole) for ByteLevelBPE: the same ids, for every text.

    Subtle. Hugging Face joins listed PAIRS; tiktoken joins any neighbours whose union is a token. They agree
    if tiktoken is given just the tokens that the merges make out of the token's own bytes, ranked by the
    pair that completes it: as long as nothing is joined across its ends, its inside goes the same way as
    alone, so the only two halves that ever meet are that pair. With ignore_merges a piece that is a token is
    taken whole: a token that alone ends as three parts or more never meets as two, so tiktoken may know it;
    one that ends as two would be joined wrongly inside longer pieces, and is kept apart in `whole`.
    """
    made, alone, whole = {}, [], []
    for word, i in words.items():
        spelled = [words.get(bytes([b])) for b in word]
        parts = tuple(bpe(spelled, merges, never=i)) if None not in spelled else ()
        if len(parts) == 2 and merges.get(parts, (0, None))[1] == i:
            made[word] = merges[parts][0]
        elif len(word) == 1 or (ignore_merges and len(parts) > 2):
            alone.append(word)
        elif ignore_merges:
            whole.append(word)
    order = sorted(made, key=made.get) + alone
    ranks = {word: rank for rank, word in enumerate(order + whole)}
    ids = [words[word] for word in ranks]
    return {word: ranks[word] for word in order}, ids, {word: ranks[word] for word in whole}


class SentencePieceBPE:
    """BPE over a whole text, blanks written "▁", characters without a token as bytes. Llama-2, Mistral."""

    def __init__(self, pieces: dict[str, int], merges: dict, prefix: str, split: bool):
        """prefix: is "▁" put before a text? "legacy" (yes), "always" or "first" (unless there), "never"."""
        self.pieces, self.merges, self.prefix, self.split = pieces, merges, prefix, split
        self.every_section = prefix in ("legacy", "always")  # after each control token, or only at the start
        self.bytes = [pieces[f"<0x{b:02X}>"] for b in range(256)]
        names = {i: piece for piece, i in pieces.items()}
        # Characters that meet inside no join: a text can be cut between them, and the short cuts remembered.
        self.meet = {names[left][-1] + names[right][0] for left, right in merges}
        self.short = lru_cache(2 ** 16)(self.join)

    def encode(self, text: str, start=True) -> list[int]:
        text = text.replace(" ", "▁")
        if text and start and (self.prefix == "legacy" or (self.prefix != "never" and text[0] != "▁")):
            text = "▁" + text
        ids, first = [], 0
        for i in range(1, len(text) + 1):
            if text[i - 1:i + 1] not in self.meet or (self.split and text[i] == "▁"):
                ids += (self.short if i - first < 50 else self.join)(text[first:i])
                first = i
        return ids

    def join(self, text: str) -> list[int]:
        symbols = []
        for character in text:
            known = self.pieces.get(character)
            symbols += [self.bytes[b] for b in character.encode()] if known is None else [known]
        return bpe(symbols, self.merges)


# Chat format -> the markers by which its template is recognised.
CHATS = {"llama3": ("<|start_header_id|>", "<|eot_id|>"), "chatml": ("<|im_start|>", "<|im_end|>"),
         "zephyr": ("<|user|>", "<|assistant|>", "eos_token"), "plain": ()}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "tokenizer.model", "chat_template.jinja", "generation_config.json", "vocab.json",
                   "merges.txt")
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]   # bytes that stand for themselves in GPT-2's
HIDDEN = sorted({*range(256)} - {*SHOWN})                        # alphabet, and those that take a letter
LETTERS = {chr(b): b for b in SHOWN} | {chr(256 + n): b for n, b in enumerate(HIDDEN)}


class Tokenizer:
    """Text <-> ids, and chat messages -> ids. Text never becomes an added (control) token, whatever it says.

    bos: put before a text, or None; end: closes every answer; stop_ids: what ends a sample, `end` included.
    """

    def __init__(self, coder, words: dict[int, bytes], control: dict[str, int], bos, stop_ids, chat, files):
        """words: id -> what decode shows; control: the added tokens; stop_ids[0]: the end-of-text token."""
        self.coder, self.control, self.bos, self.chat, self.files = coder, control, bos, chat, files
        need(stop_ids, "the tokenizer names no end-of-text token: tokenizer_config.json needs an eos_token")
        name = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}.get(chat)
        self.end = self.control_id(name) if name else stop_ids[0]
        self.stop_ids = tuple(dict.fromkeys([self.end, *stop_ids]))
        self.words = {i: word for i, word in words.items() if i not in self.stop_ids and i != bos}
        self.vocab_size = 1 + max([*words, *control.values(), self.end, bos or 0])  # which a model must have
        self.frame("user")                                     # complain now if a control token is missing

    def control_id(self, content) -> int:
        need(content in self.control, f"the tokenizer has no {content}, which chat format {self.chat} "
                                      "needs; choose another with --chat")
        return self.control[content]

    def encode(self, text: str, start=True) -> list[int]:
        """Ids of plain text. start=False: it continues earlier text (no "▁" is put before it)."""
        # Half a surrogate pair is no character and has no UTF-8: it becomes U+FFFD.
        return self.coder.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), start)

    def decode(self, ids) -> str:
        """Text of ids, nothing stripped; control and unknown ids left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self.words.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def raw(self, text: str) -> list[int]:
        """Ids of a text to be continued, without a chat format."""
        return ([] if self.bos is None else [self.bos]) + self.encode(text)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer as it follows prompt(...), with the end token."""
        return self.encode(text, start=False) + [self.end]

    def prompt(self, messages, answer=None) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins; or, with an answer, all of it.

        messages: one user message, or a list of {"role": system, user or assistant, "content": text}.
        """
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        parts, spoken = [], [] if answer is None else [{"role": "assistant", "content": answer}]
        for message in [*messages, *spoken]:
            role, content = message.get("role"), message.get("content")
            need(role in ("system", "user", "assistant") and isinstance(content, str),
                 f"a message needs a role (system, user, assistant) and a text, not {str(message)[:80]}")
            before, after = self.frame(role)
            parts += [*before, content.strip() if self.chat == "llama3" else content, *after]
        if answer is None:
            parts += self.frame("assistant")[0]
        elif self.chat == "plain":
            parts[-1] = self.end
        ids, text, start = [] if self.bos is None else [self.bos], "", True
        for part in [*parts, None]:                  # the text between two control tokens is encoded at once
            if isinstance(part, str):
                text += part
                continue
            ids += self.encode(text, start) + ([] if part is None else [part])
            text, start = "", self.coder.every_section
        return ids

    def frame(self, role: str) -> tuple[list, list]:
        """What stands before and after a message: str is text, int a control token.

        As in the models' own templates, but without the dates and system prompts that some of them invent.
        """
        if self.chat == "llama3":
            first, last = self.control_id("<|start_header_id|>"), self.control_id("<|end_header_id|>")
            return [first, role, last, "\n\n"], [self.end]
        if self.chat == "chatml":
            return [self.control_id("<|im_start|>"), f"{role}\n"], [self.end, "\n"]
        if self.chat == "zephyr":                              # <|user|> is ordinary text for Zephyr itself
            return [self.control.get(f"<|{role}|>", f"<|{role}|>"), "\n"], [self.end, "\n"]
        return [], ["\n"]

    def save(self, directory):
        """Write the files that the tokenizer was read from, byte for byte."""
        for name, content in self.files.items():
            (Path(directory) / name).write_bytes(content)


def read_tokenizer(directory, chat="auto") -> Tokenizer:
    """The tokenizer of a model directory: tokenizer.json (BPE), or Llama-3's rank file tokenizer.model.

    chat: auto (recognise the template), llama3, zephyr, chatml or plain. Raises InputError naming the file.
    """
    directory = Path(directory)
    files = {name: directory / name for name in TOKENIZER_FILES}
    try:
        files = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None
    need("tokenizer.json" in files or "tokenizer.model" in files,
         f"{directory}: no tokenizer.json and no tokenizer.model (Llama-3's rank file)")
    settings = read_json(directory / "special_tokens_map.json")
    settings |= read_json(directory / "tokenizer_config.json")
    named = {}
    for key in ("bos_token", "eos_token"):                     # "<s>" or {"content": "<s>", ...} or null
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        named[key] = token if isinstance(token, str) else None         # "None" is a word of GPT-2's
    if "tokenizer.json" in files:
        coder, words, control, bos, eos = read_tokenizer_json(directory / "tokenizer.json", named.values())
    else:
        coder, words, control, bos, eos = read_rank_file(directory / "tokenizer.model")
    stop_ids = [i for i in [control.get(named["eos_token"], eos)] if i is not None]
    for name in ("generation_config.json", "config.json"):
        ids = read_json(directory / name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        need(all(type(i) is int and 0 <= i < LARGEST for i in ids),
             f"{directory / name}: eos_token_id must be an id or a list of ids, not {str(ids)[:60]}")
        stop_ids += ids
    if chat == "auto":
        chat = recognise_chat(files, settings, directory)
    if chat == "plain" and named["bos_token"] in control:  # a base model starts anew: it has ended
        stop_ids.append(control[named["bos_token"]])
    need(chat in CHATS, f"chat format {chat!r} is unknown; choose one of auto, {', '.join(CHATS)}")
    try:
        return Tokenizer(coder, words, control, bos, stop_ids, chat, files)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None


def recognise_chat(files, settings, directory) -> str:
    """The chat format by its markers in the template, which is never executed."""
    template = settings.get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode("utf-8", "replace")
    if not template:
        return "plain"
    template = str(template)                                   # also a list of named templates
    found = [chat for chat, markers in CHATS.items() if markers and all(m in template for m in markers)]
    need(len(found) == 1 and "<|end|>" not in template,        # <|end|>: Phi-3, otherwise like Zephyr
         f"{directory}: its chat template is none of {', '.join(CHATS)}; choose one with --chat")
    return found[0]


def read_rank_file(path: Path):
    """tokenizer.model of Llama-3: lines "base64 rank"; the 256 control tokens that follow are not in it."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(word, validate=True): int(rank) for word, rank in lines}
    except ValueError:
        raise InputError(f"{path}: not Llama-3's rank file (SentencePiece: give tokenizer.json)") from None
    n = len(ranks)
    need(sorted(ranks.values()) == list(range(n)) and all(bytes([b]) in ranks for b in range(256)),
         f"{path}: ranks must be 0, 1, 2, ... without gaps, and all 256 bytes be there")
    control = {f"<|reserved_special_token_{i}|>": n + i for i in range(256)} | {
        "<|begin_of_text|>": n, "<|end_of_text|>": n + 1, "<|start_header_id|>": n + 6,
        "<|end_header_id|>": n + 7, "<|eot_id|>": n + 9}
    words = {i: word for word, i in ranks.items()}
    return ByteLevelBPE(ranks, range(n), {}, [LLAMA3_PATTERN], nfc=False), words, control, n, n + 1


def read_tokenizer_json(path: Path, special):
    """tokenizer.json with a BPE model -> (coder, {id: bytes}, control tokens {content: id}, bos, None).

    special: contents that tokenizer_config.json declares to be control tokens in addition.
    """
    data = read_json(path)
    model = data.get("model")
    need(isinstance(model, dict) and model.get("type", "BPE") == "BPE", f"{path}: its model is not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        need(not model.get(key), f"{path}: model.{key} is not supported")
    vocab, added = model.get("vocab"), data.get("added_tokens") or []
    need(isinstance(vocab, dict) and vocab
         and all(type(i) is int and 0 <= i < LARGEST for i in vocab.values())
         and len({*vocab.values()}) == len(vocab), f"{path}: model.vocab must map tokens to distinct ids")
    need(isinstance(added, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        and 0 <= token["id"] < LARGEST and vocab.get(token["content"], token["id"]) == token["id"]
        for token in added), f"{path}: added_tokens need a content and an id that agrees with the vocab")
    control = {name: vocab[name] for name in special if name in vocab}
    control |= {token["content"]: token["id"] for token in added}
    pieces = {token: i for token, i in vocab.items() if token not in control}
    need({*pieces.values()}.isdisjoint(control.values()),
         f"{path}: added_tokens give a control token the id of an ordinary one")
    merges = read_merges(model.get("merges"), vocab, pieces, path)

    def steps(key, inner):                                     # a Sequence of steps, one step, or null
        step = data.get(key) or {"type": "Sequence", inner: []}
        found = step.get(inner) if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
        good = isinstance(found, list) and all(isinstance(one, dict) for one in found)
        need(good, f"{path}: {key} is damaged")
        return found

    normalizers, splitters = steps("normalizer", "normalizers"), steps("pre_tokenizer", "pretokenizers")
    build = byte_level if any(step.get("type") == "ByteLevel" for step in splitters) else sentence_piece
    coder, words = build(pieces, merges, model, normalizers, splitters, path)
    for token in added:
        if not token.get("special"):
            words[token["id"]] = token["content"].encode("utf-8", "replace")    # shown: <tool_call> and such
    return coder, words, control, template_bos(steps("post_processor", "processors"), path), None


def read_merges(listed, vocab, pieces, path) -> dict:
    """["a b" or ["a", "b"], ...] -> {(left id, right id): (rank, joined id)}; none makes a control token."""
    merges = {}
    try:
        for rank, pair in enumerate(listed):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            ids = vocab[left], vocab[right], vocab[left + right]
            if not (left and right):
                raise ValueError
            if left in pieces and right in pieces and left + right in pieces:
                merges[ids[:2]] = rank, ids[2]
    except (TypeError, ValueError, KeyError):
        raise InputError(f"{path}: model.merges must be pairs of tokens that make a token") from None
    return merges


def template_bos(processors, path):
    """The id that the post-processor puts before a text, or None. What it puts after one is not used."""
    before = []
    for step in processors:
        need(step.get("type") in ("TemplateProcessing", "ByteLevel"),
             f"{path}: post_processor {str(step.get('type'))[:60]} is not supported")
        try:
            for item in step.get("single") or []:
                if "Sequence" in item:
                    break
                before += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        except (KeyError, TypeError):
            raise InputError(f"{path}: post_processor is damaged") from None
    need(len(before) <= 1 and all(type(i) is int and 0 <= i < LARGEST for i in before),
         f"{path}: post_processor puts more than one token before a text, or what is no id")
    return before[0] if before else None


def byte_level(pieces, merges, model, normalizers, splitters, path):
    """(ByteLevelBPE, {id: bytes}) from the parts of a tokenizer.json."""
    need(all(step.get("type") == "NFC" for step in normalizers),
         f"{path}: normalizer {str(normalizers)[:80]} is not supported with byte-level BPE")
    patterns = []
    for step in splitters:
        kind, pattern = step.get("type"), step.get("pattern")
        how = step.get("behavior"), step.get("invert")
        if kind == "Split" and isinstance(pattern, dict) and how == ("Isolated", False):
            plain = re.escape(str(pattern.get("String")))
            patterns.append(str(pattern["Regex"]) if "Regex" in pattern else plain)
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        else:
            need(kind == "ByteLevel" and step is splitters[-1] and step.get("add_prefix_space") is False,
                 f"{path}: pre_tokenizer step {str(step)[:100]} is not supported")
            patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
    for pattern in patterns:
        # A repeated group can take exponential time, to match and to compile; no tokenizer has one.
        bare = re.sub(r"\\.|\[(\\.|[^\]\\])*\]", "", pattern, flags=re.S)
        need(not re.search(r"\)\s*[*+{]|\(\?#|\{\d*,?\d{3}", bare),
             f"{path}: the pre_tokenizer pattern {pattern[:80]!r} repeats a group, or something a hundred "
             "times, which can take forever")
    spelled = {p: bytes(map(LETTERS.get, p)) for p in pieces if p and {*p} <= LETTERS.keys()}
    words = {i: spelled.get(piece, piece.encode("utf-8", "replace")) for piece, i in pieces.items()}
    spelled = {word: pieces[piece] for piece, word in spelled.items()}
    ranks = tiktoken_ranks(spelled, merges, model.get("ignore_merges"))
    try:
        coder = ByteLevelBPE(*ranks, patterns or [r"[\s\S]+"], nfc=bool(normalizers))
    except (ValueError, regex.error) as error:
        raise InputError(f"{path}: a pre_tokenizer pattern cannot be used ({str(error)[:80]})") from None
    need(not coder.absent or model.get("unk_token") is None, f"{path}: some of the 256 bytes have no token")
    return coder, words


def sentence_piece(pieces, merges, model, normalizers, splitters, path):
    """(SentencePieceBPE, {id: bytes}) from the parts of a tokenizer.json."""
    fallback = {pieces.get(f"<0x{b:02X}>"): b for b in range(256)}
    need(model.get("byte_fallback") is True and None not in fallback,
         f"{path}: neither byte-level BPE nor BPE with byte_fallback and its 256 byte tokens")
    need(not model.get("ignore_merges") and all(fallback.keys().isdisjoint(pair) for pair in merges),
         f"{path}: ignore_merges, or a merge of byte tokens <0x..>, is not supported with byte_fallback")
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if not splitters and normalizers in ([prepend, replace], [replace]):
        prefix, split = "legacy" if len(normalizers) == 2 else "never", False
    else:
        step = splitters[0] if len(splitters) == 1 and not normalizers else {}
        old = "always" if step.get("add_prefix_space", True) else "never"
        prefix, split = step.get("prepend_scheme", old), step.get("split", True)
        need(step.get("type") == "Metaspace" and step.get("replacement") == "▁"
             and prefix in ("first", "always", "never"),
             f"{path}: its normalizer and pre_tokenizer are neither Prepend and Replace by ▁ nor Metaspace")
    words = {i: bytes([fallback[i]]) if i in fallback else piece.replace("▁", " ").encode("utf-8", "replace")
             for piece, i in pieces.items()}
    return SentencePieceBPE(pieces, merges, prefix, split), words


# -------------------------------------------------------------------------------- --weights dummy
class StandIn:
    """Text -> an id for every four characters, about as many as a real tokenizer makes; no way back."""
    every_section = False

    def __init__(self, ids: int):
        self.ids = ids

    def encode(self, text: str, start=True) -> list[int]:
        return [zlib.crc32(text[i:i + 4].encode()) % self.ids for i in range(0, len(text), 4)]


def stand_in(name: str) -> tuple[Config, Tokenizer]:
    """The shape of a name's model, and a tokenizer that needs no file.

    One id in 400 ends an answer: random weights say any id, and so answer at about a real model's length.
    """
    need(name in NAMES and NAMES[name].shape,
         f"--weights dummy: stands in for {', '.join(n for n in NAMES if NAMES[n].shape)}, not for {name}")
    config = NAMES[name].shape
    ends = range(config.vocab_size - config.vocab_size // 400, config.vocab_size)
    words = {i: f"{i:04x}".encode() for i in range(config.vocab_size)}
    return config, Tokenizer(StandIn(ends[0]), words, {}, None, ends, "plain", {})
