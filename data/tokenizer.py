"""Text to ids and back, and chat messages to ids.

Tokenizers are byte-pair encodings from a Hugging Face tokenizer.json, byte-level (GPT-2, Llama-3, Qwen2,
SmolLM2) or SentencePiece (Llama-2, Mistral), or from Llama-3's own rank file. Four chat formats are built in
and recognised by their markers; a template found on disk is never executed."""
import base64
import heapq
import re
import unicodedata
import zlib
from functools import lru_cache
from pathlib import Path

import regex
import tiktoken

from data.files import InputError, read_json, require

# Chat format -> the markers by which its template is recognised. Of llama3 and chatml the last ends a turn.
CHATS = {"llama3": ("<|start_header_id|>", "<|eot_id|>"), "chatml": ("<|im_start|>", "<|im_end|>"),
         "zephyr": ("<|user|>", "<|assistant|>", "eos_token"), "plain": ()}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "chat_template.jinja", "generation_config.json", "vocab.json", "merges.txt")

class Tokenizer:
    """Text <-> ids. No text becomes a special token.

    bos: the id before a text, or None; end: the id that closes an answer; stop_ids: ids that end a sample;
    vocab_size: the least number of embeddings of a model; system: the system message that prompt() puts
    before a conversation that begins with none, or ""."""
    system = ""

    def __init__(self, bpe, id_to_bytes: dict, special_tokens: dict[str, int], bos, stop_ids, chat, files):
        """id_to_bytes: what decode shows; stop_ids[0]: the end-of-text token; files: what save writes."""
        self.bpe, self.special_tokens, self.bos, self.chat, self.files = bpe, special_tokens, bos, chat, files
        require(stop_ids, "the tokenizer names no end-of-text token; give tokenizer_config.json an eos_token")
        self.end = self.special_id(CHATS[chat][-1]) if chat in ("llama3", "chatml") else stop_ids[0]
        self.stop_ids = tuple(dict.fromkeys([self.end, *stop_ids]))  # each once, in this order
        hidden = {*self.stop_ids, bos}
        self.id_to_bytes = {i: word for i, word in id_to_bytes.items() if i not in hidden}
        self.vocab_size = 1 + max([*id_to_bytes, *special_tokens.values(), self.end, bos or 0])
        self.turn_template("user")  # raises now if a special token of the chat format is missing

    def special_id(self, content: str) -> int:
        require(content in self.special_tokens, f"the tokenizer has no {content}, which chat format "
                f"{self.chat} needs; choose another with --chat")
        return self.special_tokens[content]

    def encode(self, text: str, start=True) -> list[int]:
        """Ids of plain text. start=False: the text continues earlier text (no "▁" is put before it)."""
        # Half a surrogate pair is no character and has no UTF-8. It becomes U+FFFD.
        return self.bpe.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), start)

    def decode(self, ids) -> str:
        """Text of ids, nothing stripped. Special and unknown ids are left out; bad UTF-8 becomes U+FFFD."""
        return b"".join(self.id_to_bytes.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def raw(self, text: str) -> list[int]:
        """Ids of a text for the model to continue, without a chat format."""
        return ([] if self.bos is None else [self.bos]) + self.encode(text)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer as it follows prompt(...), with the end token."""
        return self.encode(text, start=False) + [self.end]

    def prompt(self, messages, answer=None) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins; with an answer, all of it.
        messages: one user message, or a list of {"role": system, user or assistant, "content": text}."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        if self.system and turns[0].get("role") != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        parts = []  # str: text; int: a special token
        for turn in turns:
            role, content = turn.get("role"), turn.get("content")
            require(role in ("system", "user", "assistant") and isinstance(content, str),
                    f"a message needs a role (system, user, assistant) and a text, not {str(turn)[:80]}")
            before, after = self.turn_template(role)
            parts += [*before, content.strip() if self.chat == "llama3" else content, *after]
        if answer is None:
            parts += self.turn_template("assistant")[0]
        elif self.chat == "plain":
            parts[-1] = self.end
        ids, text, start = self.raw(""), "", True
        for part in parts:
            if isinstance(part, str):
                text += part  # all text between two special tokens is encoded at once
            else:
                ids += [*self.encode(text, start), part]
                text, start = "", self.bpe.every_section
        return ids + self.encode(text, start)

    def turn_template(self, role: str) -> tuple[list, list]:
        """What stands before and after a message (str: text; int: a special token), as in the models' own
        templates, without the dates and system messages that some of them add (see `system`)."""
        if self.chat == "llama3":
            header = self.special_id("<|start_header_id|>"), self.special_id("<|end_header_id|>")
            return [header[0], role, header[1], "\n\n"], [self.end]
        if self.chat == "chatml":
            return [self.special_id("<|im_start|>"), f"{role}\n"], [self.end, "\n"]
        if self.chat == "zephyr":  # in Zephyr's own tokenizer <|user|> is ordinary text
            return [self.special_tokens.get(f"<|{role}|>", f"<|{role}|>"), "\n"], [self.end, "\n"]
        return [], ["\n"]

    def template_system(self):
        """The system message that the model's own template puts first, if it is plain text there, or ""."""
        text = self.files.get("chat_template.jinja", b"") + self.files.get("tokenizer_config.json", b"")
        found = re.search(rb"<\|im_start\|>system(?:\\+n|\n)([^'\"{}]+)<\|im_end\|>"  # Qwen2, SmolLM2
                          rb"|(Cutting Knowledge Date: \w+ \d+)", text)  # Llama 3.1 to 3.3
        return found[found.lastindex].decode("utf-8", "replace") if found else ""

    def save(self, directory):
        """Write the files that the tokenizer was read from, byte for byte."""
        for name, content in self.files.items():
            (Path(directory) / name).write_bytes(content)

# ---------------------------------------------------------------------------------------- byte-pair encoding
def merge_pairs(symbols: list, merges: dict, never=None) -> list:
    """Byte-pair encoding: join the adjacent pair of lowest rank, the leftmost of equals, until none is left.

    symbols: ids; merges: {(left id, right id): (rank, joined id)}; never: a joined id that must not be made.
    The heap and the linked list make it O(n log n): a prompt may be megabytes of text without a space."""
    n = len(symbols)
    symbols = [*symbols, None]  # None: the end of the list, and later the right half of a joined pair
    following, previous = list(range(1, n + 1)), list(range(-1, n))
    heap = []  # of rank * n + position: the smallest is the next pair to join
    def push(i):
        found = merges.get((symbols[i], symbols[following[i]]))
        if found and found[1] != never:
            heapq.heappush(heap, found[0] * n + i)
    for i in range(n):
        push(i)
    while heap:
        rank, i = divmod(heapq.heappop(heap), n)
        found = merges.get((symbols[i], symbols[following[i]]))
        if not found or found[0] != rank:  # one of the two is joined to another symbol by now
            continue
        right = following[i]
        symbols[i], symbols[right] = found[1], None
        following[i] = following[right]
        previous[following[i]] = i
        push(i)
        if previous[i] >= 0:
            push(previous[i])
    return [symbol for symbol in symbols if symbol is not None]

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LONG_BLANK = 500_000  # the regex engine of tiktoken crashes on a million spaces in a row

class ByteLevelBPE:
    """Regular expressions cut a text into pieces; tiktoken makes ids of the bytes of each piece."""
    every_section = False  # see SentencePieceBPE
    def __init__(self, ranks: dict[bytes, int], ids, whole: dict[bytes, int], patterns: list, nfc: bool):
        """ids: rank -> id; whole: the ranks of tokens that only a whole piece can become; patterns: each cuts
        the pieces of the one before; nfc: normalise the text first."""
        self.ids, self.whole, self.nfc = ids, whole, nfc
        utf8 = {*range(0xF5)} - {0xC0, 0xC1}  # the bytes that occur in UTF-8
        self.absent = bytes(b for b in utf8 if bytes([b]) not in ranks)
        # Text that the pattern does not match becomes a piece of its own. tiktoken alone would drop it.
        patterns = [rf"(?:{p})|(?:(?!{p})[\s\S])+" for p in patterns]
        self.splits = [regex.compile(p) for p in patterns]
        self.tiktoken = tiktoken.Encoding("", pat_str=patterns[-1], mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str, start=True) -> list[int]:
        sections = [unicodedata.normalize("NFC", text) if self.nfc else text]
        try:
            for split in self.splits[:-1]:
                sections = [m[0] for section in sections for m in split.finditer(section, timeout=60)]
            return [self.ids[rank] for section in sections for rank in self.encode_ranks(section)]
        except BaseException as error:  # a crash inside tiktoken (PanicException) is not an Exception
            if type(error).__name__ not in ("PanicException", "TimeoutError"):
                raise
            raise InputError(f"the tokenizer's pattern fails on the text {text[:60]!r}, or takes too long; "
                             "shorten the text, or take another tokenizer.json") from None

    def encode_ranks(self, text: str) -> list[int]:
        blank = max(map(len, re.findall(r"\s+", text)), default=0) if len(text) > LONG_BLANK else 0
        lacking = self.absent and not {*self.absent}.isdisjoint(text.encode())
        if blank < LONG_BLANK and not self.whole and not lacking:
            return self.tiktoken.encode_ordinary(text)
        ranks = []
        for match in self.splits[-1].finditer(text, timeout=60):
            piece = match[0].encode()
            known = piece.translate(None, self.absent)  # drops bytes without a token, as transformers does
            if piece in self.whole:
                ranks.append(self.whole[piece])
            elif known:
                ranks += self.tiktoken._encode_single_piece(known)
        return ranks

def tiktoken_ranks(vocab: dict[bytes, int], merges: dict, ignore_merges: bool):
    """Vocabulary and merge list -> (ranks, ids, whole) for ByteLevelBPE, which then gives the same ids.

    Subtle. Hugging Face joins the PAIRS of its list; tiktoken joins any neighbours whose union is a token.
    They agree if tiktoken knows only the tokens that the merges make from the token's own bytes, each with
    the rank of its last pair. Reason: until something is joined across the ends of a token, its inside is
    joined as if it stood alone, so the only two halves that can meet are that last pair.
    With ignore_merges a piece that is a token is taken whole, even if the merges do not make it. Where the
    merges leave three parts or more of it, they never meet as two halves, and tiktoken may know the token.
    Two parts would be joined wrongly inside longer pieces, so such a token is kept apart, in `whole`."""
    made, alone, whole = {}, [], []
    for word, i in vocab.items():
        spelled = [vocab.get(bytes([b])) for b in word]
        parts = () if None in spelled else tuple(merge_pairs(spelled, merges, never=i))
        if len(parts) == 2 and merges.get(parts, (0, None))[1] == i:
            made[word] = merges[parts][0]
        elif len(word) == 1 or (ignore_merges and len(parts) > 2):
            alone.append(word)
        elif ignore_merges:
            whole.append(word)
    order = sorted(made, key=made.get) + alone
    ids = [vocab[word] for word in order + whole]
    ranks = {word: rank for rank, word in enumerate(order)}
    return ranks, ids, {word: rank for rank, word in enumerate(whole, len(order))}

class SentencePieceBPE:
    """BPE over a whole text. Spaces are written "▁"; a character without a token becomes its bytes."""
    def __init__(self, vocab: dict[str, int], merges: dict, prefix: str, split: bool):
        """prefix: is "▁" put before a text? "legacy": yes; "always", "first": if it begins otherwise;
        "never": no. split: is a text cut before each "▁"?"""
        self.vocab, self.merges, self.prefix, self.split = vocab, merges, prefix, split
        # Is "▁" also put before the text after each special token, or only at the start of a prompt?
        self.every_section = prefix in ("legacy", "always")
        self.byte_ids = [vocab[f"<0x{b:02X}>"] for b in range(256)]
        names = {i: piece for piece, i in vocab.items()}
        # Only these pairs of characters can be inside one token. A text is cut between all others.
        self.joinable = {names[left][-1] + names[right][0] for left, right in merges}
        self.remembered = lru_cache(2 ** 16)(self.encode_cut)

    def encode(self, text: str, start=True) -> list[int]:
        text = text.replace(" ", "▁")
        if text and start and (self.prefix == "legacy" or (self.prefix != "never" and text[0] != "▁")):
            text = "▁" + text
        ids, first = [], 0
        for i in range(1, len(text) + 1):
            if text[i - 1:i + 1] not in self.joinable or (self.split and text[i] == "▁"):
                ids += (self.remembered if i - first < 50 else self.encode_cut)(text[first:i])
                first = i
        return ids

    def encode_cut(self, text: str) -> list[int]:
        symbols = []
        for c in text:
            symbols += [self.vocab[c]] if c in self.vocab else [self.byte_ids[b] for b in c.encode()]
        return merge_pairs(symbols, self.merges)

class StandIn:
    """For random weights (--weights dummy). One id for four characters, about as in real tokenizers."""
    every_section = False
    def __init__(self, ids: int):
        self.ids = ids

    def encode(self, text: str, start=True) -> list[int]:
        return [zlib.crc32(text[i:i + 4].encode()) % self.ids for i in range(0, len(text), 4)]

# ---------------------------------------------------------------------------------------- reading
def read_tokenizer(directory, chat="auto") -> Tokenizer:
    """The tokenizer of a model directory: tokenizer.json (BPE), or Llama-3's rank file tokenizer.model.
    chat: auto (recognise the template), llama3, zephyr, chatml or plain. InputError names the file."""
    directory, files = Path(directory), {}
    home = directory.resolve()
    # In the hub's cache a model's files are links: snapshots/REVISION/NAME -> ../../blobs/HASH.
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    for path in (directory / name for name in TOKENIZER_FILES):
        if path.is_file():
            place = path.resolve()  # they are copied into every policy, so no other file may be
            require(place.is_relative_to(home) or place.is_relative_to(blobs),
                    f"{path}: is a link to a file outside of its directory; put a copy in its place")
            files[path.name] = path.read_bytes()
    require("tokenizer.json" in files or "tokenizer.model" in files,
            f"{directory}: no tokenizer.json and no tokenizer.model (Llama-3's rank file)")
    settings = read_json(directory / "special_tokens_map.json")
    settings |= read_json(directory / "tokenizer_config.json")
    bos_token, eos_token = token_name(settings.get("bos_token")), token_name(settings.get("eos_token"))
    if "tokenizer.json" in files:
        declared = [bos_token, eos_token]
        bpe, id_to_bytes, special, bos = read_tokenizer_json(directory / "tokenizer.json", declared)
    else:
        bpe, id_to_bytes, special, bos = read_rank_file(directory / "tokenizer.model")
        eos_token = eos_token if eos_token in special else "<|end_of_text|>"
    stop_ids = [special[eos_token]] if eos_token in special else []
    for name in ("generation_config.json", "config.json"):
        ids = read_json(directory / name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        require(all(map(is_id, ids)), f"{directory / name}: eos_token_id must be one id or a list of ids")
        stop_ids += ids
    if chat == "auto":
        chat = recognise_chat(files, settings, directory)
    require(chat in CHATS, f"chat format {chat!r} is unknown; choose one of auto, {', '.join(CHATS)}")
    if chat == "plain" and bos_token in special:  # a base model that begins a new text has ended this one
        stop_ids.append(special[bos_token])
    try:
        return Tokenizer(bpe, id_to_bytes, special, bos, stop_ids, chat, files)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from None

def token_name(token):
    """"<s>" from "<s>" or {"content": "<s>", ...}; None from null."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None

def is_id(value):
    return type(value) is int and 0 <= value < 2 ** 24

def recognise_chat(files, settings, directory) -> str:
    """The chat format, by its markers in the template, which is never executed."""
    template = str(settings.get("chat_template") or "")  # it may be a list of named templates
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode("utf-8", "replace")
    if not template:
        return "plain"
    found = [chat for chat, markers in CHATS.items() if markers and all(m in template for m in markers)]
    require(len(found) == 1 and "<|end|>" not in template,  # <|end|>: Phi-3, otherwise like Zephyr
            f"{directory}: its chat template is none of {', '.join(CHATS)}; choose one with --chat")
    return found[0]

def read_rank_file(path: Path):
    """Llama-3's tokenizer.model: lines "base64 rank". Its 256 special tokens have the ids after these."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(word, validate=True): int(rank) for word, rank in lines}
    except ValueError:
        raise InputError(f"{path}: not Llama-3's rank file (SentencePiece: give tokenizer.json)") from None
    n = len(ranks)
    require(sorted(ranks.values()) == list(range(n)) and all(bytes([b]) in ranks for b in range(256)),
            f"{path}: ranks must be 0, 1, 2, ... without gaps, and all 256 bytes must have one")
    special = {f"<|reserved_special_token_{i}|>": n + i for i in range(256)}
    special |= {"<|begin_of_text|>": n, "<|end_of_text|>": n + 1, "<|start_header_id|>": n + 6,
                "<|end_header_id|>": n + 7, "<|eot_id|>": n + 9}
    bpe = ByteLevelBPE(ranks, ids=range(n), whole={}, patterns=[LLAMA3_PATTERN], nfc=False)
    return bpe, {rank: word for word, rank in ranks.items()}, special, n

def read_tokenizer_json(path: Path, declared: list):
    """tokenizer.json with a BPE model -> (bpe, {id: bytes}, special tokens {content: id}, bos or None).
    declared: contents of special tokens that tokenizer_config.json names in addition."""
    data = read_json(path)
    model = data.get("model")
    require(isinstance(model, dict) and model.get("type", "BPE") == "BPE", f"{path}: its model is not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        require(not model.get(key), f"{path}: model.{key} is not supported")
    vocab, added = model.get("vocab"), data.get("added_tokens") or []
    require(isinstance(vocab, dict) and vocab and all(map(is_id, vocab.values()))
            and len({*vocab.values()}) == len(vocab), f"{path}: model.vocab must map tokens to distinct ids")
    require(isinstance(added, list) and all(
        isinstance(t, dict) and isinstance(t.get("content"), str) and is_id(t.get("id"))
        and vocab.get(t["content"], t["id"]) == t["id"] for t in added),
        f"{path}: added_tokens need a content and an id that agrees with the vocab")
    special = {name: vocab[name] for name in declared if name in vocab}
    special |= {token["content"]: token["id"] for token in added}
    ordinary = {token: i for token, i in vocab.items() if token not in special}
    require({*ordinary.values()}.isdisjoint(special.values()),
            f"{path}: added_tokens give a special token the id of an ordinary one")
    merges = read_merges(model.get("merges"), vocab, ordinary, path)
    normalizers = steps_of(data, "normalizer", "normalizers", path)
    splitters = steps_of(data, "pre_tokenizer", "pretokenizers", path)
    build = byte_level if any(step.get("type") == "ByteLevel" for step in splitters) else sentence_piece
    bpe, id_to_bytes = build(ordinary, merges, model, normalizers, splitters, path)
    for token in added:
        if not token.get("special"):  # such as <tool_call>: shown in an answer
            id_to_bytes[token["id"]] = token["content"].encode("utf-8", "replace")
    bos = read_bos(steps_of(data, "post_processor", "processors", path), path)
    return bpe, id_to_bytes, special, bos

def steps_of(data, key, inner, path) -> list[dict]:
    """The steps under a key of tokenizer.json, which holds a Sequence of steps, one step, or null."""
    step = data.get(key) or {"type": "Sequence", inner: []}
    found = step.get(inner) if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
    require(isinstance(found, list) and all(isinstance(x, dict) for x in found), f"{path}: {key} is damaged")
    return found

def read_merges(listed, vocab, ordinary, path) -> dict:
    """["a b" or ["a", "b"], ...] -> {(left id, right id): (rank, joined id)}, without special tokens."""
    merges = {}
    try:
        for rank, pair in enumerate(listed):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            ids = vocab[left], vocab[right], vocab[left + right]
            if not (left and right):
                raise ValueError
            if left in ordinary and right in ordinary and left + right in ordinary:
                merges[ids[:2]] = rank, ids[2]
    except (TypeError, ValueError, KeyError):
        raise InputError(f"{path}: model.merges must be pairs of tokens that make a token") from None
    return merges

def read_bos(processors, path):
    """The id that the post-processor puts before a text, or None. What it puts after one is not used."""
    before = []
    for step in processors:
        require(step.get("type") in ("TemplateProcessing", "ByteLevel"),
                f"{path}: post_processor {str(step.get('type'))[:60]} is not supported")
        try:
            for item in step.get("single") or []:
                if "Sequence" in item:
                    break
                before += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        except (KeyError, TypeError):
            raise InputError(f"{path}: post_processor is damaged") from None
    require(len(before) <= 1 and all(map(is_id, before)),
            f"{path}: post_processor puts more than one token before a text, or what is not an id")
    return before[0] if before else None

# GPT-2's alphabet, letter -> byte. A printable byte is its own letter; the others have letters from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
LETTERS = {chr(b): b for b in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(OTHERS)}

def byte_level(vocab, merges, model, normalizers, splitters, path):
    """(ByteLevelBPE, {id: bytes}) from the parts of a tokenizer.json."""
    require(all(step.get("type") == "NFC" for step in normalizers),
            f"{path}: normalizer {str(normalizers)[:80]} is not supported with byte-level BPE")
    patterns = []
    for step in splitters:
        kind, pattern = step.get("type"), step.get("pattern")
        isolated = step.get("behavior") == "Isolated" and step.get("invert") is False
        if kind == "Split" and isinstance(pattern, dict) and isolated:
            patterns.append(str(pattern.get("Regex", re.escape(str(pattern.get("String"))))))
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        else:
            require(kind == "ByteLevel" and step is splitters[-1] and step.get("add_prefix_space") is False,
                    f"{path}: pre_tokenizer step {str(step)[:100]} is not supported")
            patterns += [GPT2_PATTERN] if step.get("use_regex", True) else []
    for pattern in patterns:
        # A repeated group can take exponential time to match and to compile. Real tokenizers have none.
        bare = re.sub(r"\\.|\[(\\.|[^\]\\])*\]", "", pattern, flags=re.S)
        require(not re.search(r"\)\s*[*+{]|\(\?#|\{\d*,?\d{3}", bare),
                f"{path}: pre_tokenizer pattern {pattern[:80]!r} could take forever: it repeats a group, or "
                "something 100 times")
    spelled = {t: bytes(map(LETTERS.get, t)) for t in vocab if t and {*t} <= LETTERS.keys()}
    words = {word: vocab[token] for token, word in spelled.items()}
    ranks, ids, whole = tiktoken_ranks(words, merges, model.get("ignore_merges"))
    try:
        bpe = ByteLevelBPE(ranks, ids, whole, patterns or [r"[\s\S]+"], nfc=bool(normalizers))
    except (ValueError, regex.error) as error:
        raise InputError(f"{path}: a pre_tokenizer pattern cannot be used ({str(error)[:80]})") from None
    require(not bpe.absent or model.get("unk_token") is None, f"{path}: some of the 256 bytes have no token")
    return bpe, {i: spelled.get(token, token.encode("utf-8", "replace")) for token, i in vocab.items()}

def sentence_piece(vocab, merges, model, normalizers, splitters, path):
    """(SentencePieceBPE, {id: bytes}) from the parts of a tokenizer.json."""
    byte_of = {vocab.get(f"<0x{b:02X}>"): b for b in range(256)}  # id -> byte
    require(model.get("byte_fallback") is True and None not in byte_of,
            f"{path}: neither byte-level BPE nor BPE with byte_fallback and 256 byte tokens")
    require(not model.get("ignore_merges") and all(byte_of.keys().isdisjoint(pair) for pair in merges),
            f"{path}: ignore_merges and merges of byte tokens <0x..> are not supported with byte_fallback")
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if not splitters and normalizers in ([prepend, replace], [replace]):
        prefix, split = "legacy" if len(normalizers) == 2 else "never", False
    else:
        step = splitters[0] if len(splitters) == 1 and not normalizers else {}
        old = "always" if step.get("add_prefix_space", True) else "never"
        prefix, split = step.get("prepend_scheme", old), step.get("split", True)
        require(step.get("type") == "Metaspace" and step.get("replacement") == "▁"
                and prefix in ("first", "always", "never"),
                f"{path}: its normalizer and pre_tokenizer are neither Prepend and Replace nor Metaspace")
    id_to_bytes = {i: token.replace("▁", " ").encode("utf-8", "replace") for token, i in vocab.items()}
    id_to_bytes |= {i: bytes([b]) for i, b in byte_of.items()}
    return SentencePieceBPE(vocab, merges, prefix, split), id_to_bytes
