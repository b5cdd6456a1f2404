"""model.py against something simpler: transformers, tokenizers, naive code, handmade files."""
import base64
import dataclasses
import json
import struct
import time
import unicodedata
from pathlib import Path

import pytest
import regex
import tiktoken
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

import model
from model import Config, InputError

REAL = Path(model.__file__).resolve().parent.parent / "shared" / "real"
STORIES, LLAMA3 = REAL / "stories260k", REAL / "llama3"
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="no stories260k here")
needs_llama3 = pytest.mark.skipif(not LLAMA3.exists(), reason="no Llama-3 tokenizer here")
quick = settings(max_examples=60, deadline=None, database=None)

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}
GPT2 = Config(300, 32, 2, 16, 4, 4, 4, 40, "learned", "layer", "gelu", True, True, True, tied=True)
LLAMA = Config(300, 64, 2, 16, 4, 2, 4, 24, rope_theta=5e5, rope_scaling=SCALING)
NETWORKS = {
    "gpt2": GPT2,
    "gpt2 untied": dataclasses.replace(GPT2, tied=False),
    "llama": LLAMA,
    "llama biases": dataclasses.replace(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True,
                                        rope_scaling=None),
    "llama tied, head size": dataclasses.replace(LLAMA, tied=True, head_size=6, eps=1e-6),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, rope_scaling=None, tied=True),
}
NASTY = ["", " ", "a", "  two  spaces ", "\t \n  x", "don't WE'LL 'D", "'\u017f 's",
         "he\u0301llo \u1e9b\u0323 \ufb01",
         "日本語 123456 ７８ ⅷ½", "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪", "\x00\x01\x7f\x85\u200b\ufeff\x1c", "a\u3000b\u00a0c\u2028",
         "مرحبا שלום",
         "<|endoftext|></s><s><unk><|im_end|><|eot_id|>", "a" * 300, "the" * 100, " " * 77 + "x",
         "\r\n\r\n x\r",
         "𝔘\u0378\U000e0001\U0010ffff", "1 22 333 4444 55555", "<0x41>", "x_y  __z", "\ufffd"]
TEXT = ("The cat sat on the mat, and the other cat didn't. It's 1234 past 10; they're here!\n\n  "
        "Naïve café — über 日本語のテキスト 👍👍🏽 مرحبا\tthe end.\r\n") * 30


def random_state(config, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in model.parameter_shapes(config).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


SPECIAL = ["<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<|im_start|>", "<|im_end|>"]


def byte_level(directory, merges=(("t", "h"), ("th", "e"), ("Ġ", "the")), extra=(), settings=(), without="",
               **changes):
    """A small byte-level tokenizer: 256 bytes (ids 0-255), the merges, extra tokens, SPECIAL and <tool>.

    Ids run against the order of the merges, so that nothing works by taking the one for the other.
    """
    joined = reversed([*("".join(pair) for pair in merges), *extra])
    tokens = [letter for letter in sorted(model.LETTERS) if letter not in without]
    tokens += [token for token in dict.fromkeys(joined) if token not in tokens]
    flags = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [{"id": len(tokens) + i, "content": content, "special": content != "<tool>"} | flags
             for i, content in enumerate([*SPECIAL, "<tool>"])]
    bpe = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)},
           "merges": [" ".join(m) for m in merges],
           "ignore_merges": changes.pop("ignore_merges", False)}
    content = {"version": "1.0", "added_tokens": added, "normalizer": None, "model": bpe,
               "post_processor": None,
               "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False,
                                 "trim_offsets": True}} | changes
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    settings = {"eos_token": "<|endoftext|>"} | dict(settings)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def sentence_piece(directory, merges=None, **changes):
    """A small byte-fallback tokenizer: <unk> <s> </s>, 256 byte tokens, letters, merges."""
    merges = merges or [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁", "a"), ("n", "d")]
    letters = list("▁abcdehnorst<>/|.user")
    tokens = list(dict.fromkeys(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters,
                                 *(a + b for a, b in merges)]))
    normalizer = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    added = [{"id": i, "content": tokens[i], "special": True, "normalized": False, "single_word": False,
              "lstrip": False, "rstrip": False} for i in range(3)]
    bpe = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
           "unk_token": "<unk>",
           "fuse_unk": True, "byte_fallback": True}
    bos = {"type": "TemplateProcessing", "pair": [],
           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
           "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                      {"Sequence": {"id": "A", "type_id": 0}}]}
    content = {"version": "1.0", "added_tokens": added, "normalizer": normalizer,
               "pre_tokenizer": None, "post_processor": bos, "model": bpe} | changes
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    settings = {"eos_token": {"content": "</s>"}, "bos_token": "<s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


# -------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("shard", [10 ** 9, 3000])
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(tmp_path, monkeypatch, name, shard):
    monkeypatch.setattr(model, "SHARD_BYTES", shard)
    config, state = NETWORKS[name], random_state(NETWORKS[name])
    tokenizer = model.read_tokenizer(byte_level(tmp_path / "tokenizer"))
    model.write_checkpoint(tmp_path / "new" / "a", config, state, tokenizer)
    again = model.read_config(tmp_path / "new" / "a")
    assert again == config
    assert same(model.read_weights(tmp_path / "new" / "a", again), state)
    files = {path.name for path in (tmp_path / "new" / "a").iterdir()}
    assert ("model.safetensors.index.json" in files) == ("model.safetensors" not in files) == (shard == 3000)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "new/a" / file).read_bytes() == (tmp_path / "tokenizer" / file).read_bytes()
    # A second generation, in another type: what was read is written again.
    model.write_checkpoint(tmp_path / "new" / "b", again, state, tokenizer, torch.bfloat16)
    fields = [json.loads((tmp_path / "new" / one / "config.json").read_text()) for one in "ab"]
    assert fields[0] | {"torch_dtype": "bfloat16"} == fields[1]
    assert same(model.read_weights(tmp_path / "new" / "b", again),
                {k: v.bfloat16() for k, v in state.items()})
    assert model.read_weights(tmp_path / "new" / "b", again,
                              torch.float32)["embed.weight"].dtype == torch.float32
    assert [path.name for path in (tmp_path / "new").iterdir() if path.name not in "ab"] == []


def test_written_checkpoint_stops_where_we_stop(tmp_path):
    directory = byte_level(tmp_path / "t")
    (directory / "generation_config.json").write_text('{"eos_token_id": 259, "temperature": 0.6}')
    tokenizer = model.read_tokenizer(directory, "llama3")
    model.write_checkpoint(tmp_path / "a", LLAMA, random_state(LLAMA), tokenizer)
    written = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert written["eos_token_id"] == list(tokenizer.stop_ids) == [263, 259]
    assert written["temperature"] == 0.6


def test_failed_write_leaves_nothing(tmp_path):
    class Broken:
        bos, stop_ids = None, (1,)

        def save(self, directory):
            (directory / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.write_checkpoint(tmp_path / "a", LLAMA, random_state(LLAMA), Broken())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="already exists"):
        model.write_checkpoint(tmp_path / "a", LLAMA, random_state(LLAMA), Broken())
    with pytest.raises(ValueError, match="head.weight"):
        model.write_checkpoint(tmp_path / "b", dataclasses.replace(LLAMA, tied=True), random_state(LLAMA),
                               Broken())


def hf_model(name):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2,
                 intermediate_size=24, max_position_embeddings=64, tie_word_embeddings=False)
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}
    config = {
        "gpt2": lambda: transformers.GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2,
                                                n_head=4),
        "llama": lambda: transformers.LlamaConfig(**sizes, rope_parameters=llama3),
        "llama biases": lambda: transformers.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True,
                                                         head_dim=6),
        "mistral": lambda: transformers.MistralConfig(**sizes, sliding_window=None),
        "qwen2": lambda: transformers.Qwen2Config(**sizes | {"tie_word_embeddings": True}),
    }[name]()
    torch.manual_seed(0)
    return transformers, transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("shard", [10 ** 9, 3000])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama biases", "mistral", "qwen2"])
