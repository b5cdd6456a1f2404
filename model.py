"""Which model: shapes, checkpoints on disk, tokenizers, chat formats. No network is run here (see dice.py).

A checkpoint is a Hugging Face directory: config.json, safetensors, tokenizer files. Two families are read
and written, GPT-2 and Llama (2, 3, 3.1, 3.2, Mistral, Qwen2); both become ONE `Config` and ONE set of names,
the state_dict of `dice.Transformer`. What that network cannot compute is refused by name.

Left out: pickled weights, quantised weights, tokenizers other than BPE, and chat templates as programs (four
formats are built in and recognised by their markers; a template found on disk is never executed).
"""
import base64
import heapq
import json
import os
import re
import shutil
import unicodedata
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import regex
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class InputError(Exception):
    """Bad input, in one line: what, where, what to do. main prints it to stderr and exits with code 2."""


def need(condition, message: str):
    if not condition:
        raise InputError(message)


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} if there is no such file."""
    try:
        value = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    need(isinstance(value, dict), f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


SETTINGS = {  # --model NAME -> its own defaults for dice.Settings
    "tiny": dict(temperature=1.0, top_p=0.9, max_new_tokens=96, rows=512, chunk=256, batch=16, steps=32,
                 epochs=2, lr=6e-5, warmup=0, sft_steps=1400, sft_lr=6e-3, dpo_steps=128, dpo_lr=5e-5,
                 train_tokens=8192),
}


def resolve(name: str) -> Path:
    """What `--model` was given -> a local directory. Today: an existing directory with a config.json."""
    path = Path(name).expanduser()
    need((path / "config.json").is_file(), f"{name}: not a model directory (no config.json in it); "
                                           "give a directory in Hugging Face format")
    return path


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
            need(window >= context, f"{path}: sliding_window {window} is shorter than the context {context}, "
                                    "and attention here sees everything; set max_position_embeddings to "
                                    f"{window} to use the first window, where the two are the same")
        bias = kind == "llama" and flag("attention_bias")
        theta, scaling = rotary(raw, path)
        config = Config(
            size("vocab_size"), context, size("num_hidden_layers", most=4096), width, heads, kv_heads,
            head_size, size("intermediate_size"), qkv_bias=bias or kind == "qwen2", out_bias=bias,
            mlp_bias=kind == "llama" and flag("mlp_bias"), tied=flag("tie_word_embeddings"),
            eps=positive(raw, "rms_norm_eps", path, 1e-6), rope_theta=theta, rope_scaling=scaling,
            labels=reward_labels(raw), pad=raw.get("pad_token_id"), raw=raw)
    each = width * 2 * (heads * config.head_size + config.hidden)
    need(config.layers * each + config.vocab_size * width < MOST_PARAMETERS,
         f"{path}: its sizes describe a network of more than {MOST_PARAMETERS:.0e} parameters")
    return config


def reward_labels(raw):
    """How many numbers a sequence classifier gives (a reward model one); None for a language model."""
    if not str(raw.get("architectures")).endswith("ForSequenceClassification']"):
        return None
    return len(raw["id2label"]) if isinstance(raw.get("id2label"), dict) else 2  # transformers' default


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

    It is written beside its final place, flushed, then renamed: a crash leaves nothing half-written under
    this name. Raises InputError if the directory exists, ValueError if `state` does not fit `config`.
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
    scratch = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    scratch.mkdir(parents=True)
    try:
        tokenizer.save(scratch)
        write_json(scratch / "config.json", bos | eos | fields)
        generation = read_json(scratch / "generation_config.json")
        known = generation.get("eos_token_id")
        if not set(tokenizer.stop_ids) <= set(known if isinstance(known, list) else [known]):
            write_json(scratch / "generation_config.json", bos | generation | eos)
        write_weights(scratch, config, state, dtype)
        for path in (*scratch.iterdir(), scratch):
            flush(path)
        os.rename(scratch, directory)
        flush(directory.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


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
        for split in self.splits[:-1]:
            sections = [match[0] for section in sections for match in split.finditer(section)]
        return [self.ids[rank] for section in sections for rank in self.ranks_of(section)]

    def ranks_of(self, text: str) -> list[int]:
        blanks = max(map(len, re.findall(r"\s+", text)), default=0) if len(text) > LONG_BLANK else 0
        lacking = self.absent and not {*self.absent}.isdisjoint(text.encode())
        if blanks < LONG_BLANK and not self.whole and not lacking:
            return self.tiktoken.encode_ordinary(text)
        ranks = []
        for match in self.splits[-1].finditer(text):
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
        self.vocab_size = 1 + max(*words, *control.values())
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
    files = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    need("tokenizer.json" in files or "tokenizer.model" in files,
         f"{directory}: no tokenizer.json and no tokenizer.model (Llama-3's rank file)")
    settings = read_json(directory / "special_tokens_map.json")
    settings |= read_json(directory / "tokenizer_config.json")
    named = {}
    for key in ("bos_token", "eos_token"):                     # "<s>" or {"content": "<s>", ...} or null
        token = settings.get(key)
        named[key] = str(token.get("content") if isinstance(token, dict) else token)
    if "tokenizer.json" in files:
        coder, words, control, bos, eos = read_tokenizer_json(directory / "tokenizer.json", named.values())
    else:
        coder, words, control, bos, eos = read_rank_file(directory / "tokenizer.model")
    stop_ids = [i for i in [control.get(named["eos_token"], eos)] if i is not None]
    for name in ("generation_config.json", "config.json"):
        ids = read_json(directory / name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        need(all(type(i) is int and i >= 0 for i in ids),
             f"{directory / name}: eos_token_id must be an id or a list of ids, not {str(ids)[:60]}")
        stop_ids += ids
    if chat == "auto":
        chat = recognise_chat(files, settings, directory)
    if chat == "plain" and named["bos_token"] in control:  # a base model starts anew: it has ended
        stop_ids.append(control[named["bos_token"]])
    need(chat in CHATS, f"chat format {chat!r} is unknown; choose one of auto, {', '.join(CHATS)}")
    return Tokenizer(coder, words, control, bos, stop_ids, chat, files)


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
    need(isinstance(vocab, dict) and vocab and len({*map(str, vocab.values())}) == len(vocab)
         and all(type(i) is int and 0 <= i < LARGEST for i in vocab.values()),
         f"{path}: model.vocab must map tokens to distinct ids")
    need(isinstance(added, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        and 0 <= token["id"] < LARGEST and vocab.get(token["content"], token["id"]) == token["id"]
        for token in added), f"{path}: added_tokens need a content and an id that agrees with the vocab")
    control = {name: vocab[name] for name in special if name in vocab}
    control |= {token["content"]: token["id"] for token in added}
    pieces = {token: i for token, i in vocab.items() if token not in control}
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
    need(len(before) <= 1 and all(type(i) is int for i in before),
         f"{path}: post_processor puts more than one token before a text")
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
