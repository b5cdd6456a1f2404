"""Whatever the bytes, a loader returns or raises InputError; and what odd texts and rewards do to a run."""

import ast
import base64
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

import pytest
import torch
from hypothesis import HealthCheck, given
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
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**20 if sys.platform == "darwin" else 2**10
        )

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
            assert any(name in line for name in names) and len(line) < 1000 and line.isprintable(), line
            return None


# ------------------------------------------------------------------------------------- mutations

DEPTHS = (3, 150, 900, 100_000)
ODD_TEXT = ["", " ", "\x00", "a\nb", "\ud800", "\u202eabc", "../x", "e\u0301", "\U0010ffff", "x" * 5000,
            "Sequence",
            "Split", "ByteLevel", "Digits", "Metaspace", "NFC", "BPE", "default", "llama3", "gpt2",
            "LlamaForSequenceClassification", "<|endoftext|>", "</s>", "a b", "▁", "F32", "I8", "F4",
            "[a-z]+", "x*", "(?=a)", "(a+)+b", "([", "(?P<n>", "a{9}{9}", "[[:x:]]"]  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(ODD_TEXT)
    | st.text(max_size=4)
    | st.sampled_from([2**31, 2**53, 2**63, 2**64, -(2**63), 10**400, 1e300, 256, 259])
    | st.sampled_from([f"{name} {depth}" for name in ("LISTS", "OBJECTS") for depth in DEPTHS])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "id", "content", "pattern", "Regex", "String"]), inner, max_size=3
        )
    ),
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
    """The tree with up to so many of its nodes replaced, deleted, doubled, retyped or swapped."""
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
    kind = draw(
        st.sampled_from(["replace", "replace", "delete", "retype", "wrap", "add", "swap", "number"])
    )
    if kind == "delete":
        del node[key]
    elif kind == "add" and isinstance(node, list):
        node.insert(key, copy.deepcopy(draw(st.sampled_from(node) | VALUES)))
    elif kind == "add":
        node[draw(st.sampled_from(ODD_TEXT) | st.text(max_size=3))] = draw(st.just(old) | VALUES)
    elif kind == "retype":
        node[key] = draw(st.sampled_from([str(old)[:100], [old], {"a": old}, bool(old), len(str(old))]))
    elif kind == "wrap":
        node[key] = [old, old]
    elif kind == "swap":
        other = draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
        node[key], node[other] = node[other], old
    elif kind == "number" and type(old) in (int, float) and abs(old) < 1e300:
        node[key] = draw(
            st.sampled_from([-old, old + 1, old - 1, old * 2, float(old), -1, 0, 2**40, math.nan])
        )
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
              "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
              "sliding_window": 64, "max_position_embeddings": 64, "use_sliding_window": False,
              "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "reward": {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"},
               "pad_token_id": 0} | models.config_json(LLAMA),
}  # fmt: skip
CONFIGS["reward"]["architectures"] = ["LlamaForSequenceClassification"]


def use(config):
    """A Config that was read can be compared, hashed, written back and asked for its shapes."""
    assert hash(config) == hash(config) and config == config
    assert all(
        type(n) is int and n > 0 for shape in models.parameter_shapes(config).values() for n in shape
    )
    assert config.labels is None or type(config.labels) is int
    assert config.pad is None or type(config.pad) is int
    json.dumps(models.config_json(config), indent=2)


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_config_is_read_or_refused(kind, tmp_path):
    @fuzz(40)
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
        number = st.integers(-1, size + 9) | st.sampled_from(
            [2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**30]
        )
        lie = draw(st.sampled_from(["dtype", "shape", "data_offsets", "overlap", "name", "any"]))
        if lie == "dtype":
            entry[lie] = draw(
                st.sampled_from(["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32"])
            )
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
    length = draw(
        st.none()
        | st.none()
        | st.none()
        | st.integers(0, 2 * len(text))
        | st.sampled_from([2**40, 2**64 - 1])
    )
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

    @fuzz(150)
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
    names = ["../outside.safetensors", str(outside), "x/../../outside.safetensors",
             "..\\outside.safetensors", "./one.safetensors", ".", "..", "\x00", "one.safetensors\x00",
             "x" * 5000, "a\nb", "\ud800"]  # fmt: skip
    retold = st.dictionaries(st.sampled_from("abcd") | st.text(max_size=3),
                             st.sampled_from([*names, "one.safetensors", "two.safetensors"]),
                             max_size=4)  # fmt: skip

    @fuzz(60)
    @given(mutated(index) | retold.map(lambda found: {"weight_map": found}))
    def check(tree):
        (directory / "model.safetensors.index.json").write_bytes(dumped(tree))
        tensors = loaded(lambda: models.find_tensors(directory), str(directory))
        for file, _, _ in (tensors or {}).values():
            assert file.parent == directory and file.name in ("one.safetensors", "two.safetensors")

    check()


