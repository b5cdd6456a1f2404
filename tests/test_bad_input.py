"""Bad input: whatever the bytes, a loader returns or raises InputError; and what odd texts and rewards do."""

import copy
import json
import math
import pickle
import re
import resource
import shutil
import struct
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_dice import answers, checkpoint, refused, rows_of, settings, small_world
from test_losses import write_reward_model
from test_model import CHATML_TEMPLATE, GPT2, LLAMA, byte_level, header, random_state, sentence_piece

import dice
import model as models
from data import jsonl, tiny
from model import InputError

assert checkpoint and small_world  # fixtures
SOURCES = [path for path in Path(dice.__file__).parent.rglob("*.py") if "tests" not in path.parts]


def fuzz(count):
    """Settings of a fuzz test: so many examples, however slow the machine."""
    return examples(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


@contextmanager
def bounded(seconds=20, megabytes=500):
    """What happens inside takes no longer, and needs no more memory."""

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    start, before = time.monotonic(), peak()
    yield
    assert time.monotonic() - start < seconds and peak() - before < megabytes


def loaded(load, *names):
    """What load() returns; None if it refuses in one short line that says which file (one of names)."""
    with bounded():
        try:
            return load()
        except InputError as error:
            [line] = str(error).splitlines()
            assert any(name in line for name in names) and len(line) < 1000, line
            assert line.isprintable() or any(not name.isprintable() for name in names), line
            return None


# ------------------------------------------------------------------------------------- mutations

DEPTHS = (3, 150, 900, 100_000)
ODD_TEXT = ["", " ", "\x00", "a\nb", "\ud800", "\u202eabc", "../x", "e\u0301", "\U0010ffff", "x" * 5000,
            "Sequence", "Split", "ByteLevel", "Digits", "Metaspace", "NFC", "BPE", "default", "llama3", "gpt2",
            "LlamaForSequenceClassification", "<|endoftext|>", "</s>", "a b", "▁", "F32", "I8", "F4",
            "[a-z]+", "x*", "(?=a)", "(a+)+b", "([", "(?P<n>", "a{9}{9}", "[[:x:]]"]  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(ODD_TEXT)
    | st.text(max_size=4) | st.sampled_from([2**31, 2**53, 2**63, 2**64, -(2**63), 10**400, 1e300, 256, 259])
    | st.sampled_from([f"{name} {depth}" for name in ("LISTS", "OBJECTS") for depth in DEPTHS])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["type", "id", "content", "pattern", "Regex", "String"]), inner, max_size=3),
    max_leaves=4,
)


def dumped(tree):
    """JSON of a tree in which "LISTS 900" stands for 900 lists, each in the other."""
    ends = {"LISTS": ("[", "]"), "OBJECTS": ('{"a":', "}")}
    text = json.dumps(tree)
    text = re.sub(r'"(LISTS|OBJECTS) (\d+)"(?!:)',
                  lambda m: ends[m[1]][0] * int(m[2]) + "1" + ends[m[1]][1] * int(m[2]), text)  # fmt: skip
    return text.encode()


@st.composite
def mutated(draw, tree, most=3):
    """The tree with up to so many of its nodes replaced, deleted, put twice, retyped, wrapped or swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(node[key], (dict, list)) or not node[key] or draw(st.integers(0, 3)) == 0:
                change(draw, node, key)
                break
            node = node[key]
    return tree


def change(draw, node, key):
    """One mutation of the child `key` of a JSON list or object."""
    old = node[key]
    kind = draw(st.sampled_from(["replace", "replace", "delete", "retype", "wrap", "add", "swap", "number"]))
    if kind == "delete":
        del node[key]
    elif kind == "add" and isinstance(node, list):
        node.insert(key, copy.deepcopy(draw(st.sampled_from(node) | VALUES)))
    elif kind == "add":
        node[draw(st.sampled_from(ODD_TEXT) | st.text(max_size=3))] = draw(st.just(old) | VALUES)
    elif kind == "retype":
        node[key] = draw(st.sampled_from([str(old)[:100], [old], {"a": old}, bool(old), str(old)[:100].encode().hex()]))
    elif kind == "wrap":
        node[key] = [old, old]
    elif kind == "swap":
        other = draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
        node[key], node[other] = node[other], old
    elif kind == "number" and type(old) in (int, float) and abs(old) < 1e300:
        node[key] = draw(st.sampled_from([-old, old + 1, old - 1, old * 2, float(old), -1, 0, 2**40, math.nan]))
    else:
        node[key] = draw(VALUES)


@st.composite
def damaged(draw, data):
    """Bytes with a few of them changed, cut out or put in, or cut short, or with more behind them."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data) + draw(st.sampled_from([b"", b"", b"\0", b"}", b"x" * 99]))


# ------------------------------------------------------------------------------------- config.json