def test_transformers_reads_what_we_write(tmp_path, monkeypatch, name, shard):
    transformers, theirs = hf_model(name)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)             # biases and norms too
    monkeypatch.setattr(model, "SHARD_BYTES", shard)
    theirs.save_pretrained(tmp_path / "hf")
    config = model.read_config(tmp_path / "hf")
    state = model.read_weights(tmp_path / "hf", config)
    tokenizer = model.read_tokenizer(byte_level(tmp_path / "tokenizer"))
    ids = torch.arange(24).reshape(2, 12) * 7
    for given_config in (config, dataclasses.replace(config, raw={})):    # its own config.json; one of ours
        out = tmp_path / f"ours{bool(given_config.raw)}"
        model.write_checkpoint(out, given_config, state, tokenizer)
        ours, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-6)
        pairs = zip(ours.state_dict().values(), theirs.state_dict().values())
        assert all(torch.equal(a, b) for a, b in pairs)


def test_fusing_by_hand(tmp_path):
    """q, k, v and gate, up are stacked by rows in this order; GPT-2's matrices are transposed."""
    tokenizer = model.read_tokenizer(byte_level(tmp_path / "tokenizer"))
    state = random_state(LLAMA)
    model.write_checkpoint(tmp_path / "llama", LLAMA, state, tokenizer)
    stored = load_file(tmp_path / "llama" / "model.safetensors")
    qkv = [stored[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(torch.cat(qkv), state["layers.1.qkv.weight"]) and [len(x) for x in qkv] == [16, 8, 8]
    gate, up = (stored[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(torch.cat([gate, up]), state["layers.0.up.weight"])
    state = random_state(GPT2)
    model.write_checkpoint(tmp_path / "gpt2", GPT2, state, tokenizer)
    stored = load_file(tmp_path / "gpt2" / "model.safetensors")
    assert torch.equal(stored["transformer.h.1.attn.c_attn.weight"].T, state["layers.1.qkv.weight"])
    assert torch.equal(stored["transformer.h.0.attn.c_proj.weight"].T, state["layers.0.out.weight"])
    assert torch.equal(stored["transformer.h.0.mlp.c_fc.weight"].T, state["layers.0.up.weight"])
    assert torch.equal(stored["transformer.h.0.mlp.c_proj.weight"].T, state["layers.0.down.weight"])
    assert "lm_head.weight" not in stored
    # The names of the original GPT-2 files, with their buffers.
    stored = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    stored |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4),
               "lm_head.weight": stored["wte.weight"].clone()}
    save_file(stored, tmp_path / "gpt2" / "model.safetensors")
    assert same(model.read_weights(tmp_path / "gpt2", GPT2), state)


# -------------------------------------------------------------------------------- damaged checkpoints
@pytest.fixture
def saved(tmp_path):
    model.write_checkpoint(tmp_path / "m", LLAMA, random_state(LLAMA),
                           model.read_tokenizer(byte_level(tmp_path / "t")))
    return tmp_path / "m" / "model.safetensors"


def header(content, length=None, data=b""):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


BAD_FILES = {
    "empty": b"", "cut in the length": b"\x01\x02", "announces terabytes": header({}, 2 ** 42),
    "announces all": header({}, 2 ** 64 - 1), "no json": header(b"{nonsense"), "list": header([]),
    "not utf-8": header(b'{"\xff": 1}'), "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
    "outside": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
    "huge shape": header({"a": {"dtype": "F32", "shape": [2 ** 62, 2 ** 62], "data_offsets": [0, 8]}}, None,
                         b"0" * 8),
    "backwards": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, None, b"0" * 8),
    "deep": header(b"[" * 100_000),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_damaged_safetensors(saved, kind):
    saved.write_bytes(BAD_FILES[kind])
    start = time.monotonic()
    with pytest.raises(InputError, match="model.safetensors"):
        model.read_weights(saved.parent, LLAMA)
    assert time.monotonic() - start < 5


def test_cut_and_flipped_safetensors(saved):
    whole = saved.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    for cut in (4, 100, end, end + 100, len(whole) - 1):
        saved.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="model.safetensors"):
            model.read_weights(saved.parent, LLAMA)
    for place in range(0, end, 7):      # a wrong byte in the header is an InputError or harmless
        saved.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1:])
        try:
            model.read_weights(saved.parent, LLAMA)
        except InputError:
            pass


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    (lambda t: t.update({"model.layers.7.x": torch.ones(1)}), "no place for: model.layers.7.x"),
    (lambda t: t.update({"lm_head.weight": torch.ones(300, 15)}), r"lm_head.weight has shape \(300, 15\)"),
    (lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}),
     "model.norm.weight .* type I8"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}),
     "no place for: .*q_proj.bias"),
])
def test_wrong_tensors_are_named(saved, change, message):
    tensors = load_file(saved)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)    # of old checkpoints; harmless
    save_file(tensors, saved)
    model.read_weights(saved.parent, LLAMA)
    change(tensors)
    save_file(tensors, saved)
    with pytest.raises(InputError, match=message):
        model.read_weights(saved.parent, LLAMA)


