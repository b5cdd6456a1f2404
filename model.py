"""Which model: shapes, checkpoints on disk, tokenizers, chat formats. No network is computed here (see dice.py).

A checkpoint is a Hugging Face directory: config.json, safetensors, tokenizer files. Two families are read and
written, GPT-2 and Llama (2, 3, 3.1, 3.2, Mistral, Qwen2), and both become ONE `Config` and ONE set of parameter
names, the state_dict of `dice.Transformer`. What that network cannot compute is refused by name, never approximated.

Left out: pickled weights, quantised weights, tokenizers other than BPE, chat templates as programs (four formats
are built in and recognised by their markers; a template found on disk is never executed).
"""
import base64
import binascii
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


# ------------------------------------------------------------------------------------------- the shape of a network
@dataclass(frozen=True)
class Config:
    """The shape of a network. The two families differ by these fields, not by classes."""
    vocab_size: int
    context: int                      # positions the network can tell apart: prompt and answer must fit
    layers: int
    width: int
    heads: int
    kv_heads: int                     # < heads: grouped-query attention
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
    rope_scaling: dict | None = field(default=None, hash=False)            # Llama-3's four numbers, or None
    raw: dict = field(default_factory=dict, compare=False, repr=False)     # config.json as it was read


def parameter_shapes(config: Config) -> dict[str, tuple]:
    """Name -> shape of every parameter, in the order and with the names of `dice.Transformer`'s state_dict."""
    C, V, D = config.width, config.vocab_size, config.head_size
    linears = {"qkv": ((config.heads + 2 * config.kv_heads) * D, C, config.qkv_bias),
               "out": (C, config.heads * D, config.out_bias),
               "up": (config.hidden * (2 if config.mlp == "swiglu" else 1), C, config.mlp_bias),
               "down": (C, config.hidden, config.mlp_bias)}
    shapes = {"embed.weight": (V, C)}
    if config.position == "learned":
        shapes["position.weight"] = (config.context, C)

    def add_norm(name):
        shapes[f"{name}.weight"] = (C,)
        if config.norm == "layer":
            shapes[f"{name}.bias"] = (C,)

    def add_linear(name, rows, columns, bias):
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)

    for i in range(config.layers):
        for norm, first, second in (("norm1", "qkv", "out"), ("norm2", "up", "down")):
            add_norm(f"layers.{i}.{norm}")
            add_linear(f"layers.{i}.{first}", *linears[first])
            add_linear(f"layers.{i}.{second}", *linears[second])
    add_norm("norm")
    if not config.tied:
        shapes["head.weight"] = (V, C)
    return shapes


# ------------------------------------------------------------------------------------------------ config.json
LARGEST = 2 ** 24              # no size in a config is larger
MOST_PARAMETERS = 10 ** 13

# Fields that change what the network computes, with the only values that we compute (absent or null is fine).
ONLY = {
    "gpt2": {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "reorder_and_upcast_attn": (False,),
             "add_cross_attention": (False,), "quantization_config": ()},
    "llama": {"hidden_act": ("silu",), "partial_rotary_factor": (1,), "quantization_config": ()},
}
ONLY["mistral"] = ONLY["qwen2"] = ONLY["llama"]
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} if there is no such file. Raises InputError naming the file."""
    try:
        value = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


def resolve(name: str) -> Path:
    """What `--model` was given -> a local directory. Today: an existing directory with a config.json."""
    path = Path(name).expanduser()
    if not (path / "config.json").is_file():
        raise InputError(f"{name}: not a model directory (no config.json in it); "
                         "give a directory in Hugging Face format")
    return path


def read_config(directory) -> Config:
    """config.json of a gpt2, llama, mistral or qwen2 model -> Config. Raises InputError naming field and file."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: not found; a model directory holds config.json and *.safetensors")
    return parse_config(read_json(path), path)


