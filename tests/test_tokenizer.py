"""data/tokenizer.py against something simpler: tokenizers, transformers, naive code, handmade files."""
import base64
import json
import time
import unicodedata
from pathlib import Path

import pytest
import regex
import tiktoken
import torch
from fuzz import damaged, dumped, fuzz, loaded, mutated
from hypothesis import given
from hypothesis import strategies as st

from data import tiny
from data import tokenizer as code
from data.files import InputError
from data.tokenizer import read_tokenizer
from model import PRESETS

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
STORIES, LLAMA3 = REAL / "stories260k", REAL / "llama3"
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="no stories260k here")
needs_llama3 = pytest.mark.skipif(not LLAMA3.exists(), reason="no Llama-3 tokenizer here")

NASTY = [
    "", " ", "a", "  two  spaces ", "\t \n  x", "don't WE'LL 'D", "'\u017f 's",
    "he\u0301llo \u1e9b\u0323 \ufb01", "日本語 123456 ７８ ⅷ½", "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪",
    "\x00\x01\x7f\x85\u200b\ufeff\x1c", "a\u3000b\u00a0c\u2028",
    "مرحبا שלום", "<|endoftext|></s><s><unk><|im_end|><|eot_id|>", "a" * 300, "the" * 100, " " * 77 + "x",
    "\r\n\r\n x\r", "𝔘\u0378\U000e0001\U0010ffff", "1 22 333 4444 55555", "<0x41>", "x_y  __z", "\ufffd"]
TEXT = ("The cat sat on the mat, and the other cat didn't. It's 1234 past 10; they're here!\n\n  "
        "Naïve café — über 日本語のテキスト 👍👍🏽 مرحبا\tthe end.\r\n") * 30
SPECIAL = ["<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<|im_start|>", "<|im_end|>"]
FLAGS = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
GPT2_BYTES = BYTES | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
LETTERS = {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated", "invert": False}
LLAMA3_SPLIT = LETTERS | {"pattern": {"Regex": code.LLAMA3_PATTERN}}
QWEN_SPLIT = LETTERS | {"pattern": {"Regex": code.LLAMA3_PATTERN.replace("{1,3}", "")}}
BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "B"}}, {"Sequence": {"id": "A"}}],
       "special_tokens": {"B": {"id": "B", "ids": [260], "tokens": ["B"]}}}
LLAMA3_TEMPLATE = "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n...<|eot_id|>"
CHATML_TEMPLATE = "{% for m in messages %}{{'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>'}}"
SMOLLM2_SYSTEM = PRESETS["smollm2-135m-instruct"].settings["system"]
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>"
    "\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ZEPHYR_TEMPLATE = "{{ '<|user|>\n' + message['content'] + eos_token }}{{ '<|assistant|>' }}"

def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}

def write(directory, content, settings):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory

def vocab_of(directory):
    return json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]

def byte_level(directory, merges=(("t", "h"), ("th", "e"), ("Ġ", "the")), extra=(), settings=(), without="",
               ignore_merges=False, **changes):
    """A small byte-level tokenizer: 256 bytes (ids 0-255), the merges, extra tokens, SPECIAL and <tool>.

    Ids run against the order of the merges, so that nothing works by taking the one for the other.
    """
    joined = reversed([*("".join(pair) for pair in merges), *extra])
    tokens = [letter for letter in sorted(code.LETTERS) if letter not in without]
    tokens += [token for token in dict.fromkeys(joined) if token not in tokens]
    added = [{"id": len(tokens) + i, "content": content, "special": content != "<tool>"} | FLAGS
             for i, content in enumerate([*SPECIAL, "<tool>"])]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)},
             "merges": [" ".join(m) for m in merges], "ignore_merges": ignore_merges}
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content = {"version": "1.0", "added_tokens": added, "normalizer": None, "model": model,
               "post_processor": None, "pre_tokenizer": pre}
    return write(directory, content | changes, {"eos_token": "<|endoftext|>"} | dict(settings))