@pytest.mark.parametrize("name", ["../m2/x.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors",
                                  "a\\b", 7, None,
                                  ["a"], "absent.safetensors", "x\0y"])
def test_index_stays_in_its_directory(saved, name):
    (saved.parent.parent / "m2").mkdir()
    saved.rename(saved.parent.parent / "m2" / "x.safetensors")
    index = saved.parent / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(InputError, match="index.json|absent.safetensors"):
        model.read_weights(saved.parent, LLAMA)


def test_other_containers_are_refused(saved):
    saved.rename(saved.with_name("pytorch_model.bin"))
    with pytest.raises(InputError, match="pytorch_model.bin is a pickle.*convert"):
        model.read_weights(saved.parent, LLAMA)
    index = saved.parent / "model.safetensors.index.json"
    for content in ("{}", "[]", "{", '{"weight_map": {}}', '{"weight_map": [1]}', "[" * 100_000):
        index.write_text(content)
        with pytest.raises(InputError, match="index.json"):
            model.read_weights(saved.parent, LLAMA)
    saved.with_name("pytorch_model.bin").rename(saved.with_name("one.safetensors"))
    index.write_text(json.dumps({"weight_map": {"ghost": "one.safetensors"}}))
    with pytest.raises(InputError, match="one.safetensors: lacks ghost"):
        model.read_weights(saved.parent, LLAMA)


# -------------------------------------------------------------------------------- config.json
LLAMA_JSON = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 4,
              "intermediate_size": 48, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
              "hidden_act": "silu"}
GPT2_JSON = {"model_type": "gpt2", "vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4,
             "n_positions": 64,
             "activation_function": "gelu_new"}
OTHER = {"num_key_value_heads": 2}
LLAMA31 = {"rope_type": "llama3"} | SCALING


def read(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    return model.read_config(tmp_path)


def test_gpt2_config(tmp_path):
    assert read(tmp_path, GPT2_JSON) == Config(100, 64, 2, 32, 4, 4, 8, 128, "learned", "layer", "gelu",
                                               True, True, True,
                                               tied=True)


@pytest.mark.parametrize("change, expected", [
    ({}, {}),
    ({"num_key_value_heads": 2, "head_dim": 16}, {"kv_heads": 2, "head_size": 16}),
    ({"attention_bias": True}, {"qkv_bias": True, "out_bias": True}),
    ({"mlp_bias": True, "tie_word_embeddings": True}, {"mlp_bias": True, "tied": True}),
    ({"rope_theta": 500000.0, "rope_scaling": LLAMA31}, {"rope_theta": 5e5, "rope_scaling": SCALING}),
    ({"rope_theta": 500000, "rope_scaling": {"type": "llama3", **SCALING}},
     {"rope_theta": 5e5, "rope_scaling": SCALING}),
    ({"rope_parameters": {"rope_theta": 500000.0, **LLAMA31}}, {"rope_theta": 5e5, "rope_scaling": SCALING}),
    ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}, "dtype": "bfloat16"},
     {"rope_theta": 7.0}),
    ({"rope_scaling": None, "sliding_window": 8}, {}),                      # Llama has no such thing
    ({"model_type": "mistral", "sliding_window": None} | OTHER, {"kv_heads": 2}),
    ({"model_type": "mistral", "sliding_window": 4096} | OTHER, {"kv_heads": 2}),
    ({"model_type": "mistral", "sliding_window": 1024} | OTHER, {"kv_heads": 2, "context": 1024}),
    ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True} | OTHER,
     {"kv_heads": 2, "qkv_bias": True, "context": 8}),
    ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False} | OTHER,
     {"kv_heads": 2, "qkv_bias": True}),
])
def test_llama_configs(tmp_path, change, expected):
    plain = Config(100, 4096, 2, 32, 4, 4, 8, 48)
    assert read(tmp_path, LLAMA_JSON | change) == dataclasses.replace(plain, **expected)


