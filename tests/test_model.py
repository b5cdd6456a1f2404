"""model.py against transformers, published sizes and handmade files."""
import dataclasses
import json
import math
import pickle
import struct
import types
from pathlib import Path

import pytest
import torch
from fuzz import bounded, damaged, dumped, fuzz, loaded, mutated
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_tokenizer import byte_level

import dice
import model
from data import options, ultrafeedback
from data.files import InputError
from data.tokenizer import read_tokenizer
from model import PRESETS, Config

SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
BIASES = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
GPT2 = Config(vocab_size=300, context=32, layers=2, width=16, heads=4, kv_heads=4, head_size=4, hidden=40,
              position="learned", norm="layer", mlp="gelu", **BIASES, tied=True)
LLAMA = Config(vocab_size=300, context=64, layers=2, width=16, heads=4, kv_heads=2, head_size=4, hidden=24,
               rope_theta=5e5, rope_scaling=SCALING)
replace = dataclasses.replace
NETWORKS = {"gpt2": GPT2, "gpt2 untied": replace(GPT2, tied=False), "llama": LLAMA,
            "llama biases": replace(LLAMA, **BIASES, rope_scaling=None),
            "llama tied, head size": replace(LLAMA, tied=True, head_size=6, eps=1e-6),
            "qwen2": replace(LLAMA, qkv_bias=True, rope_scaling=None, tied=True),
            "qwen3": replace(LLAMA, qk_norm=True, head_size=6, tied=True, rope_scaling=None)}

def random_state(config, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in model.parameter_shapes(config).items()}

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)

@pytest.fixture
def tokenizer(tmp_path):
    return read_tokenizer(byte_level(tmp_path / "tokenizer"))

# ---------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("shard", [10 ** 9, 3000])
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(tmp_path, monkeypatch, tokenizer, name, shard):
    monkeypatch.setattr(model, "SHARD_BYTES", shard)
    config, state, a, b = NETWORKS[name], random_state(NETWORKS[name]), tmp_path / "new/a", tmp_path / "new/b"
    model.write_checkpoint(a, config, state, tokenizer)
    again = model.read_config(a)
    assert again == config and same(model.read_weights(a, again), state)
    files = {path.name for path in a.iterdir()}
    assert len({path.stat().st_mode for path in a.iterdir()}) == 1  # others may read the weights too
    assert ("model.safetensors.index.json" in files) == ("model.safetensors" not in files) == (shard == 3000)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (a / file).read_bytes() == (tmp_path / "tokenizer" / file).read_bytes()
    # A second generation, in another type: what was read is written again.
    model.write_checkpoint(b, again, {name: tensor.bfloat16() for name, tensor in state.items()}, tokenizer)
    fields = [json.loads((one / "config.json").read_text()) for one in (a, b)]
    assert fields[0] | {"torch_dtype": "bfloat16"} == fields[1]
    assert same(model.read_weights(b, again), {k: v.bfloat16() for k, v in state.items()})
    assert model.read_weights(b, again, torch.float32)["embed.weight"].dtype == torch.float32
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"a", "b"}

def test_written_checkpoint_stops_where_we_stop(tmp_path):
    directory = byte_level(tmp_path / "t")
    (directory / "generation_config.json").write_text('{"eos_token_id": 259, "temperature": 0.6}')
    tokenizer = read_tokenizer(directory, "llama3")
    model.write_checkpoint(tmp_path / "a", LLAMA, random_state(LLAMA), tokenizer)
    written = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert written["eos_token_id"] == list(tokenizer.stop_ids) == [263, 259] and written["temperature"] == 0.6

def test_failed_write_leaves_nothing(tmp_path):
    class Broken:
        bos, stop_ids = None, (1,)
        def save(self, directory):
            (directory / "half").write_text("x")
            raise KeyboardInterrupt
    state = random_state(LLAMA)
    with pytest.raises(KeyboardInterrupt):
        model.write_checkpoint(tmp_path / "a", LLAMA, state, Broken())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="already exists"):
        model.write_checkpoint(tmp_path / "a", LLAMA, state, Broken())
    with pytest.raises(ValueError, match="head.weight"):
        model.write_checkpoint(tmp_path / "b", replace(LLAMA, tied=True), state, Broken())
    for change in ({"norm": "layer"}, {"out_bias": True}, {"qkv_bias": True, "mlp_bias": True},
                   {"qk_norm": True, "mlp_bias": True}, {"qk_norm": True, "qkv_bias": True}):
        config = replace(LLAMA, **change)
        with pytest.raises(InputError, match="no Hugging Face architecture"):
            model.write_checkpoint(tmp_path / "b", config, random_state(config), Broken())