def parse_config(raw: dict, path) -> Config:
    """The fields of a config.json -> Config; `path` is only for messages."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ONLY:
        raise InputError(f"{path}: model_type {str(kind)[:60]!r} is not supported; supported: {', '.join(ONLY)}")
    for key, values in ONLY[kind].items():
        if raw.get(key) is not None and raw[key] not in values:
            raise InputError(f"{path}: {key} {str(raw[key])[:60]!r} is not supported by this code")

    def get(key, default, good, what):
        value = default if raw.get(key) is None else raw[key]
        if not good(value):
            raise InputError(f"{path}: {key} must be {what}, not {str(value)[:60]!r}")
        return value

    def size(key, default=None, most=LARGEST):
        return get(key, default, lambda v: type(v) is int and 1 <= v <= most, f"a whole number from 1 to {most}")

    def flag(key, default=False):
        return get(key, default, lambda v: type(v) is bool, "true or false")

    if kind == "gpt2":
        width, heads = size("n_embd"), size("n_head")
        if width % heads:
            raise InputError(f"{path}: n_embd {width} is not a multiple of n_head {heads}")
        config = Config(size("vocab_size"), size("n_positions"), size("n_layer", most=4096), width, heads, heads,
                        width // heads, size("n_inner", 4 * width), "learned", "layer", "gelu", True, True, True,
                        flag("tie_word_embeddings", True), positive(raw, "layer_norm_epsilon", path, 1e-5), raw=raw)
    else:
        width, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads if kind == "llama" else None)
        if raw.get("head_dim") is None and width % heads:
            raise InputError(f"{path}: hidden_size {width} is not a multiple of num_attention_heads {heads}")
        head_size = size("head_dim", width // heads)
        if heads % kv_heads or head_size % 2:
            raise InputError(f"{path}: num_attention_heads {heads} must be a multiple of num_key_value_heads "
                             f"{kv_heads}, and the head size (head_dim) {head_size} must be even")
        context = size("max_position_embeddings")
        # Inside its first window, sliding-window attention IS full attention: so the window caps the context.
        if kind == "mistral" or (kind == "qwen2" and flag("use_sliding_window")):
            context = min(context, size("sliding_window", context))
        bias = kind == "llama" and flag("attention_bias")
        theta, scaling = rotary(raw, path)
        config = Config(size("vocab_size"), context, size("num_hidden_layers", most=4096), width, heads, kv_heads,
                        head_size, size("intermediate_size"), qkv_bias=bias or kind == "qwen2", out_bias=bias,
                        mlp_bias=kind == "llama" and flag("mlp_bias"), tied=flag("tie_word_embeddings"),
                        eps=positive(raw, "rms_norm_eps", path, 1e-6), rope_theta=theta, rope_scaling=scaling, raw=raw)
    each = config.width * (2 * config.heads * config.head_size + 2 * config.hidden)
    if config.layers * each + config.vocab_size * config.width > MOST_PARAMETERS:
        raise InputError(f"{path}: its sizes describe a network of more than {MOST_PARAMETERS:.0e} parameters")
    return config


def positive(fields, key, path, default=None):
    """fields[key], or the default where it is absent or null; InputError if that is not a positive number."""
    value = default if fields.get(key) is None else fields[key]
    if type(value) not in (int, float) or not 0 < value < 1e12:
        raise InputError(f"{path}: {key} must be a positive number, not {str(value)[:60]!r}")
    return value


def rotary(raw, path):
    """(rope_theta, rope_scaling) from `rope_theta` + `rope_scaling`, or from transformers 5's `rope_parameters`."""
    found = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(key) or {}, dict):
            raise InputError(f"{path}: {key} must be an object or null, not {str(raw[key])[:60]!r}")
        found |= raw.get(key) or {}
    kind = found.get("rope_type", found.get("type", "default"))
    per_layer = [key for key in found if isinstance(found[key], dict)]
    if kind not in ("default", "llama3") or per_layer or found.get("partial_rotary_factor", 1) != 1:
        raise InputError(f"{path}: rotary scaling {str(per_layer or kind)[:60]!r} is not supported; "
                         "supported: default and llama3, the same in every layer, over the whole head")
    theta = float(positive(found, "rope_theta", path, 10000.0))
    if kind == "default":
        return theta, None
    scaling = {key: positive(found, key, path) for key in LLAMA3_SCALING}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"{path}: rotary scaling needs low_freq_factor < high_freq_factor")
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
        written |= {"architectures": [f"{name}ForCausalLM"], "model_type": kind,
                    "max_position_embeddings": c.context, "hidden_size": c.width, "num_hidden_layers": c.layers,
                    "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_size,
                    "intermediate_size": c.hidden, "hidden_act": "silu", "rms_norm_eps": c.eps,
                    "attention_bias": c.out_bias, "mlp_bias": c.mlp_bias, "rope_theta": c.rope_theta,
                    "rope_scaling": c.rope_scaling and {"rope_type": "llama3", **c.rope_scaling}}
    else:
        raise InputError(f"no Hugging Face architecture has this shape, so it cannot be saved: {config}")
    replaced = ("rope_parameters", "sliding_window", "use_sliding_window", "layer_types")
    return {key: value for key, value in c.raw.items() if key not in replaced} | written