@pytest.mark.parametrize("change, field", [
    ({"model_type": "mamba"}, "model_type"), ({"model_type": None}, "model_type"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"vocab_size": None}, "vocab_size"), ({"vocab_size": -1}, "vocab_size"),
    ({"vocab_size": 10 ** 12}, "vocab_size"),
    ({"vocab_size": "100"}, "vocab_size"), ({"vocab_size": True}, "vocab_size"),
    ({"hidden_size": 33}, "width"),
    ({"num_hidden_layers": 2 ** 20}, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_attention_heads": 0}, "num_attention_heads"), ({"head_dim": 7}, "head_dim"),
    ({"head_dim": 2.0}, "head_dim"),
    ({"max_position_embeddings": None}, "max_position_embeddings"), ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"), ({"rope_theta": -1}, "rope_theta"),
    ({"rope_theta": []}, "rope_theta"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
    ({"rope_scaling": "x"}, "rope_scaling"), ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
    ({"rope_scaling": LLAMA31 | {"factor": "8"}}, "factor"),
    ({"rope_scaling": LLAMA31 | {"low_freq_factor": 4}}, "low_freq"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotary"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"attention_bias": 1}, "attention_bias"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"), ({"model_type": "qwen2"}, "num_key_value_heads"),
    ({"hidden_size": 2 ** 20, "intermediate_size": 2 ** 24, "num_hidden_layers": 4096}, "parameters"),
])
def test_refused_configs(tmp_path, change, field):
    with pytest.raises(InputError, match=rf"config\.json.*{field}"):
        read(tmp_path, LLAMA_JSON | change)


@pytest.mark.parametrize("change", [{"activation_function": "relu"}, {"scale_attn_weights": False},
                                    {"add_cross_attention": True},
                                    {"scale_attn_by_inverse_layer_idx": True},
                                    {"reorder_and_upcast_attn": True}, {"n_embd": 30},
                                    {"n_inner": -4}, {"layer_norm_epsilon": 0}, {"n_layer": None}])
def test_refused_gpt2_configs(tmp_path, change):
    field = "width" if "n_embd" in change else next(iter(change))
    with pytest.raises(InputError, match=rf"config\.json.*{field}"):
        read(tmp_path, GPT2_JSON | change)


def nested(values):
    return st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "factor"]), values)


@quick
@given(st.sampled_from([*LLAMA_JSON, "head_dim", "rope_scaling", "rope_parameters", "sliding_window"]),
       st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), nested,
                    max_leaves=5))
def test_any_value_is_a_config_or_an_input_error(key, value):
    for base in (LLAMA_JSON, LLAMA_JSON | OTHER | {"model_type": "mistral"}):
        try:
            assert model.parameter_shapes(model.parse_config(base | {key: value}, "config.json"))
        except InputError as error:
            assert "config.json" in str(error) and "\n" not in str(error)


def test_config_that_no_architecture_has_is_not_written(tmp_path):
    tokenizer = model.read_tokenizer(byte_level(tmp_path / "t"))
    for change in ({"norm": "layer"}, {"out_bias": True}, {"qkv_bias": True, "mlp_bias": True}):
        config = dataclasses.replace(LLAMA, **change)
        with pytest.raises(InputError, match="no Hugging Face architecture"):
            model.write_checkpoint(tmp_path / "a", config, random_state(config), tokenizer)


def test_resolve(tmp_path):
    for name in ("absent", str(tmp_path)):
        with pytest.raises(InputError, match="not a model directory"):
            model.resolve(name)
    (tmp_path / "config.json").write_text("{}")
    assert model.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="config.json"):
        model.read_config(tmp_path / "absent")


# -------------------------------------------------------------------------------- byte-pair encoding
def naive_bpe(symbols, merges):
    """Join the best pair, leftmost first; start again. merges: {(left, right): (rank, joined)}."""
    symbols = list(symbols)
    while found := [(*merges[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:]))
                    if pair in merges]:
        rank, joined, i = min(found, key=lambda f: (f[0], f[2]))
        symbols[i:i + 2] = [joined]
    return symbols


@st.composite
def merge_lists(draw, letters="abc"):
    """A merge list in any order, also one that a trainer would never write."""
    tokens, merges = list(letters), []
    for _ in range(draw(st.integers(0, 14))):
        left, right = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if len(left + right) <= 6 and (left, right) not in merges:
            merges.append((left, right))
            tokens.append(left + right)
    return draw(st.permutations(merges))


@quick
@given(merge_lists(), st.text("abc", max_size=40))
def test_bpe_agrees_with_the_naive_one(merges, text):
    table = {pair: (rank, "".join(pair)) for rank, pair in enumerate(merges)}
    assert model.bpe(list(text), table) == naive_bpe(text, table)


@settings(max_examples=150, deadline=None, database=None)
@given(merge_lists(), st.lists(st.text("abc", min_size=2, max_size=5), max_size=4), st.booleans(),
       st.text("abc ", max_size=40))