def sentence_piece(directory, merges=None, **changes):
    """A small byte-fallback tokenizer: <unk> <s> </s>, 256 byte tokens, letters, merges."""
    merges = merges or [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁", "a"), ("n", "d")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdehnorst<>/|.user"]
    tokens = list(dict.fromkeys([*tokens, *(a + b for a, b in merges)]))
    normalizer = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    added = [{"id": i, "content": tokens[i], "special": True} | FLAGS for i in range(3)]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
             "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    bos = {"type": "TemplateProcessing", "pair": [],
           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
           "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}
    content = {"version": "1.0", "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": None,
               "post_processor": bos, "model": model}
    return write(directory, content | changes, {"eos_token": {"content": "</s>"}, "bos_token": "<s>"})

# ---------------------------------------------------------------------------------------- byte-pair encoding
def naive_bpe(symbols, merges):
    """Join the best pair, leftmost first; start again. merges: {(left, right): (rank, joined)}."""
    symbols = list(symbols)
    while found := [(*merges[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:])) if pair in merges]:
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

def table_of(merges):
    return {pair: (rank, "".join(pair)) for rank, pair in enumerate(merges)}

@fuzz(150)
@given(merge_lists(), st.lists(st.text("abc", min_size=2, max_size=5), max_size=4), st.booleans(),
       st.text("abc ", max_size=40))
def test_byte_level_agrees_with_the_naive_one(tmp_path_factory, merges, extra, ignore_merges, text):
    """Also where tiktoken's rule (any neighbours whose union is a token) and the merge list disagree."""
    directory = byte_level(tmp_path_factory.mktemp("t"), merges, extra, ignore_merges=ignore_merges)
    vocab, expected = vocab_of(directory), []
    for piece in regex.findall(code.GPT2_PATTERN, text):
        piece = piece.replace(" ", "Ġ")
        expected += [piece] if ignore_merges and piece in vocab else naive_bpe(piece, table_of(merges))
    assert read_tokenizer(directory).encode(text) == [vocab[token] for token in expected]

@fuzz(60)
@given(merge_lists("▁ab"), st.text("ab c\n", max_size=60))
def test_sentence_piece_agrees_with_the_naive_one(tmp_path_factory, merges, text):
    merges = merges or [("a", "b")]
    directory = sentence_piece(tmp_path_factory.mktemp("t"), merges=merges)
    vocab, marked = vocab_of(directory), ("▁" + text if text else "").replace(" ", "▁")
    expected = naive_bpe([c if c in vocab else f"<0x{ord(c):02X}>" for c in marked], table_of(merges))
    assert read_tokenizer(directory).encode(text) == [vocab[token] for token in expected]

@pytest.mark.parametrize("steps, text, pieces", [
    ([GPT2_BYTES], " a12--", [" a", "12", "--"]), ([DIGITS, GPT2_BYTES], " a12--", [" a", "1", "2", "--"]),
    ([DIGITS | {"individual_digits": False}, BYTES], "ab12--", ["ab", "12", "--"]),
    ([LETTERS, BYTES], "12ab--", ["12", "ab", "--"]),  # what the pattern leaves is a piece
    ([LETTERS | {"pattern": {"String": "--"}}, BYTES], "12--ab", ["12", "--", "ab"]),
    ([BYTES], "12", ["12"]), ([BYTES], "12ab", ["1", "2", "a", "b"])])
def test_pre_tokenizers_by_hand(tmp_path, steps, text, pieces):
    """Every word below is a token, taken only where it is a whole piece: the ids show the pieces."""
    directory = byte_level(tmp_path, (), ["Ġa", "12", "--", "ab"], ignore_merges=True,
                           pre_tokenizer=sequence(*steps))
    expected = [vocab_of(directory)[piece.replace(" ", "Ġ")] for piece in pieces]
    assert read_tokenizer(directory).encode(text) == expected

def test_normalizer_missing_bytes_and_split(tmp_path):
    plain = read_tokenizer(byte_level(tmp_path, ()))
    nfc = read_tokenizer(byte_level(tmp_path, (), normalizer={"type": "NFC"}))
    assert nfc.encode("e\u0301") == plain.encode("\u00e9") != plain.encode("e\u0301")
    lacking = read_tokenizer(byte_level(tmp_path, (("a", "b"),), without="c"))
    assert lacking.decode(lacking.encode("acb c a")) == "ab  a" and len(lacking.encode("acb")) == 1
    for split, count in ((True, 2), (False, 1)):
        pre = METASPACE | {"split": split}
        tokenizer = read_tokenizer(sentence_piece(tmp_path, normalizer=None, pre_tokenizer=pre))
        assert len(tokenizer.encode("  ")) == count