# ------------------------------------------------------------------------------------------------ weights
SHARD_BYTES = 5 * 10 ** 9
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GPT2 = {"embed": ["wte"], "position": ["wpe"], "norm": ["ln_f"], "norm1": ["ln_1"], "norm2": ["ln_2"],
        "qkv": ["attn.c_attn"], "out": ["attn.c_proj"], "up": ["mlp.c_fc"], "down": ["mlp.c_proj"]}
LLAMA = {"embed": ["embed_tokens"], "norm": ["norm"], "norm1": ["input_layernorm"],
         "norm2": ["post_attention_layernorm"], "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
         "out": ["self_attn.o_proj"], "up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"]}
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|h\.\d+\.attn\.(bias|masked_bias)$")      # in old files; no parameters


def stored_parts(config: Config, name: str, rows: int, bare=False) -> tuple[list[tuple[str, int]], bool]:
    """One of our parameters -> ([(Hugging Face name, its rows), ...], is it stored transposed?).

    Llama files hold q, k, v and gate, up separately: we stack their rows. GPT-2's linear layers ("Conv1D") are
    stored as (in, out), the transpose of torch's (out, in). bare: GPT-2 names without "transformer.".
    """
    *layer, module, kind = name.split(".")                    # "layers.3.qkv.weight" -> ["layers", "3"], "qkv", "weight"
    if module == "head":
        return [("lm_head.weight", rows)], False
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
    """safe_open, which validates the header; whatever is wrong with the file becomes an InputError naming it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: missing, cut short or damaged ({error}); fetch or convert it again") from None


def find_tensors(directory: Path) -> dict[str, tuple[Path, tuple, str]]:
    """Every tensor of a checkpoint, one file or sharded: name -> (file, shape, dtype). Reads headers only."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    listed = {}
    if not single.exists():
        if not index.exists():
            pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
            why = f"{pickled[0]} is a pickle, which can run code; convert it to safetensors" if pickled else \
                "no model.safetensors or model.safetensors.index.json"
            raise InputError(f"{directory}: {why}")
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise InputError(f"{index}: has no weight_map")
        for file in listed.values():
            if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*", file):
                raise InputError(f"{index}: {str(file)[:80]!r} is not a plain file name")
    tensors = {}
    for file in sorted(set(listed.values())) or [single.name]:
        with open_safetensors(directory / file) as opened:
            for name in opened.keys():
                if name in tensors:
                    raise InputError(f"{directory / file}: {name} is also in {tensors[name][0].name}")
                part = opened.get_slice(name)
                tensors[name] = directory / file, tuple(part.get_shape()), part.get_dtype()
    lost = sorted(listed.keys() - tensors.keys())
    if lost:
        raise InputError(f"{directory / listed[lost[0]]}: lacks {lost[0]}, which the index says it holds")
    return tensors


def read_weights(directory, config: Config, dtype=None) -> dict[str, torch.Tensor]:
    """The state_dict of a checkpoint under our names, on the CPU, as `dtype` (None: as stored).

    One tensor is read at a time, so the peak is one copy of the weights. Raises InputError for a damaged file and
    for missing, surplus or misshapen tensors, by name.
    """
    directory, shapes = Path(directory), parameter_shapes(config)
    tensors = find_tensors(directory)
    bare = config.position == "learned" and "wte.weight" in tensors
    plan = {name: stored_parts(config, name, shape[0], bare) for name, shape in shapes.items()}
    surplus = set(tensors) - {"lm_head.weight" if config.tied else ""}
    for name, (parts, transposed) in plan.items():
        for part, rows in parts:
            wanted = (rows, *shapes[name][1:])[::-1 if transposed else 1]
            path, shape, kind = tensors.get(part, (directory, None, None))
            if shape != wanted or kind not in FLOATS:
                problem = "is missing" if shape is None else f"has shape {shape} and type {kind}"
                raise InputError(f"{path}: {part} {problem}; config.json asks for {wanted}, floating point")
            surplus.discard(part)
    surplus = sorted(name for name in surplus if not BUFFERS.search(name))
    if surplus:
        raise InputError(f"{tensors[surplus[0]][0]}: {len(surplus)} tensors that config.json has no place for: "
                         f"{', '.join(surplus[:3])}")
    state = {}
    for name, (parts, transposed) in plan.items():
        state[name] = torch.empty(shapes[name], dtype=dtype or FLOATS[tensors[parts[0][0]][2]])
        for (part, _), out in zip(parts, state[name].split([rows for _, rows in parts])):
            with open_safetensors(tensors[part][0]) as file:
                tensor = file.get_tensor(part)
            out.copy_(tensor.T if transposed else tensor)
    return state