def test_byte_level_agrees_with_the_naive_one(tmp_path_factory, merges, extra, ignore_merges, text):
    """Also where tiktoken's rule (any neighbours whose union is a token) and the merge list disagree."""
    directory = byte_level(tmp_path_factory.mktemp("t"), merges, extra, ignore_merges=ignore_merges)
    vocab = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    table, expected = {pair: (rank, "".join(pair)) for rank, pair in enumerate(merges)}, []
    for piece in regex.findall(model.GPT2_PATTERN, text):
        piece = piece.replace(" ", "Ġ")
        expected += [piece] if ignore_merges and piece in vocab else naive_bpe(piece, table)
    assert model.read_tokenizer(directory).encode(text) == [vocab[token] for token in expected]


@quick
@given(merge_lists("▁ab"), st.text("ab c\n", max_size=60))
def test_sentence_piece_agrees_with_the_naive_one(tmp_path_factory, merges, text):
    directory = sentence_piece(tmp_path_factory.mktemp("t"), merges=merges or [("a", "b")])
    vocab = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    table = {pair: (rank, "".join(pair)) for rank, pair in enumerate(merges or [("a", "b")])}
    marked = ("▁" + text if text else "").replace(" ", "▁")
    expected = naive_bpe([c if c in vocab else f"<0x{ord(c):02X}>" for c in marked], table)
    assert model.read_tokenizer(directory).encode(text) == [vocab[token] for token in expected]


def test_pre_tokenizers_by_hand(tmp_path):
    """Every word below is a token, taken only where it is a whole piece: the ids show the pieces."""
    words = ["Ġa", "12", "--", "ab"]
    one = {"type": "Digits", "individual_digits": True}
    letters = {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False}
    dash = letters | {"pattern": {"String": "--"}}
    for steps, text, pieces in [
            ([BYTES | {"use_regex": True}], " a12--", [" a", "12", "--"]),
            ([one, BYTES | {"use_regex": True}], " a12--", [" a", "1", "2", "--"]),
            ([one | {"individual_digits": False}, BYTES], "ab12--", ["ab", "12", "--"]),
            ([letters, BYTES], "12ab--", ["12", "ab", "--"]),       # what the pattern leaves is a piece
            ([dash, BYTES], "12--ab", ["12", "--", "ab"]), ([BYTES], "12", ["12"]),
            ([BYTES], "12ab", ["1", "2", "a", "b"])]:
        directory = byte_level(tmp_path, (), words, ignore_merges=True,
                               pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
        vocab = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
        expected = [vocab[piece.replace(" ", "Ġ")] for piece in pieces]
        assert model.read_tokenizer(directory).encode(text) == expected
    plain = model.read_tokenizer(byte_level(tmp_path, ()))
    nfc = model.read_tokenizer(byte_level(tmp_path, (), normalizer={"type": "NFC"}))
    assert nfc.encode("e\u0301") == plain.encode("\u00e9") != plain.encode("e\u0301")
    lacking = model.read_tokenizer(byte_level(tmp_path, (("a", "b"),), without="c"))
    assert lacking.decode(lacking.encode("acb c a")) == "ab  a" and len(lacking.encode("acb")) == 1
    split = model.read_tokenizer(sentence_piece(tmp_path, normalizer=None,
                                                pre_tokenizer=METASPACE | {"split": True}))
    assert len(split.encode("  ")) == 2
    assert len(model.read_tokenizer(sentence_piece(tmp_path, normalizer=None,
                                                   pre_tokenizer=METASPACE)).encode("  ")) == 1


LLAMA3_SPLIT = {"type": "Split", "pattern": {"Regex": model.LLAMA3_PATTERN}, "behavior": "Isolated",
                "invert": False}
QWEN_SPLIT = LLAMA3_SPLIT | {"pattern": {"Regex": model.LLAMA3_PATTERN.replace("{1,3}", "")}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
STYLES = {
    "gpt2": BYTES | {"use_regex": True},
    "llama3": {"type": "Sequence", "pretokenizers": [LLAMA3_SPLIT, BYTES]},
    "qwen2": {"type": "Sequence", "pretokenizers": [QWEN_SPLIT, BYTES]},
    "smollm2": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
                                                      BYTES | {"use_regex": True}]},
    "gaps": {"type": "Sequence", "pretokenizers": [LLAMA3_SPLIT | {"pattern": {"Regex": "[a-z]+|[0-9]"}},
                                                   BYTES]},
    "none": BYTES,
}


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_byte_level_equals_hugging_face(tmp_path, style, ignore_merges, pairs):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    content = json.loads(theirs.to_str())
    content["pre_tokenizer"] = STYLES[style]
    content["normalizer"] = {"type": "NFC"} if style == "qwen2" else None
    content["model"]["ignore_merges"] = ignore_merges
    merges = content["model"]["merges"]
    content["model"]["merges"] = merges[:200:-1] + merges[:150]     # a wild order, tokens out of reach
    if not pairs:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    ours = model.read_tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))

    @quick
    @given(st.text(max_size=30) | st.text("abt hes'\n\t ①1９é́日👍🏽", max_size=40) | st.sampled_from(NASTY))
    def compare(text):
        # Unassigned characters are left out: the Unicode of `regex` and of `tokenizers` differ by a year.
        text = "".join(c for c in text if unicodedata.category(c) != "Cn")
        assert ours.encode(text) == theirs.encode(text).ids
        if style != "qwen2":
            assert ours.decode(ours.encode(text)) == text

    compare()
    for text in (*NASTY, TEXT):
        assert ours.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("scheme", ["legacy", "first", "always", "never"])