@pytest.mark.parametrize("shard", [10 ** 9, 3000])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama biases", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_what_we_write(tmp_path, monkeypatch, tokenizer, name, shard):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64,
                 tie_word_embeddings=name in ("qwen2", "qwen3"))
    more = {"llama": dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **SCALING}), "qwen2": {},
            "llama biases": dict(attention_bias=True, mlp_bias=True, head_dim=6),
            "mistral": dict(sliding_window=None), "qwen3": dict(head_dim=6)}
    if name == "gpt2":
        theirs = transformers.GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=4)
    else:
        theirs = transformers.AutoConfig.for_model(name.split()[0], **sizes, **more[name])
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(theirs).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases and norms too
    monkeypatch.setattr(model, "SHARD_BYTES", shard)
    theirs.save_pretrained(tmp_path / "hf")
    config = model.read_config(tmp_path / "hf")
    state, ids = model.read_weights(tmp_path / "hf", config), torch.arange(24).reshape(2, 12) * 7
    for given_config in (config, replace(config, raw={})):  # its own config.json; one of ours
        out = tmp_path / f"ours{bool(given_config.raw)}"
        model.write_checkpoint(out, given_config, state, tokenizer)
        ours, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6)
        pairs = zip(ours.state_dict().values(), theirs.state_dict().values())
        assert all(torch.equal(a, b) for a, b in pairs)