def write_checkpoint(directory, config: Config, state: dict[str, torch.Tensor], tokenizer, dtype=None):
    """Write a directory that transformers and vLLM load: config, weights (as `dtype`, None: as they are), tokenizer.

    It is written beside its final place, flushed, and renamed: a crash leaves no half-written checkpoint under this
    name. Raises InputError if the directory exists, ValueError if `state` does not fit `config`.
    """
    directory = Path(directory)
    if directory.exists():
        raise InputError(f"{directory}: already exists and is not overwritten; choose another place or remove it")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != parameter_shapes(config):
        wrong = sorted(shapes.items() ^ parameter_shapes(config).items())
        raise ValueError(f"state does not fit config: {wrong[:4]}")
    scratch = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp")
    scratch.mkdir(parents=True)
    try:
        tokenizer.save(scratch)
        write_weights(scratch, config, state, dtype)
        fields = config_json(config)
        name = str(dtype or state["embed.weight"].dtype).removeprefix("torch.")
        fields["dtype" if "dtype" in fields else "torch_dtype"] = name
        ids = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.stop_ids)}
        (scratch / "config.json").write_text(json.dumps(ids | fields, indent=2) + "\n")
        generation = read_json(scratch / "generation_config.json")
        known = generation.get("eos_token_id")
        if not set(tokenizer.stop_ids) <= set(known if isinstance(known, list) else [known]):
            text = json.dumps(ids | generation | {"eos_token_id": ids["eos_token_id"]}, indent=2)
            (scratch / "generation_config.json").write_text(text + "\n")
        for path in (*scratch.iterdir(), scratch):
            flush(path)
        os.rename(scratch, directory)
        flush(directory.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_weights(directory: Path, config: Config, state, dtype):
    """model.safetensors, or shards of at most SHARD_BYTES and their index."""
    shards, sizes = [[]], [0]                                  # per shard: (stored name, our name, first row, rows, .T)
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
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def flush(path: Path):
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ byte-pair encoding
def bpe(symbols: list, merges: dict, never=None) -> list:
    """Join the adjacent pair that stands first in `merges`, the leftmost of equals, until no pair is left.

    symbols: ids; merges: {(left id, right id): (rank, joined id)}; `never`: a joined id not to make.
    A heap over a linked list, O(n log n): a prompt may be megabytes of one "word".
    """
    n = len(symbols)
    symbols = [*symbols, None]                                  # None: the end, and later the right half of a join
    after, before = list(range(1, n + 1)), list(range(-1, n))
    heap = []                                                   # rank * n + position, as one number

    def push(i):
        found = merges.get((symbols[i], symbols[after[i]]))
        if found and found[1] != never:
            heapq.heappush(heap, found[0] * n + i)

    for i in range(n):
        push(i)
    while heap:
        rank, i = divmod(heapq.heappop(heap), n)
        found = merges.get((symbols[i], symbols[after[i]])) if symbols[i] is not None else None
        if not found or found[0] != rank:                       # one of the two was joined to another meanwhile
            continue
        gone = after[i]
        symbols[i], symbols[gone], after[i] = found[1], None, after[gone]
        before[after[i]] = i
        push(i)
        if before[i] >= 0:
            push(before[i])
    return [symbol for symbol in symbols if symbol is not None]


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LONG_SPACE = 500_000           # tiktoken panics on a run of a million blanks (its regex engine's stack)


class ByteLevelBPE:
    """Text -> pieces by regular expressions -> bytes -> BPE, by tiktoken. GPT-2, Llama-3, Qwen2, SmolLM2."""
    every_section = False      # SentencePieceBPE's word for: each stretch between control tokens starts with "▁"

    def __init__(self, ranks: dict[bytes, int], ids, whole: dict[bytes, int], patterns: list[str], nfc: bool):
        """ranks: tiktoken's, ids: rank -> our id, whole: ids of tokens that only a whole piece becomes."""
        self.ids, self.whole, self.nfc = ids, whole, nfc
        self.absent = bytes(b for b in range(0xF5) if b not in (0xC0, 0xC1) and bytes([b]) not in ranks)
        # What a pattern does not match is a piece of its own too: tiktoken would drop it.
        patterns = [rf"(?:{p})|(?:(?!{p})[\s\S])+" for p in patterns]
        self.splits = [regex.compile(p) for p in patterns]
        self.tiktoken = tiktoken.Encoding("", pat_str=patterns[-1], mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str, start=True) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        sections = [text]
        for split in self.splits[:-1]:
            sections = [match[0] for section in sections for match in split.finditer(section)]
        return [self.ids[rank] for section in sections for rank in self.ranks_of(section)]

    def ranks_of(self, text: str) -> list[int]:
        blanks = max(map(len, re.findall(r"\s+", text)), default=0) if len(text) > LONG_SPACE else 0
        if blanks < LONG_SPACE and not self.whole and not (self.absent and set(text.encode()) & set(self.absent)):
            return self.tiktoken.encode_ordinary(text)
        ranks = []
        for match in self.splits[-1].finditer(text):
            piece = match[0].encode()
            kept = piece.translate(None, self.absent)          # bytes without a token are dropped, as elsewhere
            if piece in self.whole:
                ranks.append(self.whole[piece])
            elif kept:
                ranks += self.tiktoken._encode_single_piece(kept)
        return ranks


def byte_level_ranks(words: dict[bytes, int], merges: dict, ignore_merges: bool):
    """Vocabulary and merge list -> (tiktoken's ranks, rank -> id, whole pieces): the same ids for every text.

    Subtle. Hugging Face joins listed PAIRS; tiktoken joins any neighbours whose union is a token. Both agree if
    tiktoken is given just the tokens that the merges make out of the token's own bytes, ranked by the pair that
    completes it: while nothing was joined across a token's ends, its inside went through the same joins as alone, so
    the only two halves that can ever meet are that pair. A token that ends alone as three or more parts never meets
    as two halves and is harmless; one that ends as two would be joined wrongly, and is kept out (`whole`).
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
    order = [*sorted(made, key=made.get), *alone]
    ids = [words[word] for word in order + whole]
    return {word: rank for rank, word in enumerate(order)}, ids, {w: len(order) + n for n, w in enumerate(whole)}


class SentencePieceBPE:
    """BPE over the characters of the whole text, blanks written "▁", unknown characters as bytes. Llama-2, Mistral."""

    def __init__(self, pieces: dict[str, int], merges: dict, prefix: str, split: bool):
        """prefix: when "▁" is put before a text: "legacy" (always), "always" (unless there), "first", "never"."""
        self.pieces, self.merges, self.prefix, self.split = pieces, merges, prefix, split
        self.every_section = prefix in ("legacy", "always")
        self.bytes = [pieces[f"<0x{b:02X}>"] for b in range(256)]
        names = {i: piece for piece, i in pieces.items()}
        # Characters that meet inside no join: the text may be cut between them, and short cuts be remembered.
        self.meet = {names[left][-1] + names[right][0] for left, right in merges}
        self.short = lru_cache(2 ** 16)(self.join)

    def encode(self, text: str, start=True) -> list[int]:
        text = text.replace(" ", "▁")
        if text and start and (self.prefix == "legacy" or (self.prefix != "never" and text[0] != "▁")):
            text = "▁" + text
        ids, first = [], 0
        for i in range(1, len(text) + 1):
            if i == len(text) or text[i - 1:i + 1] not in self.meet or (self.split and text[i] == "▁"):
                ids += (self.short if i - first < 50 else self.join)(text[first:i])
                first = i
        return ids

    def join(self, text: str) -> list[int]:
        symbols = []
        for character in text:
            known = self.pieces.get(character)
            symbols += [self.bytes[b] for b in character.encode()] if known is None else [known]
        return bpe(symbols, self.merges)


# ------------------------------------------------------------------------------------------------ tokenizers
CHATS = ("llama3", "zephyr", "chatml", "plain")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "tokenizer.model", "chat_template.jinja", "generation_config.json", "vocab.json", "merges.txt")
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]      # bytes that GPT-2's alphabet shows as themselves
LETTERS = {chr(b): b for b in BYTES} | {chr(256 + n): b for n, b in enumerate(sorted(set(range(256)) - set(BYTES)))}


class Tokenizer:
    """Text <-> ids, and chat messages -> ids. Text never becomes an added (control) token, whatever it contains.

    bos: put first, or None; end: closes every answer; stop_ids: what ends a sample, `end` among them.
    """

    def __init__(self, coder, words: dict[int, bytes], control: dict[str, int], bos, eos, chat, stop_ids, files):
        """words: id -> bytes of what decode shows; control: content -> id of the tokens that text never becomes."""
        self.coder, self.control, self.bos, self.eos, self.chat, self.files = coder, control, bos, eos, chat, files
        self.end = self.control_id({"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}.get(chat), eos)
        self.stop_ids = tuple(dict.fromkeys([self.end, *stop_ids]))
        self.words = {i: word for i, word in words.items() if i not in self.stop_ids and i != bos}
        self.vocab_size = 1 + max(*words, *control.values())
        self.frame("user")                                     # every control token of the format is there

    def control_id(self, content, default=None) -> int:
        found = self.control.get(content, default) if content else default
        if found is None:
            raise InputError(f"the tokenizer has no {content or 'end-of-text token'}, which the {self.chat} chat "
                             "format needs; choose another with --chat")
        return found

    def encode(self, text: str, start=True) -> list[int]:
        """Ids of plain text. start=False: it continues earlier text (no "▁" put before it)."""
        # A surrogate half is no character and has no UTF-8: it becomes U+FFFD.
        return self.coder.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), start)

    def decode(self, ids) -> str:
        """Text of ids, nothing stripped; control and unknown ids are left out, broken UTF-8 becomes U+FFFD."""
        return b"".join(self.words.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def raw(self, text: str) -> list[int]:
        """Ids of a text to be continued, without a chat format."""
        return [self.bos] * (self.bos is not None) + self.encode(text)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer as it follows prompt(...), with the end token."""
        return self.encode(text, start=False) + [self.end]

    def prompt(self, messages) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins.

        messages: one user message, or a list of {"role": system, user or assistant, "content": text}.
        """
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        parts = [] if self.bos is None else [self.bos]
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise InputError(f"a message needs a role (system, user, assistant) and a text: {str(message)[:80]}")
            before, after = self.frame(role)
            parts += [*before, content.strip() if self.chat == "llama3" else content, *after]
        parts += self.frame("assistant")[0]
        ids, text, start = [], "", True                        # text between two control tokens is encoded in one go
        for part in [*parts, None]:
            if isinstance(part, str):
                text += part
                continue
            ids += self.encode(text, start) if text else []
            start = self.coder.every_section or (start and not text and not ids)
            ids, text = ids + [part] * (part is not None), ""
        return ids

    def frame(self, role: str) -> tuple[list, list]:
        """What stands before and after a message: str is text, int a control token.

        As the models' own templates, but without the dates and system prompts that some of them invent.
        """
        if self.chat == "llama3":
            return [self.control_id("<|start_header_id|>"), role, self.control_id("<|end_header_id|>"), "\n\n"], [self.end]
        if self.chat == "chatml":
            return [self.control_id("<|im_start|>"), f"{role}\n"], [self.end, "\n"]
        if self.chat == "zephyr":                              # ordinary text for Zephyr, a token for some others
            return [self.control.get(f"<|{role}|>", f"<|{role}|>"), "\n"], [self.end, "\n"]
        return [], ["\n"]

    def save(self, directory):
        """Write the files that the tokenizer was read from, byte for byte."""
        for name, content in self.files.items():
            (Path(directory) / name).write_bytes(content)


def read_tokenizer(directory, chat="auto") -> Tokenizer:
    """The tokenizer of a model directory: tokenizer.json (BPE), or Llama-3's rank file tokenizer.model.

    chat: auto (recognise the template), llama3, zephyr, chatml or plain. Raises InputError naming file and fault.
    """
    directory = Path(directory)
    files = {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()}
    settings = read_json(directory / "special_tokens_map.json") | read_json(directory / "tokenizer_config.json")
    if "tokenizer.json" in files:
        reader, path = read_tokenizer_json, directory / "tokenizer.json"
    elif "tokenizer.model" in files:
        reader, path = read_rank_file, directory / "tokenizer.model"
    else:
        raise InputError(f"{directory}: no tokenizer.json and no tokenizer.model (Llama-3's rank file)")

    def named(key):                                            # "<s>" or {"content": "<s>", ...} or null
        token = settings.get(key)
        return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None

    coder, words, control, bos, eos = reader(path, [name for name in (named("bos_token"), named("eos_token")) if name])
    if isinstance(settings.get("add_bos_token"), bool):
        bos = control.get(named("bos_token"), bos) if settings["add_bos_token"] else None
    stops = []
    for name in ("generation_config.json", "config.json"):
        ids = read_json(directory / name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise InputError(f"{directory / name}: eos_token_id must be an id or a list of ids, not {str(ids)[:60]}")
        stops += ids
    eos = control.get(named("eos_token"), eos if eos is not None else stops[0] if stops else None)
    if chat == "auto":
        chat = recognise_chat(files, settings, directory)
    if chat not in CHATS:
        raise InputError(f"chat format {chat!r} is unknown; choose one of {', '.join(CHATS)} or auto")
    return Tokenizer(coder, words, control, bos, eos, chat, stops + [eos] * (eos is not None), files)


def recognise_chat(files, settings, directory) -> str:
    """The chat format by its markers in the template, which is never executed."""
    template = settings.get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode("utf-8", "replace")
    if isinstance(template, list):                             # several templates: [{"name": ..., "template": ...}]
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), "?")
    if not template:
        return "plain"
    markers = {"llama3": ("<|start_header_id|>", "<|eot_id|>"), "chatml": ("<|im_start|>", "<|im_end|>"),
               "zephyr": ("<|user|>", "<|assistant|>", "eos_token")}
    found = [chat for chat, all_of in markers.items() if all(marker in str(template) for marker in all_of)]
    if len(found) != 1 or "<|end|>" in str(template):          # <|end|>: Phi-3, otherwise like Zephyr
        raise InputError(f"{directory}: its chat template is none of {', '.join(CHATS)}; choose one with --chat")
    return found[0]


def read_rank_file(path: Path, _):
    """tokenizer.model of Llama-3: lines of "base64 rank", then 256 control tokens that the file does not list."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            word, rank = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise InputError(f"{path}: not a rank file of Llama-3 (a SentencePiece model? convert it to tokenizer.json)") \
            from None
    n = len(ranks)
    if sorted(ranks.values()) != list(range(n)) or any(bytes([b]) not in ranks for b in range(256)):
        raise InputError(f"{path}: ranks must be 0, 1, 2, ... without gaps and cover all 256 bytes")
    names = ["<|begin_of_text|>", "<|end_of_text|>", *["<|reserved_special_token_{}|>"] * 4, "<|start_header_id|>",
             "<|end_header_id|>", "<|reserved_special_token_{}|>", "<|eot_id|>", *["<|reserved_special_token_{}|>"] * 246]
    reserved = iter(range(256))
    control = {name.format(next(reserved)) if "{" in name else name: n + i for i, name in enumerate(names)}
    coder = ByteLevelBPE(ranks, range(n), {}, [LLAMA3_PATTERN], nfc=False)
    return coder, {i: word for word, i in ranks.items()}, control, n, n + 1


def read_tokenizer_json(path: Path, special: list[str]):
    """tokenizer.json with a BPE model -> (coder, id -> bytes, control tokens, bos or None, None).

    special: contents that tokenizer_config.json declares as control tokens in addition.
    """
    data = read_json(path)

    def need(condition, what):
        if not condition:
            raise InputError(f"{path}: {what}")

    bpe_model = data.get("model")
    need(isinstance(bpe_model, dict) and bpe_model.get("type", "BPE") == "BPE", "its model is not BPE; only BPE is supported")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        need(not bpe_model.get(key), f"model.{key} {str(bpe_model.get(key))[:40]!r} is not supported")
    vocab, listed, added = bpe_model.get("vocab"), bpe_model.get("merges"), data.get("added_tokens") or []
    need(isinstance(vocab, dict) and isinstance(listed, list) and isinstance(added, list) and vocab
         and all(type(i) is int and 0 <= i < LARGEST for i in vocab.values())
         and len(set(vocab.values())) == len(vocab), "vocab must map tokens to distinct ids, and merges be a list")
    control, shown = {name: vocab[name] for name in special if name in vocab}, {}
    for token in added:
        content, i = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
        need(isinstance(content, str) and type(i) is int and 0 <= i < LARGEST and vocab.get(content, i) == i,
             f"added token {str(token)[:60]} needs a content and an id")
        control[content] = i
        if not token.get("special"):
            shown[i] = content.encode("utf-8", "replace")      # such as <tool_call>: decode shows it
    pieces = {token: i for token, i in vocab.items() if token not in control}
    merges = {}
    for rank, pair in enumerate(listed):
        pair = pair.split(" ") if isinstance(pair, str) else pair
        need(isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p in vocab for p in pair)
             and "".join(pair) in vocab, f"merge {rank} {str(pair)[:60]} does not join two tokens to a token")
        left, right = pair
        if left in pieces and right in pieces and left + right in pieces:
            merges[pieces[left], pieces[right]] = rank, pieces[left + right]

    def steps(key, inner):                                     # a Sequence, or a single step, or null
        step = data.get(key) or {"type": "Sequence", inner: []}
        found = step.get(inner, []) if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
        need(isinstance(found, list) and all(isinstance(s, dict) for s in found), f"{key} is damaged")
        return found

    normalizers, splitters = steps("normalizer", "normalizers"), steps("pre_tokenizer", "pretokenizers")
    if any(step.get("type") == "ByteLevel" for step in splitters):
        coder, words = byte_level(pieces, merges, bpe_model, normalizers, splitters, need)
    else:
        coder, words = sentence_piece(pieces, merges, bpe_model, normalizers, splitters, need)
    return coder, words | shown, control, template_bos(steps("post_processor", "processors"), need), None