@pytest.mark.parametrize("split", [False, True])
def test_sentence_piece_equals_hugging_face(tmp_path, scheme, split):
    tokenizers = pytest.importorskip("tokenizers")
    style = {} if scheme == "legacy" else {"normalizer": None, "pre_tokenizer": METASPACE | {
        "prepend_scheme": scheme, "split": split}}
    directory = sentence_piece(tmp_path, **style)
    content = json.loads((directory / "tokenizer.json").read_text())
    content |= {"added_tokens": [], "post_processor": None}
    theirs, ours = tokenizers.Tokenizer.from_str(json.dumps(content)), model.read_tokenizer(directory)

    @quick
    @given(st.text(max_size=30) | st.text("and the▁ <s>\n", max_size=40))
    def compare(text):
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text, start=False)) == text.replace("▁", " ")

    compare()
    for text in (*NASTY, TEXT):
        assert ours.encode(text) == theirs.encode(text).ids
    # Whole prompts: Hugging Face encodes each stretch of text between control tokens by itself.
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    zephyr = model.read_tokenizer(directory, "zephyr")
    for user in ("the end", " and", "", "the\n\n"):
        assert zephyr.prompt(user) == theirs.encode(f"<|user|>\n{user}</s>\n<|assistant|>\n").ids


# -------------------------------------------------------------------------------- real tokenizers
@needs_stories
def test_stories_tokenizer():
    ours = model.read_tokenizer(STORIES)
    assert (ours.bos, ours.end, ours.stop_ids, ours.chat, ours.vocab_size) == (None, 2, (2, 1), "plain", 512)
    assert ours.raw("Once upon a time") == [403, 407, 261, 378]  # no post-processor, so no bos
    for text in NASTY:
        assert ours.decode(ours.encode(text, start=False)) == text
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    theirs = tokenizers.Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(STORIES)
    for text in [text for text in [*NASTY, TEXT] if "<s>" not in text]:
        assert ours.encode(text) == theirs.encode(text).ids
        if not text.startswith(" "):        # transformers 5 replaces this file's normalizer by Metaspace
            assert ours.raw(text) == auto.encode(text)


@needs_stories
def test_stories_greedy_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, config = model.read_tokenizer(STORIES), model.read_config(STORIES)
    model.write_checkpoint(tmp_path / "m", config, model.read_weights(STORIES, config), ours)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = ours.raw("Once upon a time")
    out = network.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40)[0, len(ids):].tolist()
    assert ours.decode(out).startswith(", there was a little girl named Lily. ")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m").encode("a</s>")[-1] == 2


@pytest.fixture(scope="module")
def llama3():
    return model.read_tokenizer(LLAMA3, "llama3")