STYLES = {"gpt2": GPT2_BYTES, "llama3": sequence(LLAMA3_SPLIT, BYTES), "qwen2": sequence(QWEN_SPLIT, BYTES),
          "smollm2": sequence(DIGITS, GPT2_BYTES), "none": BYTES,
          "gaps": sequence(LETTERS | {"pattern": {"Regex": "[a-z]+|[0-9]"}}, BYTES)}

def check_against_hugging_face(directory, texts):
    """Our ids are those of the package tokenizers, which must be told not to look for special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    content = json.loads((directory / "tokenizer.json").read_text())
    content |= {"added_tokens": [], "post_processor": None}
    theirs, ours = tokenizers.Tokenizer.from_str(json.dumps(content)), read_tokenizer(directory)
    @fuzz(60)
    @given(st.text(max_size=30) | texts)
    def compare(text):
        # Unassigned characters are left out: the Unicode of `regex` and of `tokenizers` differ by a year.
        text = "".join(c for c in text if unicodedata.category(c) != "Cn")
        assert ours.encode(text) == theirs.encode(text).ids
    compare()
    for text in (*NASTY, TEXT):
        assert ours.encode(text) == theirs.encode(text).ids

@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_byte_level_equals_hugging_face(tmp_path, style, ignore_merges):
    alphabet = tiny.byte_alphabet()
    words = {"".join(alphabet[b] for b in word.encode()) for word in regex.findall(r" ?\w+", TEXT)}
    merges = tiny.train_merges(words)
    tokens = ["".join(pair) for pair in merges]
    wild = merges[:60:-1] + merges[:40]  # in a wild order, and some tokens are out of reach
    normalizer = {"type": "NFC"} if style == "qwen2" else None
    byte_level(tmp_path, wild, tokens, ignore_merges=ignore_merges, normalizer=normalizer,
               pre_tokenizer=STYLES[style])
    check_against_hugging_face(tmp_path, st.text("abt hes'\n\t ①1９é́日👍🏽", max_size=40))

@pytest.mark.parametrize("scheme", ["legacy", "first", "always", "never"])
@pytest.mark.parametrize("split", [False, True])
def test_sentence_piece_equals_hugging_face(tmp_path, scheme, split):
    pre = METASPACE | {"prepend_scheme": scheme, "split": split}
    style = {} if scheme == "legacy" else {"normalizer": None, "pre_tokenizer": pre}
    check_against_hugging_face(sentence_piece(tmp_path, **style), st.text("and the▁ <s>\n", max_size=40))

def test_long_texts_take_linear_time(tmp_path):
    letters = read_tokenizer(byte_level(tmp_path / "a"))
    pieces, start = read_tokenizer(sentence_piece(tmp_path / "b")), time.monotonic()
    assert len(letters.encode(" " * 1_100_000 + "x")) == 1_100_001  # tiktoken alone panics here
    assert len(letters.encode("the" * 100_000)) == 100_000
    assert len(pieces.encode(" " * 200_000)) == 100_001
    assert len(pieces.encode("the end " * 20_000)) == 80_001
    assert time.monotonic() - start < 20

# ---------------------------------------------------------------------------------------- real tokenizers
@needs_stories
def test_stories_tokenizer():
    ours = read_tokenizer(STORIES)
    assert (ours.bos, ours.end, ours.stop_ids, ours.chat, ours.vocab_size) == (None, 2, (2, 1), "plain", 512)
    assert ours.raw("Once upon a time") == [403, 407, 261, 378]  # no post-processor, so no bos
    for text in NASTY:
        assert ours.decode(ours.encode(text, start=False)) == text
    check_against_hugging_face(STORIES, st.text("Once upon\n", max_size=40))

@needs_llama3
def test_llama3_rank_file_and_what_transformers_makes_of_it(tmp_path):
    llama3 = read_tokenizer(LLAMA3, "llama3")
    lines = (LLAMA3 / "tokenizer.model").read_bytes().split(b"\n")
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines if line)}
    plain = tiktoken.Encoding("x", pat_str=code.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in (*NASTY, TEXT):
        assert llama3.encode(text) == plain.encode_ordinary(text)
        assert llama3.decode(llama3.encode(text)) == text
    assert (llama3.bos, llama3.end, llama3.stop_ids) == (128000, 128009, (128009, 128001))
    assert llama3.vocab_size == 128256 and llama3.special_tokens["<|reserved_special_token_250|>"] == 128250
    # 882 "user", 271 "\n\n", 6151 "hi", 78191 "assistant"
    assert llama3.prompt(" hi\n") == [
        128000, 128006, 882, 128007, 271, 6151, 128009, 128006, 78191, 128007, 271]
    converters = pytest.importorskip("transformers.convert_slow_tokenizer")
    converter = converters.TikTokenConverter(str(LLAMA3 / "tokenizer.model"), code.LLAMA3_PATTERN,
                                             extra_special_tokens=["<|begin_of_text|>", "<|end_of_text|>"])
    converter.converted().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>"}')
    ours = read_tokenizer(tmp_path)
    for text in (*NASTY, TEXT):
        assert ours.encode(text) == llama3.encode(text)

# ---------------------------------------------------------------------------------------- chats
FORMATS = dict(llama3="<|eot_id|>", chatml="<|im_end|>", plain="<|endoftext|>", zephyr="<|endoftext|>")
MARKS = [*"ab <|>", *SPECIAL, "<tool>", "</s>", "<s>", "<unk>", "<0x41>", "system", "user", "assistant", "\n"]

def test_text_never_becomes_a_special_token(tmp_path):
    """Not even where a merge makes it: <s> is a special token of the second tokenizer."""
    merges = [("<", "s"), ("<s", ">"), ("a", "b")]
    both = byte_level(tmp_path / "a", ignore_merges=True), sentence_piece(tmp_path / "b", merges)
    assert vocab_of(both[1])["<s>"] == 1
    readers = [read_tokenizer(both[0], chat) for chat in FORMATS]
    assert [reader.special_tokens[end] for reader, end in zip(readers, FORMATS.values())] == [
        reader.end for reader in readers] == [reader.stop_ids[0] for reader in readers]
    readers += [read_tokenizer(both[1], chat) for chat in ("plain", "zephyr")]
    @fuzz(60)
    @given(st.lists(st.sampled_from(MARKS), max_size=12).map("".join) | st.just(" ".join(MARKS)),
           st.sampled_from(["system", "user", "assistant"]))
    def check(text, role):
        for tokenizer in readers:
            special = {*tokenizer.special_tokens.values()}
            clean, attack = (
                tokenizer.prompt([{"role": role, "content": content}, {"role": "user", "content": content}])
                for content in ("x", text))
            assert [i for i in clean if i in special] == [i for i in attack if i in special]
            ids = tokenizer.encode(text, start=False)
            assert not special & {*ids} and tokenizer.decode(ids) == text
            assert tokenizer.answer(text) == ids + [tokenizer.end]
    check()

@pytest.mark.parametrize("chat, before, after, end", [
    ("llama3", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>"),
    ("chatml", "<|im_start|>{}\n", "<|im_end|>\n", "<|im_end|>\n"), ("plain", "", "\n", "<|endoftext|>"),
    ("zephyr", "<|{}|>\n", "<|endoftext|>\n", "<|endoftext|>\n")])
def test_chat_formats(chat, before, after, end, tmp_path):
    """What stands around each message. The ids of text are those of its bytes: there are no merges."""
    tokenizer, text = read_tokenizer(byte_level(tmp_path, merges=()), chat), ""
    turns = [{"role": "system", "content": " Be "}, {"role": "user", "content": "Hi\n"},
             {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "?"}]
    for turn in turns:
        content = turn["content"].strip() if chat == "llama3" else turn["content"]
        text += before.format(turn["role"]) + content + after
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    for answer, expected in ((None, ""), ("!", "!" + end)):
        spelled = "".join(names.get(i) or tokenizer.decode([i]) for i in tokenizer.prompt(turns, answer))
        assert spelled == text + before.format("assistant") + expected
    assert tokenizer.prompt("Hi") == tokenizer.prompt([{"role": "user", "content": "Hi"}])
    for bad in ([{"role": "tool", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": 3}]):
        with pytest.raises(InputError, match="a message needs"):
            tokenizer.prompt(bad)

def test_a_system_message_of_its_own(tmp_path):
    """Written out as the template of SmolLM2 gives it: its own message, unless the first turn is one."""
    tokenizer = read_tokenizer(byte_level(tmp_path, merges=()), "chatml")
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
    plain, begun = tokenizer.prompt([user, system]), tokenizer.prompt([system, user])
    tokenizer.system = PRESETS["smollm2-135m-instruct"].settings["system"]
    told = tokenizer.encode("system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face")
    start, newline = tokenizer.special_tokens["<|im_start|>"], tokenizer.encode("\n")
    before = [start, *told, tokenizer.end, *newline]
    assert tokenizer.prompt([user, system]) == before + plain and tokenizer.prompt([system, user]) == begun
    assert tokenizer.raw("Hi") == tokenizer.encode("Hi")

def test_a_system_message_of_its_own_as_in_the_template_of_smollm2(tmp_path):
    transformers = pytest.importorskip("transformers")
    directory = byte_level(tmp_path, settings={"chat_template": SMOLLM2_TEMPLATE})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    ours, plain = read_tokenizer(directory), read_tokenizer(directory)
    ours.system = SMOLLM2_SYSTEM
    user, system = {"role": "user", "content": "Hi\n"}, {"role": "system", "content": " Be brief. "}
    turns = [user, {"role": "assistant", "content": "Yo"}, user]
    for messages in ([user], turns, [system, user], [system, *turns], [user, system, user]):
        for more, answer in ([], None), ([{"role": "assistant", "content": " Hello"}], " Hello"):
            expected = theirs.apply_chat_template(
                [*messages, *more], add_generation_prompt=not more, return_dict=False)
            assert ours.prompt(messages, answer) == expected
    assert ours.prompt("Hi\n") == ours.prompt([user]) and ours.raw("Hi\n") == plain.raw("Hi\n")

@pytest.mark.parametrize("scheme, at_once, later", [
    ("legacy", True, True), ("always", True, True), ("first", True, False), ("never", False, False)])
def test_zephyr_sections(scheme, at_once, later, tmp_path):
    """Zephyr's own kind of tokenizer: <|user|> is plain text. Which stretches of text get a "▁"?"""
    pre = METASPACE | {"prepend_scheme": scheme}
    style = {} if scheme == "legacy" else {"normalizer": None, "pre_tokenizer": pre}
    tokenizer = read_tokenizer(sentence_piece(tmp_path, **style), "zephyr")
    marked = [("▁" if mark else "") + text for mark, text in
              ((at_once, "<|user|>\na▁</s>"), (later, "\n<|assistant|>\n"))]
    first, second = (tokenizer.encode(text, start=False) for text in marked)
    assert tokenizer.prompt("a </s>") == [1, *first, 2, *second]