def template_bos(processors, need):
    """The id that the post-processor puts before a text, or None. (One after it is left out: `end` is ours to add.)"""
    bos = None
    for step in processors:
        need(step.get("type") in ("TemplateProcessing", "ByteLevel"), f"post_processor {step.get('type')} is not supported")
        for item in step.get("single") or []:
            if not isinstance(item, dict) or "SpecialToken" not in item:
                break
            try:
                ids = step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
            except (KeyError, TypeError):
                ids = None
            need(bos is None and isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int,
                 "post_processor must put at most one token before a text")
            bos = ids[0]
    return bos


def byte_level(pieces, merges, bpe_model, normalizers, splitters, need):
    """(ByteLevelBPE, id -> bytes) from the parts of a tokenizer.json."""
    for step in normalizers:
        need(step.get("type") == "NFC", f"normalizer {step.get('type')} is not supported with byte-level BPE")
    patterns = []
    for step in splitters:
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == "Split" and isinstance(pattern, dict) and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(str(pattern["Regex"]) if "Regex" in pattern else re.escape(str(pattern.get("String"))))
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "ByteLevel" and step is splitters[-1] and not step.get("add_prefix_space", True):
            patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
        else:
            need(False, f"pre_tokenizer step {str(step)[:100]} is not supported")
    words = {i: bytes(LETTERS[c] for c in piece) if set(piece) <= LETTERS.keys() else piece.encode("utf-8", "replace")
             for piece, i in pieces.items()}
    spelled = {words[i]: i for piece, i in pieces.items() if piece and set(piece) <= LETTERS.keys()}
    try:
        parts = byte_level_ranks(spelled, merges, bool(bpe_model.get("ignore_merges")))
        coder = ByteLevelBPE(*parts, patterns or [r"[\s\S]+"], nfc=bool(normalizers))
    except (ValueError, regex.error) as error:
        need(False, f"pre_tokenizer pattern cannot be used ({str(error)[:80]})")
    need(not coder.absent or bpe_model.get("unk_token") is None, "its vocabulary lacks bytes and has an unk_token")
    return coder, words