@needs_llama3
def test_llama3_rank_file(llama3):
    lines = (LLAMA3 / "tokenizer.model").read_bytes().split(b"\n")
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines if line)}
    plain = tiktoken.Encoding("x", pat_str=model.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in (*NASTY, TEXT):
        assert llama3.encode(text) == plain.encode_ordinary(text)
        assert llama3.decode(llama3.encode(text)) == text
    assert (llama3.bos, llama3.end, llama3.stop_ids) == (128000, 128009, (128009, 128001))
    assert llama3.vocab_size == 128256
    # 882 "user", 271 "\n\n", 6151 "hi", 78191 "assistant"
    assert llama3.prompt(" hi\n") == [128000, 128006, 882, 128007, 271, 6151, 128009, 128006, 78191, 128007,
                                      271]
    assert llama3.control["<|reserved_special_token_250|>"] == 128250


@needs_llama3
def test_llama3_as_converted_by_transformers(tmp_path, llama3):
    converters = pytest.importorskip("transformers.convert_slow_tokenizer")
    tokenizers = pytest.importorskip("tokenizers")
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    converter = converters.TikTokenConverter(str(LLAMA3 / "tokenizer.model"), model.LLAMA3_PATTERN,
                                             extra_special_tokens=names)
    converter.converted().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>"}')
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    ours = model.read_tokenizer(tmp_path)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
    for text in (*NASTY, TEXT):
        assert ours.encode(text) == llama3.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("content", ["", "IQ== 0\n", "IQ== x\n", "!! 0\n", "\x0a\x0e<unk>\x15", "IQ== 0 1\n",
                                     "IQ==\n"])
def test_damaged_rank_file(tmp_path, content):
    (tmp_path / "tokenizer.model").write_text(content)
    with pytest.raises(InputError, match="tokenizer.model"):
        model.read_tokenizer(tmp_path)


# -------------------------------------------------------------------------------- control tokens and chats
FORMATS = [("llama3", "<|eot_id|>"), ("chatml", "<|im_end|>"), ("plain", "<|endoftext|>"),
           ("zephyr", "<|endoftext|>")]


@pytest.mark.parametrize("chat, end", FORMATS)
def test_text_never_becomes_a_control_token(tmp_path, chat, end):
    tokenizer = model.read_tokenizer(byte_level(tmp_path, ignore_merges=True), chat)
    control = set(tokenizer.control.values())
    text = " ".join([*SPECIAL, "<tool>", "</s>"])
    assert not control & set(tokenizer.encode(text)) and tokenizer.decode(tokenizer.encode(text)) == text
    roles = ("system", "user", "assistant", "user")
    clean, attack = (tokenizer.prompt([{"role": role, "content": content} for role in roles])
                     for content in ("x", text))
    assert [i for i in clean if i in control] == [i for i in attack if i in control]
    assert tokenizer.answer(text) == tokenizer.encode(text) + [tokenizer.end]
    assert tokenizer.end == tokenizer.control[end] and tokenizer.end in tokenizer.stop_ids


def test_control_words_that_merges_could_spell(tmp_path):
    """<s> is a control token here, and a merge makes it out of text: not for us."""
    merges = [("<", "s"), ("<s", ">"), ("a", "b")]
    directory = sentence_piece(tmp_path, merges=merges)
    content = json.loads((directory / "tokenizer.json").read_text())
    assert content["model"]["vocab"]["<s>"] == 1
    assert 1 not in model.read_tokenizer(directory).encode("<s>ab<s>")


def test_chat_formats(tmp_path):
    """Each format written out; the ids of text are those of its bytes, as this tokenizer has no merges."""
    directory = byte_level(tmp_path, merges=())
    turns = [{"role": "system", "content": " Be "}, {"role": "user", "content": "Hi\n"},
             {"role": "assistant", "content": "Yo"},
             {"role": "user", "content": "?"}]
    written = {
        "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe<|eot_id|>"
                  "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                  "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
                  "<|start_header_id|>user<|end_header_id|>\n\n?<|eot_id|>"
                  "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "chatml": "<|im_start|>system\n Be <|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n"
                  "<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\n?<|im_end|>\n"
                  "<|im_start|>assistant\n",
        "zephyr": "<|system|>\n Be <|endoftext|>\n<|user|>\nHi\n<|endoftext|>\n"
                  "<|assistant|>\nYo<|endoftext|>\n<|user|>\n?<|endoftext|>\n<|assistant|>\n",
        "plain": " Be \nHi\n\nYo\n?\n"}
    for chat, text in written.items():
        tokenizer = model.read_tokenizer(directory, chat)
        names = {i: name for name, i in tokenizer.control.items()}
        assert "".join(names.get(i) or tokenizer.decode([i]) for i in tokenizer.prompt(turns)) == text
        assert tokenizer.prompt("Hi") == tokenizer.prompt([{"role": "user", "content": "Hi"}])
    for bad in ([{"role": "tool", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": 3}]):
        with pytest.raises(InputError, match="a message needs"):
            tokenizer.prompt(bad)


def test_zephyr_sections(tmp_path):
    """Zephyr's own kind of tokenizer: <|user|> is plain text, and each stretch of text gets its own "▁"."""
    tokenizer = model.read_tokenizer(sentence_piece(tmp_path), "zephyr")
    first, second = "<|user|>\na </s>", "\n<|assistant|>\n"
    assert tokenizer.prompt("a </s>") == [1, *tokenizer.encode(first), 2, *tokenizer.encode(second)]
    assert tokenizer.answer("a") == [*tokenizer.encode("a", start=False), 2]
    modern = model.read_tokenizer(sentence_piece(tmp_path, normalizer=None, pre_tokenizer=METASPACE),
                                  "zephyr")
    assert modern.prompt("a") == [1, *modern.encode("<|user|>\na"), 2, *modern.encode(second, start=False)]


LLAMA3_TEMPLATE = "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n...<|eot_id|>"
CHATML_TEMPLATE = "{% for m in messages %}{{'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>'}}"
ZEPHYR_TEMPLATE = "{{ '<|user|>\n' + message['content'] + eos_token }}{{ '<|assistant|>' }}"


def test_chat_is_recognised(tmp_path):
    for template, chat in [(LLAMA3_TEMPLATE, "llama3"), (CHATML_TEMPLATE, "chatml"),
                           (ZEPHYR_TEMPLATE, "zephyr"),
                           (None, "plain"), ([{"name": "default", "template": CHATML_TEMPLATE}], "chatml")]:
        assert model.read_tokenizer(byte_level(tmp_path, settings={"chat_template": template})).chat == chat
    phi = "{{ '<|user|>' + m.content + '<|end|>' + '<|assistant|>' }}{{ eos_token }}"
    for template in ("[INST] {{ content }} [/INST]", phi, LLAMA3_TEMPLATE + CHATML_TEMPLATE):
        directory = byte_level(tmp_path, settings={"chat_template": template})
        with pytest.raises(InputError, match="--chat"):
            model.read_tokenizer(directory)
        assert model.read_tokenizer(directory, "plain").chat == "plain"
    (tmp_path / "chat_template.jinja").write_text(ZEPHYR_TEMPLATE)
    assert model.read_tokenizer(tmp_path).chat == "zephyr"
    with pytest.raises(InputError, match="unknown"):
        model.read_tokenizer(tmp_path, "alpaca")
    sentence_piece(tmp_path)
    with pytest.raises(InputError, match=r"no <\|eot_id\|>.*--chat"):
        model.read_tokenizer(tmp_path, "llama3")


def test_bos_and_stop_ids(tmp_path):
    bos = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "B"}},
                                                    {"Sequence": {"id": "A"}}],
           "special_tokens": {"B": {"ids": [260]}}}
    both = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, bos]}
    for processor, config, expected in [(None, {}, None), (bos, {}, 260), (both, {}, 260),
                                        (None, {"add_bos_token": True, "bos_token": "<|begin_of_text|>"},
                                         None)]:  # the post-processor alone decides, as in transformers 5
        tokenizer = model.read_tokenizer(byte_level(tmp_path, post_processor=processor, settings=config))
        assert tokenizer.bos == expected
        assert tokenizer.raw("a")[:-1] == ([] if expected is None else [expected])
        assert tokenizer.prompt("a") == tokenizer.raw("a\n")
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 259]}')
    assert model.read_tokenizer(tmp_path, "chatml").stop_ids == (265, 259, 8, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(InputError, match="generation_config.json: eos_token_id"):
        model.read_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = model.read_tokenizer(tmp_path)
    assert tokenizer.stop_ids == (7,) and tokenizer.decode([6, 7]) == tokenizer.decode([6]) != ""
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="eos_token"):
        model.read_tokenizer(tmp_path)