def test_chat_is_recognised(tmp_path):
    for template, chat in [
            (LLAMA3_TEMPLATE, "llama3"), (CHATML_TEMPLATE, "chatml"), (ZEPHYR_TEMPLATE, "zephyr"),
            (None, "plain"), ([{"name": "default", "template": CHATML_TEMPLATE}], "chatml")]:
        assert read_tokenizer(byte_level(tmp_path, settings={"chat_template": template})).chat == chat
    phi = "{{ '<|user|>' + m.content + '<|end|>' + '<|assistant|>' }}{{ eos_token }}"
    for template in ("[INST] {{ content }} [/INST]", phi, LLAMA3_TEMPLATE + CHATML_TEMPLATE):
        directory = byte_level(tmp_path, settings={"chat_template": template})
        with pytest.raises(InputError, match="--chat"):
            read_tokenizer(directory)
        assert read_tokenizer(directory, "plain").chat == "plain"
    (tmp_path / "chat_template.jinja").write_text(ZEPHYR_TEMPLATE)
    assert read_tokenizer(tmp_path).chat == "zephyr"
    date = LLAMA3_TEMPLATE + '{{- "Cutting Knowledge Date: December 2023\\n" }}'
    for template, system in [
            (SMOLLM2_TEMPLATE, SMOLLM2_SYSTEM), (SMOLLM2_TEMPLATE.replace("\n", "\\n"), SMOLLM2_SYSTEM),
            (CHATML_TEMPLATE + "'<|im_start|>system\\n' + messages[0].content + '<|im_end|>'", ""),
            (date, "Cutting Knowledge Date: December 2023"), (LLAMA3_TEMPLATE, "")]:
        (tmp_path / "chat_template.jinja").write_text(template)
        byte_level(tmp_path, settings={})
        assert read_tokenizer(tmp_path).template_system() == system
        (tmp_path / "chat_template.jinja").unlink()
        byte_level(tmp_path, settings={"chat_template": template})
        assert read_tokenizer(tmp_path).template_system() == system
    with pytest.raises(InputError, match="unknown"):
        read_tokenizer(tmp_path, "alpaca")
    with pytest.raises(InputError, match=r"no <\|eot_id\|>.*--chat"):
        read_tokenizer(sentence_piece(tmp_path), "llama3")