def test_fusing_by_hand(tmp_path, tokenizer):
    """q, k, v and gate, up are stacked by rows in this order; GPT-2's matrices are transposed."""
    state = random_state(LLAMA)
    model.write_checkpoint(tmp_path / "llama", LLAMA, state, tokenizer)
    stored = load_file(tmp_path / "llama" / "model.safetensors")
    qkv = [stored[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(torch.cat(qkv), state["layers.1.qkv.weight"]) and [len(x) for x in qkv] == [16, 8, 8]
    gate_up = [stored[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(torch.cat(gate_up), state["layers.0.up.weight"])
    state = random_state(GPT2)
    model.write_checkpoint(tmp_path / "gpt2", GPT2, state, tokenizer)
    stored = load_file(tmp_path / "gpt2" / "model.safetensors")
    for theirs, ours in [("1.attn.c_attn", "1.qkv"), ("0.attn.c_proj", "0.out"), ("0.mlp.c_fc", "0.up"),
                         ("0.mlp.c_proj", "0.down")]:
        assert torch.equal(stored[f"transformer.h.{theirs}.weight"].T, state[f"layers.{ours}.weight"])
    assert "lm_head.weight" not in stored
    # The names of the original GPT-2 files, with their buffers.
    stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    stored |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4),
               "lm_head.weight": stored["wte.weight"].clone()}
    save_file(stored, tmp_path / "gpt2" / "model.safetensors")
    assert same(model.read_weights(tmp_path / "gpt2", GPT2), state)

@pytest.mark.parametrize("shard", [10 ** 9, 3000])
def test_a_tied_head_must_be_the_embedding(tmp_path, monkeypatch, tokenizer, shard):
    """transformers uses such a head, and ties nothing. Without it the model would be another one."""
    monkeypatch.setattr(model, "SHARD_BYTES", shard)
    untied, tied = replace(LLAMA, vocab_size=5000, raw={}), replace(LLAMA, vocab_size=5000, tied=True)
    state = random_state(untied)
    for change, told in [(0, None), (1, "lm_head.weight is not the embedding.*tie_word")]:
        state["head.weight"] = state["embed.weight"].clone()
        state["head.weight"][-1, -1] += change  # the last number of many rows
        directory = tmp_path / f"{change}"
        model.write_checkpoint(directory, untied, state, tokenizer)
        if told:
            with pytest.raises(InputError, match=told):
                model.read_weights(directory, tied)
        else:
            assert "head.weight" not in model.read_weights(directory, tied)

def test_links_stay_in_the_model_or_in_the_cache_of_the_hub(tmp_path, tokenizer):
    """A policy is shared with others. No private key may come into it through a link."""
    cache, state = tmp_path / "hub" / "models--a--b", random_state(LLAMA)
    snapshot, secret = cache / "snapshots" / "0f", tmp_path / "id_rsa"
    model.write_checkpoint(snapshot, LLAMA, state, tokenizer)
    (cache / "blobs").mkdir()
    for i, path in enumerate(list(snapshot.iterdir())):  # as huggingface_hub keeps a model
        path.rename(cache / "blobs" / f"{i}")
        path.symlink_to(f"../../blobs/{i}")
    (tmp_path / "link").symlink_to(snapshot)
    for directory in (snapshot, tmp_path / "link"):
        directory = model.resolve(str(directory))
        assert same(model.read_weights(directory, model.read_config(directory)), state)
        assert read_tokenizer(directory).files == tokenizer.files | {
            "generation_config.json": (snapshot / "generation_config.json").read_bytes()}
    secret.write_text("secret")
    for place in (secret, "../../../../id_rsa", "../../blobs/elsewhere"):
        (cache / "blobs" / "elsewhere").symlink_to(secret)
        (snapshot / "merges.txt").symlink_to(place)
        with pytest.raises(InputError, match="merges.txt: is a link to a file outside"):
            read_tokenizer(snapshot)
        (snapshot / "merges.txt").unlink()
        (cache / "blobs" / "elsewhere").unlink()

# ---------------------------------------------------------------------------------------- damaged checkpoints
@pytest.fixture
def saved(tmp_path, tokenizer):
    model.write_checkpoint(tmp_path / "m", LLAMA, random_state(LLAMA), tokenizer)
    return tmp_path / "m" / "model.safetensors"

def header(content, length=None, data=b""):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data

SIZES = st.integers(-1, 9999) | st.sampled_from([2 ** n for n in (31, 32, 62, 63, 64)])
KINDS = ["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "f32"]
LIES = {"dtype": st.sampled_from(KINDS), "shape": st.lists(SIZES, max_size=4),
        "data_offsets": st.lists(SIZES, min_size=1, max_size=3)}

def entry(shape, offsets):
    return {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}

@pytest.mark.parametrize("content", [
    b"", b"\x01\x02", header({}, 2 ** 42), header({}, 2 ** 64 - 1), header(b"{nonsense"), header([]),
    header(b'{"\xff": 1}'), b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    header(b"[" * 100_000), header(entry([2], [0, 8])),
    header(entry([2 ** 62, 2 ** 62], [0, 8]), None, b"0" * 8),
    header(entry([2 ** 40], [0, 2 ** 42])), header(entry([2], [8, 0]), None, b"0" * 8)])
def test_damaged_safetensors(saved, content):
    saved.write_bytes(content)
    with bounded(2, 50), pytest.raises(InputError, match="model.safetensors"):
        model.read_weights(saved.parent, LLAMA)

@st.composite
def safetensors_files(draw, data):
    """A valid file, its header changed in any of the ways a header can lie."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    tree, tensors = json.loads(data[8:end]), data[end:]
    name, other, lie = (draw(st.sampled_from(sorted(names))) for names in (tree, tree, ["", *LIES]))
    if lie:
        tree[name][lie] = draw(LIES[lie] | st.just(tree[other].get(lie)))
    text = dumped(draw(st.just(tree) | mutated(tree, 1)))
    if draw(st.integers(0, 4)) == 0:  # the same name twice
        text = text[:-1] + b"," + text[1:]
    lengths = st.integers(0, 2 * len(text)) | st.sampled_from([2 ** 40, 2 ** 64 - 1])
    length = draw(st.none() | st.none() | st.none() | lengths)
    return header(text, length, tensors[:draw(st.none() | st.none() | st.integers(0, len(tensors)))])

def test_any_safetensors_file_is_read_or_refused(saved):
    whole = saved.read_bytes()
    @fuzz(150)
    @given(safetensors_files(whole) | damaged(whole))
    def check(content):
        saved.write_bytes(content)
        state = loaded(lambda: model.read_weights(saved.parent, LLAMA), str(saved), f"{saved.parent}: ")
        if state:
            assert {name: tuple(x.shape) for name, x in state.items()} == model.parameter_shapes(LLAMA)
    check()

@pytest.mark.parametrize("change, message", [
    ({"model.norm.weight": None}, "model.norm.weight is missing"),
    ({"model.layers.7.x": torch.ones(1)}, "no place for: model.layers.7.x"),
    ({"a\nb\u202e": torch.ones(1)}, r"no place for: a\\nb\\u202e$"),
    ({"lm_head.weight": torch.ones(300, 15)}, r"lm_head.weight has shape \(300, 15\)"),
    ({"model.norm.weight": torch.ones(16, dtype=torch.int8)}, "model.norm.weight .* type I8"),
    ({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}, "no place for: .*q_proj.bias")])
def test_wrong_tensors_are_named(saved, change, message):
    tensors = load_file(saved)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # of old checkpoints; harmless
    save_file(tensors, saved)
    model.read_weights(saved.parent, LLAMA)
    save_file({k: v for k, v in (tensors | change).items() if v is not None}, saved)
    with pytest.raises(InputError, match=message):
        model.read_weights(saved.parent, LLAMA)

OUTSIDE = ["../outside.safetensors", "x/../../outside.safetensors", "..\\outside.safetensors", "/etc/passwd",
           "./one.safetensors", ".", "..", "", "\x00", "one.safetensors\x00", "a\nb", "\ud800",
           "absent.safetensors", 7, None, ["a"]]

def test_any_index_is_read_or_refused_and_stays_in_its_directory(tmp_path):
    directory, index = tmp_path / "m", tmp_path / "m" / "model.safetensors.index.json"
    directory.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    save_file({"b": torch.ones(1), "c": torch.ones(2)}, directory / "one.safetensors")
    save_file({"d": torch.ones(1)}, directory / "two.safetensors")
    places = {"b": "one.safetensors", "c": "one.safetensors", "d": "two.safetensors"}
    retold = st.dictionaries(st.sampled_from("abcd") | st.text(max_size=3), max_size=4,
                             values=st.sampled_from([*OUTSIDE, "x" * 5000, *places.values()]))
    @fuzz(60)
    @given(mutated({"metadata": {"total_size": 16}, "weight_map": places})
           | retold.map(lambda found: {"weight_map": found}))
    def check(tree):
        index.write_bytes(dumped(tree))
        tensors = loaded(lambda: model.find_tensors(directory), str(directory))
        for file, _, _ in (tensors or {}).values():
            assert file.parent == directory and file.name in ("one.safetensors", "two.safetensors")
    check()
    for name in OUTSIDE:
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(InputError, match="index.json|absent.safetensors"):
            model.find_tensors(directory)
    ghost = json.dumps({"weight_map": {"ghost": "one.safetensors"}})
    for content in ("{}", "[]", "{", '{"weight_map": {}}', '{"weight_map": [1]}', "[" * 100_000, ghost):
        index.write_text(content)
        with pytest.raises(InputError, match="lacks ghost" if content == ghost else "index.json"):
            model.find_tensors(directory)
    save_file({"b": torch.ones(1)}, directory / "two.safetensors")
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match="two.safetensors: b is in another file too"):
        model.find_tensors(directory)

def test_a_pickle_is_refused_and_not_read(saved, tmp_path):
    class Payload:
        """Unpickled, it makes a file."""
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    pickled = pickle.dumps(Payload())
    saved.unlink()
    for name, told in (("x.bin", "x.bin is a pickle.*convert"), (saved.name, saved.name)):
        (saved.parent / name).write_bytes(pickled)
        with pytest.raises(InputError, match=told):
            model.read_weights(saved.parent, LLAMA)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickled)
    assert (tmp_path / "ran").exists()  # it would have run

# ---------------------------------------------------------------------------------------- config.json
LLAMA_JSON = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 4096,
              "rms_norm_eps": 1e-5, "hidden_act": "silu"}
GPT2_JSON = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4,
             "n_positions": 64, "activation_function": "gelu_new"}
MISTRAL = {"model_type": "mistral", "num_key_value_heads": 2}
QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 8}
QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16}
LLAMA31 = {"rope_type": "llama3"} | SCALING
CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"]}
ROPE = {"rope_theta": 5e5, "rope_scaling": SCALING}

def read(tmp_path, content):
    (tmp_path / "config.json").write_bytes(dumped(content))
    return model.read_config(tmp_path)

@pytest.mark.parametrize("change, expected", [
    ({}, {}), ({"num_key_value_heads": 2, "head_dim": 16}, {"kv_heads": 2, "head_size": 16}),
    ({"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
    ({"mlp_bias": True, "tie_word_embeddings": True}, {"mlp_bias": True, "tied": True}),
    ({"rope_theta": 500000.0, "rope_scaling": LLAMA31}, ROPE),
    ({"rope_theta": 500000, "rope_scaling": {"type": "llama3", **SCALING}}, ROPE),
    ({"rope_parameters": {"rope_theta": 500000.0, **LLAMA31}}, ROPE),
    ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, {"rope_theta": 7.0}),
    ({"rope_scaling": None, "sliding_window": 8}, {}),  # Llama has no such thing
    (MISTRAL | {"sliding_window": None}, {"kv_heads": 2}),
    (MISTRAL | {"sliding_window": 4096}, {"kv_heads": 2}),
    (MISTRAL | {"sliding_window": 1024}, {"kv_heads": 2, "context": 1024}),
    (QWEN2 | {"use_sliding_window": True}, {"kv_heads": 2, "qkv_bias": True, "context": 8}),
    (QWEN2 | {"use_sliding_window": False}, {"kv_heads": 2, "qkv_bias": True}),
    (QWEN3 | {"sliding_window": 8}, {"kv_heads": 2, "head_size": 16, "qk_norm": True}),
    (QWEN3 | {"sliding_window": 8, "use_sliding_window": True, "attention_bias": True},
     {"kv_heads": 2, "head_size": 16, "qk_norm": True, "context": 8, "qkv_bias": True, "out_bias": True}),
    (CLASSIFIER | {"pad_token_id": 3}, {"num_labels": 2, "pad": 3}),
    (CLASSIFIER | {"id2label": {"0": "x"}}, {"num_labels": 1})])
def test_llama_configs(tmp_path, change, expected):
    plain = replace(LLAMA, vocab_size=100, context=4096, width=32, kv_heads=4, head_size=8, hidden=48,
                    rope_theta=10000.0, rope_scaling=None)
    assert read(tmp_path, LLAMA_JSON | change) == replace(plain, **expected)
    gpt2 = replace(GPT2, vocab_size=100, context=64, width=32, head_size=8, hidden=128)
    assert read(tmp_path, GPT2_JSON) == gpt2

REFUSED = {  # field: values of it that are refused by its name
    "model_type": ["mamba", "gemma3_text", "qwen3_moe", None, ["llama"]],
    "vocab_size": [None, -1, 10 ** 12, 10 ** 400, "100", True],
    "num_attention_heads": [0], "num_key_value_heads": [3], "num_hidden_layers": [2 ** 20],
    "head_dim": [7, 2.0], "max_position_embeddings": [None], "rms_norm_eps": ["x", math.nan],
    "rope_theta": [-1, []], "rope_scaling": ["x"], "partial_rotary_factor": [0.5], "hidden_act": ["gelu"],
    "quantization_config": [{"quant_method": "gptq"}], "attention_bias": [1], "tie_word_embeddings": ["no"],
    "pad_token_id": [[1], True], "id2label": [{}]}
REFUSED_GPT2 = {"activation_function": "relu", "scale_attn_weights": False,
                "scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True,
                "reorder_and_upcast_attn": True, "n_inner": -4, "layer_norm_epsilon": 0, "n_layer": None}
OTHERWISE = [
    ({"model_type": "qwen2"}, "num_key_value_heads"), (QWEN3 | {"head_dim": None}, "head_dim"),
    ({"hidden_size": 33}, "width"),
    (GPT2_JSON | {"n_embd": 30}, "width"), ({"x": "LISTS 150"}, "deep"), ({"x": "OBJECTS 100000"}, "deep"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"), ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
    ({"rope_scaling": LLAMA31 | {"factor": "8"}}, "factor"),
    ({"rope_scaling": LLAMA31 | {"low_freq_factor": 4}}, "low_freq"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotary"),
    ({"hidden_size": 2 ** 20, "intermediate_size": 2 ** 24, "num_hidden_layers": 4096}, "parameters"),
    ({"model_type": "a\nb\u202e\ud800"}, r"type 'a\\nb\\u202e\\ud800' is not")]

@pytest.mark.parametrize("change, told", [
    *[(CLASSIFIER | {key: value}, key) for key, values in REFUSED.items() for value in values],
    *[(GPT2_JSON | {key: value}, key) for key, value in REFUSED_GPT2.items()], *OTHERWISE])
def test_refused_configs(tmp_path, change, told):
    with pytest.raises(InputError, match=rf"config\.json.*{told}"):
        read(tmp_path, LLAMA_JSON | change)

CONFIGS = {
    "llama": model.config_json(LLAMA) | {"head_dim": 4, "sliding_window": None, "eos_token_id": [1, 2]},
    "mistral": LLAMA_JSON | MISTRAL, "gpt2": model.config_json(GPT2),
    "qwen2": LLAMA_JSON | QWEN2 | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "qwen3": LLAMA_JSON | QWEN3 | {"attention_bias": False, "use_sliding_window": False},
    "reward": model.config_json(LLAMA) | CLASSIFIER | {"id2label": {"0": "LABEL_0"}, "pad_token_id": 0}}

@pytest.mark.parametrize("kind", CONFIGS)
def test_any_config_is_read_or_refused(kind, tmp_path):
    @fuzz(60)
    @given(mutated(CONFIGS[kind]).map(dumped) | damaged(dumped(CONFIGS[kind])))
    def check(content):
        (tmp_path / "config.json").write_bytes(content)
        config = loaded(lambda: model.read_config(tmp_path), str(tmp_path / "config.json"))
        if config:  # it can be compared, hashed, written back and asked for its shapes
            assert hash(config) == hash(config) and config == config
            shapes = model.parameter_shapes(config).values()
            assert all(type(n) is int and n > 0 for shape in shapes for n in shape)
            assert {type(config.num_labels), type(config.pad)} <= {int, type(None)}
            json.dumps(model.config_json(config), indent=2)
    check()

# ---------------------------------------------------------------------------------------- presets
PARAMETERS = {  # as published
    "llama3-8b": 8030261248, "zephyr-7b": 7241732096, "gpt2": 124439808, "gpt2-medium": 354823168,
    "gpt2-large": 774030080, "gpt2-xl": 1557611200, "llama3.2-1b": 1235814400, "qwen2.5-0.5b": 494032768,
    "qwen3-0.6b": 596049920, "smollm2-135m": 134515008, "skywork-8b": 7504928768,
    "smollm2-135m-instruct": 134515008, "smollm2-360m-instruct": 361821120}

def test_the_presets():
    assert set(PARAMETERS) | {"tiny", "llama3-8b-sft", "zephyr-7b-sft"} == set(PRESETS)
    for name, preset in PRESETS.items():
        assert set(preset.settings) <= set(options.all_options(dice.Settings))
        if name in PARAMETERS:
            shapes = model.parameter_shapes(preset.shape).values()
            assert sum(map(math.prod, shapes)) == PARAMETERS[name], name
        if preset.shape:
            labels = CLASSIFIER | {"id2label": {"0": "LABEL_0"}} if preset.shape.num_labels else {}
            assert model.parse_config(model.config_json(preset.shape) | labels, name) == preset.shape, name
            assert preset.settings.get("max_new_tokens", 2048) < preset.shape.context
        if "reference" in preset.settings:
            assert PRESETS[preset.settings["reference"]].shape == preset.shape
    for key, name in (("prompts", "prompt.json"), ("preferences", "preference.json")):
        path = Path(model.__file__).parent / PRESETS["llama3-8b"].settings[key]
        assert path == ultrafeedback.DIRECTORY / name and str(path).endswith(model.PAPER[key])

def test_zephyr_has_the_context_of_its_window():
    raw = model.config_json(PRESETS["zephyr-7b"].shape)
    upstream = raw | {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}
    config = model.parse_config(upstream, "config.json")
    assert config == PRESETS["zephyr-7b"].shape
    assert model.config_json(config) == upstream  # what we save, others load as what it was

def test_a_stand_in(monkeypatch):
    small = replace(LLAMA, vocab_size=2000)
    monkeypatch.setitem(PRESETS, "gpt2", replace(PRESETS["gpt2"], shape=small))
    config, tokenizer = model.stand_in("gpt2")
    assert config == small and len(tokenizer.stop_ids) == 5 and tokenizer.vocab_size == 2000
    prompt, answer = tokenizer.prompt("Why is the sky blue?"), tokenizer.answer("Light. \ud83d\ude00")
    assert len(prompt) == 6 and 0 <= min(prompt + answer) and max(prompt) < 1995 and tokenizer.decode(prompt)
    assert answer[-1] in tokenizer.stop_ids
    for name in ("tiny", "out/mine"):
        with pytest.raises(InputError, match=f"--weights dummy.*not for {name}"):
            model.stand_in(name)

# ---------------------------------------------------------------------------------------- reward models
def test_a_reward_model_is_read_or_refused(tmp_path, tokenizer):
    """A Llama sequence classifier, as transformers would save it."""
    config, directory = replace(LLAMA, num_labels=1, pad=0), tmp_path / "rm"
    model.write_checkpoint(directory, config, random_state(config), tokenizer)
    path, head = directory / "config.json", CLASSIFIER | {"id2label": {"0": "LABEL_0"}, "pad_token_id": 0}
    tree = json.loads(path.read_text()) | head
    path.write_text(json.dumps(tree))
    found, its = model.find_reward_model(directory)
    assert found == directory and its.stop_ids == tokenizer.stop_ids and model.read_config(found) == config
    for change, told in [({"architectures": ["LlamaForCausalLM"]}, "rm: not a reward model"),
                         ({"id2label": {"0": "a", "1": "b"}}, "rm: not a reward model"),
                         ({"vocab_size": 99}, "rm: has fewer embeddings than its tokenizer"),
                         ({"intermediate_size": 48}, "model.safetensors")]:
        path.write_text(json.dumps(tree | change))
        with pytest.raises(InputError, match=told):
            model.find_reward_model(directory)
    @fuzz(40)
    @given((mutated(head).map(lambda head: {**tree, **head}) | mutated(tree)).map(dumped))
    def check(content):
        path.write_bytes(content)
        if loaded(lambda: model.find_reward_model(directory), str(directory)):
            assert dice.load_model(directory, "cpu").head.weight.shape == (1, LLAMA.width)
    check()

# ---------------------------------------------------------------------------------------- placement
def settings(dtype="float32", offload="no", recompute="auto"):
    return types.SimpleNamespace(dtype=dtype, offload=offload, recompute=recompute)

@pytest.fixture
def no_processes():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

@pytest.mark.parametrize("config", [LLAMA, replace(LLAMA, tied=True)])
@pytest.mark.parametrize("dtype, offload", [("float32", "no"), ("float32", "all"), ("bfloat16", "no")])
def test_placement_for_training(no_processes, config, dtype, offload):
    net, plain = (dice.new_model(config, 0).to(getattr(torch, dtype)) for _ in range(2))  # as it is loaded
    assert net.sharded is None
    assert model.prepare_training(net, settings(dtype, offload, "yes"), "cpu") is net and net.recompute
    one_copy = (dtype, offload) == ("float32", "no")  # nothing to shard
    where = torch.device("cpu"), getattr(torch, dtype), offload == "all"
    assert net.sharded == (None if one_copy else where)
    assert torch.distributed.is_initialized() != one_copy
    for (name, p), before in zip(net.named_parameters(), plain.parameters()):
        assert p.dtype == torch.float32 and torch.equal(model.full_tensor(p), before.float()), name
        assert torch.equal(model.local_shard(p), before.float())  # of one process
    net(torch.tensor([[5, 6, 7]])).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters() if p.grad is not None)

@pytest.mark.parametrize("processes, offload, card, once", [
    (1, "no", 200e9, False), (1, "moments", 200e9, False), (1, "all", 24e9, False), (1, "all", 60e9, True),
    (8, "no", 80e9, True), (4, "no", 80e9, False), (4, "all", 80e9, True)])
def test_14_weights_travel_once_a_step_where_a_copy_of_them_and_of_gradients_fits(
        processes, offload, card, once, monkeypatch):
    """48 GB for Llama-3 8B, beside 10 GB for activations and the process' part of the state."""
    about = types.SimpleNamespace(total_memory=card)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(model, "world", lambda: processes)
    assert model.gathers_once(settings("bfloat16", offload), 8e9, "cuda:0") == once

def test_processes_on_gpus_meet_by_nccl_and_by_gloo_on_the_cpu():
    assert (model.backend_for("cuda:1"), model.backend_for("cpu")) == ("cpu:gloo,cuda:nccl", "gloo")