def test_decode(tmp_path):
    for tokenizer in (model.read_tokenizer(byte_level(tmp_path / "a")),
                      model.read_tokenizer(sentence_piece(tmp_path / "b"))):
        text = " the é日👍\ttail "
        ids = tokenizer.encode(text, start=False)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.end, 10 ** 9]) == text and tokenizer.decode([]) == ""
        for n in range(len(ids)):                           # a stream cut anywhere, also inside a character
            assert text.startswith(tokenizer.decode(ids[:n]).rstrip("\ufffd"))
        assert tokenizer.decode(tokenizer.encode("é")[-1:]) == "\ufffd"
        assert tokenizer.decode(torch.tensor(ids)) == text
        assert tokenizer.encode("\ud800x") == tokenizer.encode("\ufffdx")
        assert tokenizer.encode("\ud83d\udc4d") == tokenizer.encode("👍")
    tokenizer = model.read_tokenizer(tmp_path / "a")
    assert tokenizer.decode([tokenizer.control["<tool>"], tokenizer.control["<|im_end|>"]]) == "<tool>"
    assert tokenizer.decode(model.read_tokenizer(tmp_path / "a", "chatml").answer("x")) == "x"


def sequence(*steps):
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps]}}


@pytest.mark.parametrize("change, message", [
    ({"model": {"type": "Unigram", "vocab": []}}, "BPE"), ({"model": None}, "BPE"),
    ({"model": {"type": "WordLevel"}}, "BPE"),
    ({"model": {"vocab": {"a": 0, "b": 0}, "merges": []}}, "vocab"),
    ({"model": {"vocab": {"a": -1}, "merges": []}}, "vocab"),
    ({"model": {"vocab": {"a": [1]}, "merges": []}}, "vocab"),
    ({"model": {"vocab": {"a": 1}, "merges": ["a b"]}}, "merges"),
    ({"model": {"vocab": {"a": 1}, "merges": None}}, "merges"),
    ({"model": {"vocab": {"a": 1}, "merges": [5]}}, "merges"),
    ({"model": {"vocab": {"a": 1}, "merges": [["a"]]}}, "merges"),
    ({"model": {"vocab": {"a": 1}, "dropout": 0.1}}, "dropout"),
    ({"model": {"vocab": {"a": 1}, "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    ({"normalizer": {"type": "Lowercase"}}, "normalizer"), ({"normalizer": 3}, "normalizer"),
    ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "pre_tokenizer"),
    ({"pre_tokenizer": None}, "byte_fallback"),
    (sequence({"type": "Punctuation"}, BYTES), "Punctuation"),
    (sequence(BYTES, LLAMA3_SPLIT), "pre_tokenizer"),
    (sequence(LLAMA3_SPLIT | {"behavior": "Removed"}, BYTES), "Split"),
    (sequence(LLAMA3_SPLIT | {"pattern": {"Regex": "(["}}, BYTES), "pattern"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 5}}, "pre_tokenizer"),
    ({"post_processor": {"type": "RobertaProcessing"}}, "post_processor"),
    ({"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x"}}]}},
     "post_processor"),
    ({"post_processor": {"type": "TemplateProcessing", "single": ["x"]}}, "post_processor"),
    ({"post_processor": {"type": "TemplateProcessing", "single": 5}}, "post_processor"),
    ({"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": 3}]}}, "post_processor"),
    ({"added_tokens": [{"content": "x"}]}, "added_tokens"), ({"added_tokens": 5}, "added_tokens"),
    ({"added_tokens": [{"content": "a", "id": 9999}]}, "added_tokens"),
])
def test_refused_tokenizers(tmp_path, change, message):
    byte_level(tmp_path, **change)
    with pytest.raises(InputError, match=rf"tokenizer\.json.*{message}"):
        model.read_tokenizer(tmp_path)


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Replace", "pattern": {"Regex": " "}, "content": "▁"}}, {"normalizer": None},
    {"normalizer": None, "pre_tokenizer": METASPACE | {"replacement": "_"}}, {"pre_tokenizer": METASPACE},
    {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "x"}}])
def test_refused_sentence_piece(tmp_path, change):
    with pytest.raises(InputError, match=r"tokenizer\.json: its normalizer and pre_tokenizer"):
        model.read_tokenizer(sentence_piece(tmp_path, **change))


def test_joins_of_byte_tokens_are_refused(tmp_path):
    with pytest.raises(InputError, match="byte tokens"):
        model.read_tokenizer(sentence_piece(tmp_path, merges=[("<0x41>", "a")]))


def test_unreadable_tokenizer(tmp_path):
    with pytest.raises(InputError, match="no tokenizer.json"):
        model.read_tokenizer(tmp_path)
    for content in ("", "[]", "{", "\xff", "[" * 100_000):
        (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
        with pytest.raises(InputError, match="tokenizer.json"):
            model.read_tokenizer(tmp_path)


def test_long_texts_take_linear_time(tmp_path):
    letters = model.read_tokenizer(byte_level(tmp_path / "a"))
    pieces = model.read_tokenizer(sentence_piece(tmp_path / "b"))
    start = time.monotonic()
    assert len(letters.encode(" " * 1_100_000 + "x")) == 1_100_001       # tiktoken alone panics here
    assert len(letters.encode("the" * 100_000)) == 100_000
    assert len(pieces.encode(" " * 200_000)) == 100_001
    assert len(pieces.encode("the end " * 20_000)) == 80_001
    assert time.monotonic() - start < 20