# ------------------------------------------------------------------------------------- tokenizers

TEXTS = [
    "",
    "the cat",
    " a\n\n1234 don't",
    "\x00\ud800é日👍 \u202eشלום",
    "<|endoftext|></s><s><tool>",
    "a" * 60 + "b",
]
BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "B"}}, {"Sequence": {"id": "A"}}],
       "special_tokens": {"B": {"id": "B", "ids": [260], "tokens": ["B"]}}}  # fmt: skip
SPLIT = {"type": "Split", "pattern": {"Regex": "[a-z]+|[0-9]"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
TOKENIZERS = {
    "byte level": lambda directory: byte_level(directory),
    "all of it": lambda directory: byte_level(
        directory, normalizer={"type": "NFC"}, post_processor=BOS, ignore_merges=True, extra=("cat",),
        pre_tokenizer={"type": "Sequence", "pretokenizers": [
            SPLIT, {"type": "Digits", "individual_digits": True}, BYTES]}),
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
    pieces = [
        tree[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor") if tree[key]
    ]

    @st.composite
    def one_part(draw):  # vocab and merges are most of the file, and the least interesting part
        part = draw(st.sampled_from(pieces))
        key = next(key for key in tree if tree[key] is part)
        return {**tree, key: draw(mutated(part))}

    @fuzz(50)
    @given((mutated(tree) | one_part()).map(dumped) | damaged(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        tokenizer = loaded(lambda: models.read_tokenizer(tmp_path), str(tmp_path))
        if tokenizer:
            encode_and_decode(tokenizer)

    check()


SIDE_FILES = {
    "generation_config.json": {"eos_token_id": [256, 259], "bos_token_id": 257, "temperature": 0.6},
    "tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>", "special": True},
                              "bos_token": "<s>", "chat_template": CHATML_TEMPLATE,
                              "added_tokens_decoder": {"5": {"content": "x"}}},
    "special_tokens_map.json": {"eos_token": "<|im_end|>", "bos_token": {"content": "<|endoftext|>"}},
    "config.json": {"eos_token_id": 257},
}  # fmt: skip


@pytest.mark.parametrize("name", SIDE_FILES)
def test_any_file_beside_the_tokenizer_is_read_or_refused(name, tmp_path):
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()

    @fuzz(40)
    @given(mutated(SIDE_FILES[name]).map(dumped) | damaged(dumped(SIDE_FILES[name])))
    def check(content):
        (tmp_path / name).write_bytes(content)
        tokenizer = loaded(lambda: models.read_tokenizer(tmp_path), str(tmp_path))
        if tokenizer:
            encode_and_decode(tokenizer)

    check()


@fuzz(40)
@given(damaged(b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))))
def test_any_rank_file_is_read_or_refused(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp() / "ranks"
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(content)
    tokenizer = loaded(lambda: models.read_tokenizer(directory), str(directory))
    if tokenizer:
        encode_and_decode(tokenizer)


def bos_of(*ids):
    return BOS | {"special_tokens": {"B": {"ids": ids}}}


REWARD = {"architectures": ["LlamaForSequenceClassification"]}
TAKEN = {"added_tokens": [{"id": 7, "content": "<x>", "special": True}]}
FOUND = [
    ("config.json", REWARD | {"pad_token_id": [1]}, "pad_token_id must be"),
    ("config.json", REWARD | {"pad_token_id": True}, "pad_token_id must be"),
    ("config.json", REWARD | {"id2label": {}}, "id2label must be"),
    ("config.json", {"x": "LISTS 150"}, "nested too deep"),
    ("config.json", {"x": "OBJECTS 100000"}, "nested too deep"),
    ("config.json", {"vocab_size": 10**400}, "vocab_size must be"),
    (
        "config.json",
        {"model_type": "a\nb\u202e\ud800"},
        r"model_type 'a\\nb\\u202e\\ud800' is not supported",
    ),
    ("generation_config.json", {"eos_token_id": 10**30}, "eos_token_id must be"),
    ("tokenizer.json", TAKEN, "the id of an ordinary one"),
    ("tokenizer.json", {"post_processor": bos_of(2**70)}, "what is no id"),
    ("tokenizer.json", {"post_processor": bos_of(-1)}, "what is no id"),
    ("tokenizer.json", {"post_processor": {"type": "a\nb"}}, r"post_processor a\\nb is not supported"),
    ("tokenizer_config.json", {"eos_token": None}, "names no end-of-text token"),
]


@pytest.mark.parametrize("file, fields, told", FOUND)
def test_what_a_fuzz_test_once_found(file, fields, told, tmp_path):
    byte_level(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(models.config_json(LLAMA)))
    tree = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_bytes(dumped(tree | fields))
    with bounded(), pytest.raises(InputError, match=told) as caught:
        models.read_config(tmp_path)
        models.read_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and str(caught.value).isprintable()


def test_names_of_tensors_do_not_break_the_line(plain, tmp_path):
    tensors = load_file(plain / "model.safetensors")
    save_file(tensors | {"a\nb\u202e": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"no place for: a\\nb\\u202e$"):
        models.read_weights(tmp_path, LLAMA)


def test_an_end_token_that_the_model_has_not_is_refused(checkpoint, tmp_path, capsys):
    (checkpoint / "tokenizer_config.json").unlink()
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 5000}')
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert models.read_tokenizer(checkpoint).vocab_size == 5001
    (tmp_path / "pairs.jsonl").write_bytes(lines(ROWS[:1]))
    line = refused(capsys, tmp_path, "--model", checkpoint, "--preferences", tmp_path / "pairs.jsonl")
    assert "has fewer embeddings than the tokenizer has ids" in line


CONTROL = [*"ab <|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>",
           "<tool>", "</s>", "<s>", "<unk>", "<0x41>", "system", "user", "assistant", "\n"]  # fmt: skip


def test_no_text_of_a_prompt_becomes_a_control_token(tmp_path):
    readers = [
        models.read_tokenizer(byte_level(tmp_path / "a", ignore_merges=True), chat) for chat in models.CHATS
    ]
    readers += [models.read_tokenizer(sentence_piece(tmp_path / "b"), chat) for chat in ("plain", "zephyr")]

    @fuzz(40)
    @given(
        st.lists(st.sampled_from(CONTROL), max_size=12).map("".join), st.sampled_from(["system", "user"])
    )
    def check(text, role):
        for tokenizer in readers:
            control = {*tokenizer.control.values()}
            blank, spoken = (
                tokenizer.prompt([{"role": role, "content": content}, {"role": "user", "content": content}])
                for content in ("x", text)
            )
            assert [i for i in blank if i in control] == [i for i in spoken if i in control]
            assert tokenizer.decode(tokenizer.encode(text, start=False)) == text

    check()


PATTERNS = ["(a+)+b", "((?=a){99}){99}", "(?:(?:a{1000}){1000}){1000}", "(a|a)*b", "(?#[)(a+)+(?#])b",
            "a{1000000}", "(?=a)", "x*", "", "a*a*a*a*a*a*a*a*a*b", r"(?:(a+)\1?)?c"]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_could_take_forever_are_refused_or_told(pattern, tmp_path):
    steps = [SPLIT | {"pattern": {"Regex": pattern}}, BYTES | {"use_regex": False}]
    byte_level(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    tokenizer = loaded(lambda: models.read_tokenizer(tmp_path), str(tmp_path / "tokenizer.json"))
    if tokenizer:
        ids = loaded(lambda: tokenizer.encode("a" * 300 + "!"), "pattern")
        assert ids is None or tokenizer.decode(ids) == "a" * 300 + "!"


# ------------------------------------------------------------------------------------- nothing is executed


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_not_read(checkpoint, tmp_path, capsys):
    weights, ran = checkpoint / "model.safetensors", tmp_path / "ran"
    pickled = pickle.dumps(Payload(ran))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for name in ("pytorch_model.bin", "model.safetensors"):
        weights.unlink(missing_ok=True)
        (checkpoint / name).write_bytes(pickled)
        line = refused(capsys, tmp_path, "--model", checkpoint, "--preferences", tmp_path / "pairs.jsonl")
        assert "pytorch_model.bin is a pickle" in line or "model.safetensors" in line
    assert not ran.exists()
    pickle.loads(pickled)
    assert ran.exists()  # it would have run


def test_no_source_file_can_unpickle_or_execute_what_it_reads():
    assert len(SOURCES) >= 5
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                banned = {"pickle", "marshal", "shelve", "dill", "joblib", "jinja2", "yaml", "importlib"}
                assert not banned & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "np.load", "eval", "exec", "__import__"), (
                    path,
                    called,
                )
                assert "pickle" not in called and "from_pretrained" not in called, (path, called)


def test_no_code_and_no_template_of_a_model_directory_is_executed(checkpoint, tmp_path):
    ran = tmp_path / "ran"
    code = f"import pathlib; pathlib.Path({str(ran)!r}).touch()"
    jinja = "{{ cycler.__init__.__globals__.os.system('touch %s') }}" % ran + CHATML_TEMPLATE
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    for name in ("modeling_x.py", "__init__.py", "conftest.py", "tokenization_x.py"):
        (checkpoint / name).write_text(code)
    byte_level(
        checkpoint, settings={"chat_template": jinja, "auto_map": {"AutoTokenizer": "tokenization_x.T"}}
    )
    for _ in range(2):  # the template in tokenizer_config.json, then in a file of its own
        tokenizer = models.read_tokenizer(checkpoint)
        assert (
            tokenizer.chat == "chatml"
            and tokenizer.decode(tokenizer.prompt("{{ 7 * 7 }}")).count("49") == 0
        )
        (checkpoint / "chat_template.jinja").write_text(jinja)
    dice.load_model(checkpoint, "cpu")
    assert not ran.exists()


# ------------------------------------------------------------------------------------- reward models


def test_any_config_of_a_reward_model_is_read_or_refused(tmp_path):
    directory = write_reward_model(tmp_path / "rm")
    path = directory / "config.json"
    tree = json.loads(path.read_text())
    heads = {key: tree[key] for key in ("architectures", "id2label", "pad_token_id")}
    prompt = dice.Prompt("Hello", [])
    samples = [dice.Sample(prompt, [], text) for text in ("", "Good day.", "\ud800" * 50)]

    @fuzz(40)
    @given((mutated(heads).map(lambda head: {**tree, **head}) | mutated(tree)).map(dumped))
    def check(content):
        path.write_bytes(content)
        labeller = loaded(lambda: dice.RewardModel(directory), str(directory))
        if labeller:
            rewards = labeller.score(
                dice.load_model(directory, "cpu"), samples, dice.Budget(999, "scoring")
            )
            assert all(isinstance(reward, float) for reward in rewards)

    check()


# ------------------------------------------------------------------------------------- JSON lines

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
ROWS = [
    {"prompt": "Hello", "chosen": "Good day.", "rejected": "Go.", "score_chosen": 2.5, "score_rejected": 1},
    {"instruction": "Hi", "output": ["Yes", "No"], "dataset": "x"},
    {"prompt": TURNS, "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
    {"chosen": [*TURNS, {"role": "assistant", "content": "a"}],
     "rejected": [*TURNS, {"role": "assistant", "content": "b"}]},
    {"prompt": "2 + 2?", "initial_reason_steps": "First", "chosen": " 4", "rejected": " 5"},
]  # fmt: skip


def lines(rows, end=b"\n"):
    return end.join(map(dumped, rows)) + end


@pytest.mark.parametrize("score", [10**400, math.nan, -math.inf, True, "1", None])
def test_scores_that_are_no_numbers_are_refused(score, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines([ROWS[0] | {"score_chosen": score}]))
    with pytest.raises(
        InputError, match='line 1: "score_chosen" and "score_rejected" must both be numbers'
    ):
        jsonl.read_preferences(tmp_path / "rows.jsonl")


def test_any_json_lines_are_read_or_refused(tmp_path):
    path, tokenizer = tmp_path / "rows.jsonl", dice.tiny_model()[1]
    changed = mutated(ROWS, 2).filter(bool)

    @fuzz(150)
    @given(changed.map(lines) | changed.map(dumped) | damaged(lines(ROWS)) | st.binary(max_size=40)
           | st.builds(lambda rows, end, first: first + lines(rows, end), changed,
                       st.sampled_from([b"\r\n", b"\r", b"\n\n", b" \n", b"\x0b\n", "\u2028".encode()]),
                       st.sampled_from([b"", b"\xef\xbb\xbf", b"\0", b"[", b"\xff\xfe"])))  # fmt: skip
    def check(content):
        path.write_bytes(content)
        prompts = loaded(lambda: jsonl.read_prompts(path), str(path))
        pairs = loaded(lambda: jsonl.read_preferences(path), str(path))
        prompts = [prompt for _, prompt in prompts or []]
        assert len({json.dumps(prompt) for prompt in prompts}) == len(prompts)
        for pair in pairs or []:
            assert isinstance(pair.chosen, str) and isinstance(pair.rejected, str)
            torch.tensor(pair.scores or (), dtype=torch.float32)
            prompts.append(pair.prompt)
        for prompt in prompts:
            tokenizer.decode(tokenizer.prompt(prompt))
            assert json.loads(json.dumps(prompt)) == prompt

    check()


@pytest.mark.parametrize(
    "start, end, told",
    [
        (b"", b"\r\n", None),
        (b"", b"\n\n  \n", None),
        (b"", b"\r", None),
        (b"\xef\xbb\xbf", b"\n", "line 1: not valid JSON: Unexpected UTF-8 BOM"),
        (b"\xff\xfe", b"\n", "not UTF-8"),
        (b"\0", b"\n", "line 1: not valid JSON"),
        (b'{"prompt": %s}\n' % (b"[" * 200 + b"]" * 200), b"\n", "too deep"),
        (b'{"prompt": 1%s}\n' % (b"0" * 9999), b"\n", "line 1: not valid JSON"),
        (b"", b"", "line 1: not valid JSON"),
    ],
)
def test_line_ends_marks_and_depth(start, end, told, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(start + lines(ROWS, end))
    if told:
        with pytest.raises(InputError, match=told):
            jsonl.read_preferences(path)
    else:
        assert len(jsonl.read_preferences(path)) == len(ROWS)


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def world(checkpoint, tmp_path, monkeypatch, capsys):
    """Runs the program on prompts and offline pairs, with answers that do not depend on the tiny model."""

    def run(prompts, pairs, says, *argv):
        """(exit code, what it printed, --out); says(prompt number, sample number) -> an answer's text"""
        tokenizer = models.read_tokenizer(checkpoint)

        def generate(model, ids, samples, **_):
            for index in range(len(ids)):
                for k in range(samples):
                    yield index, k, tokenizer.answer(says(index, k)), "stop"

        monkeypatch.setattr(dice, "generate", generate)
        out = tmp_path / "out"
        rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs]
        (tmp_path / "prompts.jsonl").write_bytes(lines([{"prompt": text} for text in prompts]))
        (tmp_path / "pairs.jsonl").write_bytes(lines(rows))
        code = dice.main([
            "--model", str(checkpoint), "--prompts", str(tmp_path / "prompts.jsonl"), "--preferences",
            str(tmp_path / "pairs.jsonl"), "--out", str(out), "--rounds", "1", "--samples", "3",
            "--steps", "2", "--dpo-steps", "1", "--dpo-lr", "1e-3", "--batch", "4",
            "--held-out", "0", *argv])  # fmt: skip
        return code, capsys.readouterr(), out

    return run


ODD = {
    "surrogates": ("What is \ud800 and \udfff?", "A half \ud83d of a pair.", "\udc00\ud800 none"),
    "nul": ("What is \x00?", "A \x00 byte.", "\x00\x01\x02\x7f"),
    "right to left": ("مرحبا \u202eabc\u202c שלום", "שלום, \u202eתודה", "لا \u200f\u200e"),
    "combining": ("e\u0301 is not \u00e9", "a\u0308\u0323" * 5, "\u0301\u0301\u0301\u0301"),
    "emoji": ("👩‍👩‍👧‍👦?", "🏳️‍🌈 and 🇩🇪", "\U0010ffff\u0378\ufeff\ufffe"),
    "control words": ("<|endoftext|>", "<|endoftext|></s><|im_end|>", "{{ 7 * 7 }}\n\nUser:"),
    "line ends": ("a\r\nb\u2028c\u2029d\x85e\x0bf", "one\r\ntwo\rthree\u2028", "\n\n\n\n"),
}  # fmt: skip


def test_odd_text_goes_through_a_run_and_comes_out_as_it_went_in(world):
    prompts = [prompt for prompt, _, _ in ODD.values()]
    pairs = [(f"Offline: {prompt}", chosen, rejected) for prompt, chosen, rejected in ODD.values()]
    texts = [texts[1:] for texts in ODD.values()]
    code, _, out = world(prompts, pairs, lambda i, k: [*texts[i], f"Third {i}."][k])
    assert code == 0
    rows, mixture = (rows_of(out / "round-1" / name) for name in ("samples.jsonl", "pairs.jsonl"))
    assert [row["prompt"] for row in rows[::3]] == prompts
    for i, row in enumerate(rows[::3]):  # half a surrogate pair is no character: the model says U+FFFD
        assert row["text"] == "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in texts[i][0])
    old = {row["prompt"]: row["chosen"] for row in mixture if row["source"] == "replayed"}
    assert old and old == {prompt: chosen for prompt, chosen, _ in pairs if prompt in old}
    new = [row["prompt"] for row in mixture if row["source"] == "generated"]
    assert new and {*new} <= {*prompts}
    assert all(text in {row["prompt"] for row in rows} for text in new)
    json.dumps(rows).encode()  # every row is UTF-8


@pytest.mark.parametrize("name", ODD)
def test_odd_text_stays_what_it_is_in_the_tokenizer(name):
    tokenizer = dice.tiny_model()[1]
    for text in ODD[name]:
        clean = "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in text)
        assert tokenizer.decode(tokenizer.encode(text)) == clean
        assert tokenizer.end not in tokenizer.prompt(text) and tokenizer.answer(text)[-1] == tokenizer.end


MB10 = 10 * 2**20
LONG = {"one letter": "a" * MB10, "combining": "e" + "\u0301" * (MB10 // 2)}


@pytest.mark.parametrize("kind", LONG)
def test_a_prompt_of_10_mb_is_refused_by_its_line(kind, checkpoint, tmp_path, capsys):
    prompts, pairs = tmp_path / "prompts.jsonl", tmp_path / "pairs.jsonl"
    prompts.write_bytes(lines([{"prompt": "Hello"}, {"prompt": LONG[kind]}]))
    pairs.write_bytes(lines(ROWS[:1]))
    with bounded(20, 3000):
        line = refused(
            capsys, tmp_path, "--model", checkpoint, "--preferences", pairs, "--prompts", prompts
        )
    assert "prompts.jsonl line 2: the prompt has" in line and "context of 128" in line and len(line) < 500


def test_an_offline_pair_of_10_mb_is_counted_and_left_out(world):
    with bounded(30, 3000):
        pairs = [
            ("A", "One answer.", "Other."),
            ("B", "the owl " * (MB10 // 8), "Other."),
            ("C", "Yes.", "No."),
        ]
        code, told, out = world(["Hello"], pairs, lambda i, k: f"Answer {k}.")
    assert code == 0 and "2 of 3 offline pairs are used: 1 are longer than 128 tokens" in told.err


def test_answers_of_one_token(world, checkpoint):
    """The end token alone may be an offline answer; sampled, it has too few characters to be used."""
    pairs = [("A", "", "Some words."), ("B", "Yes", ""), ("C", "y", "n")]
    end = models.read_tokenizer(checkpoint).end
    says = [["", " ", "Words."], ["", "y", "Longer words."], ["Good.", "Bad one.", ""]]
    code, told, out = world(
        ["P", "Q", "R"], pairs, lambda i, k: says[i][k], "--min-valid", "0", "--alpha", "0"
    )
    assert code == 0
    rows, mixture = (rows_of(out / "round-1" / name) for name in ("samples.jsonl", "pairs.jsonl"))
    assert rows[0]["tokens"] == [end] and rows[0]["text"] == "" and math.isfinite(rows[0]["reward"])
    new = [row for row in mixture if row["source"] == "generated"]
    assert [{row["prompt"], row["chosen"], row["rejected"]} for row in new] == [{"R", "Good.", "Bad one."}]
    old = [row for row in mixture if row["source"] == "replayed"]
    assert old and all(row["chosen"] in ("", "Yes", "y") for row in old)


def test_every_sampled_answer_of_one_token_is_one_clear_error(world):
    pairs = [("A", "Yes", "No"), ("B", "Yes", "No")]
    code, told, out = world(["P", "Q"], pairs, lambda i, k: "")
    assert code == 2 and "no prompt has 1.5 valid answers" in told.err.splitlines()[-1]
    assert not (out / "round-1" / "policy").exists()


def test_a_limit_of_one_token_cuts_every_answer(checkpoint, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_bytes(lines(ROWS[:2]))
    argv = ["--model", checkpoint, "--reference", checkpoint, "--preferences", tmp_path / "pairs.jsonl",
            "--samples", "2", "--max-new-tokens", "1", "--out", tmp_path / "out"]  # fmt: skip
    assert dice.main(list(map(str, argv))) == 2
    assert "(4 of 4 were cut by the length limit, " in capsys.readouterr().err.splitlines()[-1]


def rewarded(monkeypatch, reward):
    """The implicit reward becomes reward(prompt's text, answer)."""

    def give(run, what, samples):
        for x in samples:
            x.reward = reward(x.prompt.content, x.text)

    monkeypatch.setattr(dice, "reward_answers", give)


OFFLINE = [(f"Offline {i}", "Yes, of course.", "No.") for i in range(4)]


def test_all_equal_rewards_give_no_pair(world, monkeypatch):
    rewarded(monkeypatch, lambda prompt, text: 1.5 if prompt == "P" else len(text))
    code, told, out = world(["P", "Q"], OFFLINE, lambda i, k: "word " * (k + 1), "--alpha", "0")
    assert code == 0
    new = [row for row in rows_of(out / "round-1" / "pairs.jsonl") if row["source"] == "generated"]
    assert [row["prompt"] for row in new] == ["Q"]


@pytest.mark.parametrize("argv", [[], ["--alpha", "0"], ["--rejected", "random"], ["--gamma", "0"]])
def test_all_equal_rewards_for_every_prompt_are_one_clear_error(argv, world, monkeypatch):
    rewarded(monkeypatch, lambda prompt, text: 1.5)
    code, told, out = world(["P", "Q"], OFFLINE, lambda i, k: f"word {k}", *argv)
    last = told.err.splitlines()[-1]
    assert code == 2 and last.startswith("dice.py: ") and "the same reward, for each of 2 prompts" in last
    assert not (out / "round-1" / "policy").exists()


def test_answers_with_a_nan_reward_are_not_used(world, monkeypatch):
    rewarded(
        monkeypatch,
        lambda prompt, text: math.nan if prompt == "P" or "word word word" in text else len(text),
    )
    code, told, out = world(["P", "Q"], OFFLINE, lambda i, k: "word " * (k + 1), "--alpha", "0")
    assert code == 0
    new = [row for row in rows_of(out / "round-1" / "pairs.jsonl") if row["source"] == "generated"]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in new] == [
        ("Q", "word word ", "word ")
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nan_reward_never_gets_into_a_pair(value):
    prompt, other = dice.Prompt("a", [5]), dice.Prompt("b", [5])
    group = answers(prompt, ("one", value), ("two", 1.0), ("six", -1.0), ("ten", value))
    alpha, pairs = dice.shape_and_pair(group + answers(other, ("one", value), ("two", 1.0)), settings())
    assert math.isfinite(alpha)
    assert [(p.chosen.text, p.rejected.text) for p in pairs] == [("two", "six")]
    with pytest.raises(InputError, match="no prompt has"):
        dice.shape_and_pair(answers(prompt, *[(name, value) for name in ("one", "two", "six")]), settings())


def test_a_nan_of_the_implicit_reward_is_one_clear_error(world, monkeypatch):
    monkeypatch.setattr(dice, "implicit_reward", lambda policy, reference: math.nan)
    code, told, _ = world(["P\u202e\n"], OFFLINE, lambda i, k: f"word {k}")
    last = told.err.splitlines()[-1]
    assert code == 2 and "reward nan" in last and "P\\u202e\\n" in last.replace("\\\\", "\\")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("who", ["model", "reference"])
def test_weights_that_are_no_numbers_are_one_clear_error(who, value, checkpoint, tmp_path, capsys):
    directory = tmp_path / "broken"
    shutil.copytree(checkpoint, directory)
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][:] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "pairs.jsonl").write_bytes(lines(ROWS[:2]))
    both = {"model": checkpoint, "reference": checkpoint} | {who: directory}
    argv = ["--model", both["model"], "--reference", both["reference"], "--preferences",
            tmp_path / "pairs.jsonl", "--samples", "2", "--max-new-tokens", "8",
            "--min-valid", "0", "--out", tmp_path / "out"]  # fmt: skip
    with bounded():
        assert dice.main(list(map(str, argv))) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("dice.py: ")


def test_a_reward_model_with_weights_that_are_no_numbers_is_one_clear_error(world, tmp_path):
    directory = write_reward_model(tmp_path / "rm")
    weights = load_file(directory / "model.safetensors")
    weights["score.weight"][:] = math.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    code, told, _ = world(["P"], OFFLINE, lambda i, k: f"word {k}", "--labeller", str(directory))
    assert code == 2 and told.err.splitlines()[-1].startswith("dice.py: no prompt has")


def test_duplicate_prompts_are_kept_once(checkpoint, tmp_path):
    same = [
        "Hello",
        [{"role": "user", "content": "Hello"}],
        [{"content": "Hello", "role": "user", "name": "x"}],
    ]
    turns = [TURNS, [dict(reversed(turn.items())) for turn in TURNS]]
    others = ["hello", "Hello ", "e\u0301", "\u00e9", "\ud800", "\udfff"]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(lines([{"prompt": prompt} for prompt in [*same, *turns, *others] * 2]))
    found = jsonl.read_prompts(path)
    assert [prompt for _, prompt in found] == ["Hello", TURNS, *others]
    assert found[0][0].endswith("line 1") and found[1][0].endswith("line 4")
    (tmp_path / "pairs.jsonl").write_bytes(lines([ROWS[0], ROWS[0], ROWS[2], ROWS[1]]))
    files = ["--prompts", str(path), "--preferences", str(tmp_path / "pairs.jsonl")]
    given, own = (
        dice.Run(dice.parse_settings(["--model", str(checkpoint), *argv])[0]) for argv in (files, files[2:])
    )
    assert len(given.prompts) == len(found) and len(given.offline) == 4  # a pair may be there twice
    assert [p.content for p in own.prompts] == ["Hello", TURNS, "Hi"]


def test_a_prompt_in_both_sets_is_not_trained_on_twice(world):
    pairs = [(f"{name}{i}", "Yes, of course.", "No.") for name in ("Both ", "Offline ") for i in range(4)]
    pairs += [
        ([{"role": "user", "content": "Both 1"}], "Another one.", "Not.")
    ]  # the same prompt, otherwise written
    prompts = [f"Both {i}" for i in range(4)]
    code, _, out = world(prompts, pairs, lambda i, k: f"word {k} " * (k + 1))
    assert code == 0
    rows = rows_of(out / "round-1" / "pairs.jsonl")
    generated, replayed = (
        [row["prompt"] for row in rows if row["source"] == kind] for kind in ("generated", "replayed")
    )
    assert generated and replayed and not {*generated} & {*replayed} and len({*generated}) == len(generated)


def test_a_run_with_nothing_but_shared_prompts_is_told_so_or_trains_on_what_is_left(world):
    pairs = [("P", "Yes, of course.", "No."), ("Q", "Yes.", "No.")]
    code, told, out = world(["P", "Q"], pairs, lambda i, k: f"word {k} " * (k + 1))
    assert code == 0
    rows = rows_of(out / "round-1" / "pairs.jsonl")
    assert sorted((row["prompt"], row["source"]) for row in rows) in (
        [("P", "generated"), ("Q", "replayed")], [("P", "replayed"), ("Q", "generated")])  # fmt: skip