def test_no_code_and_no_template_of_a_model_directory_is_executed(tmp_path):
    ran = tmp_path / "ran"
    jinja = "{{ cycler.__init__.__globals__.os.system('touch %s') }}" % ran + CHATML_TEMPLATE
    byte_level(tmp_path, settings={"chat_template": jinja, "auto_map": {"AutoTokenizer": "tokenization_x.T"}})
    for name in ("__init__.py", "conftest.py", "tokenization_x.py"):
        (tmp_path / name).write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()")
    for _ in range(2):  # the template in tokenizer_config.json, then in a file of its own
        tokenizer = read_tokenizer(tmp_path)
        assert tokenizer.chat == "chatml" and "49" not in tokenizer.decode(tokenizer.prompt("{{ 7 * 7 }}"))
        (tmp_path / "chat_template.jinja").write_text(jinja)
    assert not ran.exists()

def test_bos_and_stop_ids(tmp_path):
    both = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, BOS]}
    add = {"add_bos_token": True, "bos_token": "<|begin_of_text|>"}
    for processor, config, expected in [  # the post-processor alone decides, as in transformers 5
            (None, {}, None), (BOS, {}, 260), (both, {}, 260), (None, add, None)]:
        directory = byte_level(tmp_path, extra=["None"], post_processor=processor, settings=config)
        tokenizer = read_tokenizer(directory)
        assert tokenizer.bos == expected
        assert tokenizer.raw("a")[:-1] == ([] if expected is None else [expected])
        assert tokenizer.prompt("a") == tokenizer.raw("a\n")
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 260]}')
    assert read_tokenizer(tmp_path, "chatml").stop_ids == (266, 260, 8, 7)
    for bad, told in (('"x"', "eos_token_id must"), ("1" * 30, "eos_token_id must"), ("[" * 999, "JSON")):
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": %s}' % bad)
        with pytest.raises(InputError, match=f"generation_config.json: .*{told}"):
            read_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5000}')
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.stop_ids == (5000, 7) and tokenizer.vocab_size == 5001  # no eos_token is not "None"
    assert tokenizer.decode([6, 7]) == tokenizer.decode([6]) != ""
    (tmp_path / "config.json").unlink()
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(InputError, match="eos_token"):
        read_tokenizer(tmp_path)

