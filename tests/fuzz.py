"""Random changes of files and JSON: whatever the bytes, a loader returns or raises InputError."""
import copy
import json
import math
import re
import resource
import sys
import time
from contextlib import contextmanager

from hypothesis import HealthCheck
from hypothesis import settings as examples
from hypothesis import strategies as st

from data.files import InputError

def fuzz(count):
    """Settings of a fuzz test: so many examples, on a machine of any speed."""
    return examples(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))

@contextmanager
def bounded(seconds=20, megabytes=500):
    """The block takes no longer, and needs no more memory."""
    def peak():
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
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

DEPTHS = (3, 150, 900, 100_000)
ODD_TEXT = ["", " ", "\x00", "a\nb", "\ud800", "\u202eabc", "../x", "e\u0301", "\U0010ffff", "x" * 5000,
            "Sequence", "Split", "ByteLevel", "Digits", "Metaspace", "NFC", "BPE", "default", "llama3",
            "gpt2", "LlamaForSequenceClassification", "<|endoftext|>", "</s>", "a b", "▁", "F32", "I8",
            "F4", "[a-z]+", "x*", "(?=a)", "(a+)+b", "([", "(?P<n>", "a{9}{9}", "[[:x:]]"]
NUMBERS = [2 ** 31, 2 ** 53, 2 ** 63, 2 ** 64, -(2 ** 63), 10 ** 400, 1e300, 256, 259]
LEAVES = (st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(ODD_TEXT)
          | st.text(max_size=4) | st.sampled_from(NUMBERS)
          | st.sampled_from([f"{name} {depth}" for name in ("LISTS", "OBJECTS") for depth in DEPTHS]))
KEYS = st.sampled_from(["type", "id", "content", "pattern", "Regex", "String"])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(KEYS, inner, max_size=3), max_leaves=4)

def dumped(tree):
    """JSON of a tree in which "LISTS 900" stands for 900 lists, each in the other."""
    ends = {"LISTS": ("[", "]"), "OBJECTS": ('{"a":', "}")}
    return re.sub(r'"(LISTS|OBJECTS) (\d+)"(?!:)', lambda m: ends[m[1]][0] * int(m[2]) + "1"
                  + ends[m[1]][1] * int(m[2]), json.dumps(tree)).encode()

def lines(rows, end=b"\n"):
    return end.join(map(dumped, rows)) + end

def keys_of(node):
    return list(node) if isinstance(node, dict) else list(range(len(node)))

@st.composite
def mutated(draw, tree, most=3):
    """The tree with up to so many of its nodes replaced, deleted, doubled, retyped or swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        node = tree
        while keys := keys_of(node):
            key = draw(st.sampled_from(keys))
            if not isinstance(node[key], (dict, list)) or not node[key] or draw(st.integers(0, 3)) == 0:
                change(draw, node, key)
                break
            node = node[key]
    return tree

def change(draw, node, key):
    """One mutation of the child `key` of a JSON list or object."""
    old = node[key]
    kind = draw(st.sampled_from(["replace", "replace", "variant", "variant", "delete", "add", "swap"]))
    if kind == "delete":
        del node[key]
    elif kind == "add" and isinstance(node, list):
        node.insert(key, copy.deepcopy(draw(st.sampled_from(node) | VALUES)))
    elif kind == "add":
        node[draw(st.sampled_from(ODD_TEXT) | st.text(max_size=3))] = draw(st.just(old) | VALUES)
    elif kind == "swap":
        other = draw(st.sampled_from(keys_of(node)))
        node[key], node[other] = node[other], old
    elif kind == "variant":
        variants = [str(old)[:100], [old], [old, old], {"a": old}, bool(old), len(str(old))]
        if type(old) in (int, float) and abs(old) < 1e300:
            variants += [-old, old + 1, old - 1, old * 2, float(old), -1, 0, 2 ** 40, math.nan]
        node[key] = draw(st.sampled_from(variants))
    else:
        node[key] = draw(VALUES)

@st.composite
def damaged(draw, data):
    """Bytes with a few of them changed, cut out or put in, or cut short, or with more behind them."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        data[place:place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    if draw(st.booleans()):
        del data[draw(st.integers(0, len(data))):]
    return bytes(data) + draw(st.sampled_from([b"", b"", b"\0", b"}", b"x" * 99]))