CONFIGS = {
    "llama": models.config_json(LLAMA) | {"head_dim": 4, "sliding_window": None, "eos_token_id": [1, 2]},
    "gpt2": models.config_json(GPT2),
    "qwen2": {"model_type": "qwen2", "vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 64,
              "max_position_embeddings": 64, "use_sliding_window": False,
              "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "reward": {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"},
               "pad_token_id": 0} | models.config_json(LLAMA),
}  # fmt: skip
CONFIGS["reward"]["architectures"] = ["LlamaForSequenceClassification"]


def use(config):
    """A Config that was read can be compared, hashed, written back and asked for its shapes."""
    assert hash(config) == hash(config) and config == config
    assert all(type(n) is int and n > 0 for shape in models.parameter_shapes(config).values() for n in shape)
    assert config.labels is None or type(config.labels) is int
    assert config.pad is None or type(config.pad) is int
    json.dumps(models.config_json(config), indent=2)


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_config_is_read_or_refused(kind, tmp_path):
    @fuzz(60)
    @given(mutated(CONFIGS[kind]).map(dumped) | damaged(dumped(CONFIGS[kind])))
    def check(content):
        (tmp_path / "config.json").write_bytes(content)
        config = loaded(lambda: models.read_config(tmp_path), str(tmp_path / "config.json"))
        if config:
            use(config)

    check()


# ------------------------------------------------------------------------------------- safetensors


def split_header(data):
    """(the JSON header of a safetensors file, the bytes behind it)"""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