def sentence_piece(pieces, merges, bpe_model, normalizers, splitters, need):
    """(SentencePieceBPE, id -> bytes) from the parts of a tokenizer.json."""
    byte_tokens = {f"<0x{b:02X}>": b for b in range(256)}
    need(bpe_model.get("byte_fallback") is True and byte_tokens.keys() <= pieces.keys(),
         "neither byte-level BPE nor BPE with byte_fallback and its 256 byte tokens")
    need(not bpe_model.get("ignore_merges"), "ignore_merges is not supported with byte_fallback")
    fallback = {pieces[token] for token in byte_tokens}
    need(all(fallback.isdisjoint(pair) for pair in merges), "a merge of byte tokens (<0x..>) is not supported")
    prefix, split, blanks = "never", False, False
    for step in normalizers:
        if step.get("type") == "Prepend" and step.get("prepend") == "▁" and prefix == "never":
            prefix = "legacy"
        else:
            need(step.get("type") == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == "▁",
                 f"normalizer step {str(step)[:80]} is not supported")
            blanks = True
    for step in splitters:
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        need(step.get("type") == "Metaspace" and step.get("replacement") == "▁" and len(splitters) == 1
             and scheme in ("first", "always", "never") and not normalizers,
             f"pre_tokenizer step {str(step)[:80]} is not supported")
        prefix, split, blanks = scheme, step.get("split", True), True
    need(blanks, 'nothing replaces " " by "▁"')
    words = {i: bytes([byte_tokens[piece]]) if piece in byte_tokens else piece.replace("▁", " ").encode("utf-8", "replace")
             for piece, i in pieces.items()}
    return SentencePieceBPE(pieces, merges, prefix, split), words