def test_decode(tmp_path):
    for directory in (byte_level(tmp_path / "a"), sentence_piece(tmp_path / "b")):
        tokenizer, text = read_tokenizer(directory), " the é日👍\ttail "
        ids = tokenizer.encode(text, start=False)
        assert tokenizer.decode(ids) == text == tokenizer.decode(torch.tensor(ids))
        assert tokenizer.decode([*ids, tokenizer.end, 10 ** 9]) == text and tokenizer.decode([]) == ""
        for n in range(len(ids)):  # a stream cut anywhere, also inside a character
            assert text.startswith(tokenizer.decode(ids[:n]).rstrip("\ufffd"))
        assert tokenizer.decode(tokenizer.encode("é")[-1:]) == "\ufffd"
        assert tokenizer.encode("\ud83d\udc4d") == tokenizer.encode("👍")
        halves = tokenizer.encode("What is \ud800 and \udfff?", start=False)  # no characters
        assert tokenizer.decode(halves) == "What is \ufffd and \ufffd?"
    tokenizer = read_tokenizer(tmp_path / "a")
    ids = [tokenizer.special_tokens[name] for name in ("<tool>", "<|im_end|>")]
    assert tokenizer.decode(ids) == "<tool>"
    assert tokenizer.decode(read_tokenizer(tmp_path / "a", "chatml").answer("x")) == "x"