@st.composite
def safetensors_files(draw, data):
    """A valid file, its header changed in any of the ways a header can lie."""
    tree, tensors = split_header(data)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(tree)))
        other = tree[draw(st.sampled_from(sorted(tree)))]
        entry = tree[name]
        size = len(tensors)
        number = st.integers(-1, size + 9) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**30])
        lie = draw(st.sampled_from(["dtype", "shape", "data_offsets", "overlap", "name", "any"]))
        if lie == "dtype":
            entry[lie] = draw(st.sampled_from(["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32"]))
        elif lie == "shape":
            entry[lie] = draw(st.lists(number, max_size=4) | st.just(entry.get("shape", [])[::-1]))
        elif lie == "data_offsets":
            entry[lie] = draw(st.lists(number, min_size=1, max_size=3))
        elif lie == "overlap":
            entry["data_offsets"] = other.get("data_offsets")
        elif lie == "name":
            tree[draw(st.sampled_from(ODD_TEXT) | st.text(max_size=3))] = tree.pop(name)
        else:
            tree = draw(mutated(tree, 1))
            if not tree or not all(isinstance(part, dict) for part in tree.values()):
                break
    text = dumped(tree)
    if draw(st.integers(0, 4)) == 0:  # the same name twice
        text = text[:-1] + b"," + text[1:]
    length = draw(st.none() | st.none() | st.none() | st.integers(0, 2 * len(text)) | st.sampled_from([2**40, 2**64 - 1]))
    return header(text, length, tensors[: draw(st.none() | st.none() | st.integers(0, len(tensors)))])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint of random weights, small, that the tests below may write over."""
    directory = tmp_path_factory.mktemp("plain")
    tokenizer = models.read_tokenizer(byte_level(directory / "t"))
    models.write_checkpoint(directory / "m", LLAMA, random_state(LLAMA), tokenizer)
    return directory / "m"


def test_any_safetensors_file_is_read_or_refused(plain, tmp_path):
    whole = (plain / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"

    @fuzz(250)
    @given(safetensors_files(whole) | damaged(whole))
    def check(content):
        file.write_bytes(content)
        state = loaded(lambda: models.read_weights(tmp_path, LLAMA), str(file), f"{tmp_path}: ")
        if state:
            assert {name: tuple(x.shape) for name, x in state.items()} == models.parameter_shapes(LLAMA)

    check()


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1])
def test_a_header_that_announces_terabytes_is_refused_at_once(length, plain, tmp_path):
    whole = (plain / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + whole[8:])
    with bounded(2, 50), pytest.raises(InputError, match="model.safetensors"):
        models.read_weights(tmp_path, LLAMA)
    tree, tensors = split_header(whole)  # tensors of terabytes
    tree["model.norm.weight"] |= {"shape": [length // 8], "data_offsets": [0, length // 2]}
    (tmp_path / "model.safetensors").write_bytes(header(tree, None, tensors))
    with bounded(2, 50), pytest.raises(InputError, match="model.safetensors"):
        models.read_weights(tmp_path, LLAMA)


def test_any_index_is_read_or_refused_and_stays_in_its_directory(tmp_path):
    directory, outside = tmp_path / "m", tmp_path / "outside.safetensors"
    directory.mkdir()
    save_file({"a": torch.ones(1)}, outside)
    save_file({"b": torch.ones(1), "c": torch.ones(2)}, directory / "one.safetensors")
    save_file({"d": torch.ones(1)}, directory / "two.safetensors")
    index = {"metadata": {"total_size": 16}, "weight_map": {
        "b": "one.safetensors", "c": "one.safetensors", "d": "two.safetensors"}}  # fmt: skip
    names = ["../outside.safetensors", str(outside), "x/../../outside.safetensors", "..\\outside.safetensors",
             "./one.safetensors", ".", "..", "\x00", "one.safetensors\x00", "x" * 5000, "a\nb", "\ud800"]  # fmt: skip
    retold = st.dictionaries(st.sampled_from("abcd") | st.text(max_size=3),
                             st.sampled_from([*names, "one.safetensors", "two.safetensors"]), max_size=4)  # fmt: skip

    @fuzz(150)
    @given(mutated(index) | retold.map(lambda found: {"weight_map": found}))
    def check(tree):
        (directory / "model.safetensors.index.json").write_bytes(dumped(tree))
        tensors = loaded(lambda: models.find_tensors(directory), str(directory))
        for file, _, _ in (tensors or {}).values():
            assert file.parent == directory and file.name in ("one.safetensors", "two.safetensors")

    check()


# ------------------------------------------------------------------------------------- tokenizers

TEXTS = ["", "the cat", " a\n\n1234 don't", "\x00\ud800é日👍 \u202eشלום", "<|endoftext|></s><s><tool>", "a" * 60 + "b"]
BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "B"}}, {"Sequence": {"id": "A"}}],
       "special_tokens": {"B": {"id": "B", "ids": [260], "tokens": ["B"]}}}  # fmt: skip
SPLIT = {"type": "Split", "pattern": {"Regex": "[a-z]+|[0-9]"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
TOKENIZERS = {
    "byte level": lambda directory: byte_level(directory),
    "all of it": lambda directory: byte_level(
        directory, normalizer={"type": "NFC"}, post_processor=BOS, ignore_merges=True, extra=("cat",),
        pre_tokenizer={"type": "Sequence", "pretokenizers": [SPLIT, {"type": "Digits", "individual_digits": True},
                                                             BYTES]}),
    "sentence piece": lambda directory: sentence_piece(directory),
    "tiny": lambda directory: tiny.write_tokenizer(directory) or directory,
}  # fmt: skip


def encode_and_decode(tokenizer):
    """What a tokenizer makes of a few texts: ids that it has, and no control token among them."""
    for text in TEXTS:
        ids = loaded(lambda: tokenizer.encode(text), "pattern")
        if ids is None:
            return
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        assert not {*tokenizer.control.values()} & {*ids}
        assert isinstance(tokenizer.decode(ids), str)
        for whole in (tokenizer.prompt(text), tokenizer.answer(text)):
            assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in whole)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_tokenizer_json_is_read_or_refused(kind, tmp_path):
    path = TOKENIZERS[kind](tmp_path) / "tokenizer.json"
    tree = json.loads(path.read_text())
    pieces = [tree[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor") if tree[key]]

    @st.composite
    def one_part(draw):  # vocab and merges are most of the file, and the least interesting part
        part = draw(st.sampled_from(pieces))
        key = next(key for key in tree if tree[key] is part)
        return {**tree, key: draw(mutated(part))}

    @fuzz(100)
    @given((mutated(tree) | one_part()).map(dumped) | damaged(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        tokenizer = loaded(lambda: models.read_tokenizer(tmp_path), str(tmp_path))
        if tokenizer:
            encode_and_decode(tokenizer)

    check()


SIDE_FILES = {
    "generation_config.json": {"eos_token_id": [256, 259], "bos_token_id": 257, "temperature": 0.6},
    "tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>", "special": True}, "bos_token": "<s>",
                              "chat_template": CHATML_TEMPLATE, "added_tokens_decoder": {"5": {"content": "x"}}},
    "special_tokens_map.json": {"eos_token": "<|im_end|>", "bos_token": {"content": "<|endoftext|>"}},
    "config.json": {"eos_token_id": 257},
}  # fmt: skip


@pytest.mark.parametrize("name", SIDE_FILES)
def test_any_file_beside_the_tokenizer_is_read_or_refused(name, tmp_path):
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()

    @fuzz(80)
    @given(mutated(SIDE_FILES[name]).map(dumped) | damaged(dumped(SIDE_FILES[name])))
    def check(content):
        (tmp_path / name).write_bytes(content)
        tokenizer = loaded(lambda: models.read_tokenizer(tmp_path), str(tmp_path))
        if tokenizer:
            encode_and_decode(tokenizer)

    check()


@fuzz(60)
@given(damaged(b"".join(b"%s %d\n" % (__import__("base64").b64encode(bytes([i])), i) for i in range(256))))
def test_any_rank_file_is_read_or_refused(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp() / "ranks"
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(content)
    tokenizer = loaded(lambda: models.read_tokenizer(directory), str(directory))
    if tokenizer:
        encode_and_decode(tokenizer)