# ---------------------------------------------------------------------------------------- refused
ONE = {"vocab": {"a": 1}}
REFUSED = {  # what the message says: changes of a tokenizer.json
    "BPE": [{"model": None}, {"model": {"type": "Unigram", "vocab": []}}, {"model": {"type": "WordLevel"}}],
    "vocab": [{"model": {"vocab": vocab}} for vocab in ({"a": 0, "b": 0}, {"a": -1}, {"a": [1]}, {}, None)],
    "merges": [{"model": ONE | {"merges": merges}} for merges in (["a b"], None, [5], [["a"]], ["a "])],
    "dropout": [{"model": ONE | {"dropout": 0.1}}],
    "end_of_word_suffix": [{"model": ONE | {"end_of_word_suffix": "</w>"}}],
    "normalizer": [{"normalizer": {"type": "Lowercase"}}, {"normalizer": 3}],
    "pre_tokenizer": [{"pre_tokenizer": step} for step in (
        BYTES | {"add_prefix_space": True}, sequence(BYTES, LLAMA3_SPLIT), sequence() | {"pretokenizers": 5},
        sequence({"type": "Punctuation"}, BYTES), sequence(LLAMA3_SPLIT | {"behavior": "Removed"}, BYTES))],
    "pattern": [{"pre_tokenizer": sequence(LETTERS | {"pattern": {"Regex": "(["}}, BYTES)}],
    "byte_fallback": [{"pre_tokenizer": None}],
    "post_processor": [{"post_processor": {"type": "RobertaProcessing"}}] + [
        {"post_processor": BOS | {"single": single}}
        for single in ([{"SpecialToken": {"id": "x"}}], ["x"], 5, [{"SpecialToken": 3}])],
    "not an id": [{"post_processor": BOS | {"special_tokens": {"B": {"ids": [i]}}}} for i in (2 ** 70, -1)],
    r"post_processor a\\nb is not supported": [{"post_processor": {"type": "a\nb"}}],
    "added_tokens": [{"added_tokens": tokens} for tokens in (
        [{"content": "x"}], 5, [{"content": "a", "id": 9999}])],
    "the id of an ordinary one": [{"added_tokens": [{"id": 7, "content": "<x>", "special": True}]}]}

REFUSED_PIECES = {  # of a SentencePiece tokenizer
    "its normalizer and pre_tokenizer": [
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " "}, "content": "▁"}},
        {"normalizer": None}, {"pre_tokenizer": METASPACE},
        {"normalizer": None, "pre_tokenizer": METASPACE | {"replacement": "_"}},
        {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "x"}}],
    "byte tokens": [{"merges": [("<0x41>", "a")]}]}

@pytest.mark.parametrize("message", [*REFUSED, *REFUSED_PIECES])
def test_refused_tokenizers(tmp_path, message):
    make, changes = (byte_level, REFUSED) if message in REFUSED else (sentence_piece, REFUSED_PIECES)
    for change in changes[message]:
        make(tmp_path, **change)
        with pytest.raises(InputError, match=rf"tokenizer\.json.*{message}") as caught:
            read_tokenizer(tmp_path)
        assert str(caught.value).isprintable()

RANKS = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))  # Llama-3's form

@pytest.mark.parametrize("name, contents", [
    ("tokenizer.json", ["", "[]", "{", "\xff", "[" * 100_000]),
    ("tokenizer.model", ["IQ== 0\n", "IQ== x\n", "!! 0\n", "\x0e<unk>\x15", RANKS.replace("255", "300")])])
def test_damaged_files(tmp_path, name, contents):
    with pytest.raises(InputError, match="no tokenizer.json"):
        read_tokenizer(tmp_path)
    for content in contents:
        (tmp_path / name).write_text(content, encoding="latin-1")
        with pytest.raises(InputError, match=name):
            read_tokenizer(tmp_path)

@pytest.mark.parametrize("pattern", [
    "(a+)+b", "((?=a){99}){99}", "(?:(?:a{1000}){1000}){1000}", "(a|a)*b", "(?#[)(a+)+(?#])b", "a{1000000}",
    "(?=a)", "x*", "", "a*a*a*a*a*a*a*a*a*b", r"(?:(a+)\1?)?c"])
def test_patterns_that_could_take_forever_are_refused_or_told(pattern, tmp_path):
    byte_level(tmp_path, pre_tokenizer=sequence(LETTERS | {"pattern": {"Regex": pattern}}, BYTES))
    tokenizer = loaded(lambda: read_tokenizer(tmp_path), str(tmp_path / "tokenizer.json"))
    if tokenizer:
        ids = loaded(lambda: tokenizer.encode("a" * 300 + "!"), "pattern")
        assert ids is None or tokenizer.decode(ids) == "a" * 300 + "!"

# ---------------------------------------------------------------------------------------- any bytes
def read_and_use(directory):
    """Read a tokenizer, or see it refused. What it makes of texts are its ids, and no special token."""
    tokenizer = loaded(lambda: read_tokenizer(directory), str(directory))
    for text in ["", "the cat", " a\n\n1234 don't", "\x00\ud800é日👍 \u202e", " ".join(MARKS), "a" * 60 + "b"]:
        ids = tokenizer and loaded(lambda: tokenizer.encode(text), "pattern")
        if ids is None:
            return
        assert not {*tokenizer.special_tokens.values()} & {*ids} and isinstance(tokenizer.decode(ids), str)
        for i in ids + tokenizer.prompt(text) + tokenizer.answer(text):
            assert type(i) is int and 0 <= i < tokenizer.vocab_size

@pytest.mark.parametrize("kind", ["byte level", "sentence piece"])
def test_any_tokenizer_json_is_read_or_refused(kind, tmp_path):
    if kind == "byte level":
        byte_level(tmp_path, normalizer={"type": "NFC"}, post_processor=BOS, ignore_merges=True,
                   extra=["cat"], pre_tokenizer=sequence(LETTERS, DIGITS, GPT2_BYTES))
    else:
        sentence_piece(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    small = {key: value for key, value in tree.items() if key != "model"}  # the model is most of the file
    @fuzz(80)
    @given((mutated(tree) | mutated(small).map(lambda part: {**tree, **part})).map(dumped)
           | damaged(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        read_and_use(tmp_path)
    check()

SIDE_FILES = {
    "generation_config.json": {"eos_token_id": [256, 259], "bos_token_id": 257, "temperature": 0.6},
    "tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>", "special": True}, "bos_token": "<s>",
                              "chat_template": CHATML_TEMPLATE},
    "special_tokens_map.json": {"eos_token": "<|im_end|>", "bos_token": {"content": "<|endoftext|>"}},
    "config.json": {"eos_token_id": 257}}

@pytest.mark.parametrize("name", [*SIDE_FILES, "tokenizer.model"])
def test_any_other_file_is_read_or_refused(name, tmp_path):
    contents = damaged(RANKS.encode())
    if name in SIDE_FILES:
        contents = mutated(SIDE_FILES[name]).map(dumped) | damaged(dumped(SIDE_FILES[name]))
        byte_level(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
    @fuzz(40)
    @given(contents)
    def check(content):
        (tmp_path / name).write_bytes(content)
        read_and_use(tmp_path)
    check()
