"""Downloads against a server of this process: whole, broken, resumed, refused, redirected, wrong."""
import dataclasses
import hashlib
import json
import math
import multiprocessing
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import dice
import model
from data import ultrafeedback
from model import Config, InputError

CONFIG = Config(600, 64, 2, 16, 4, 2, 4, 24)
REPOSITORY = "princeton-nlp/Llama-3-Base-8B-SFT-DPO"
TREE = f"/api/models/{REPOSITORY}/tree/main"


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> bytes) with Range. What it shall do instead, by path: `cut` (after how many
    bytes it breaks off, one number for each request), `status`, `redirect`. `seen`: what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.cut, self.status, self.redirect, self.seen = {}, {}, {}, {}, []
        self.ranges, self.lengths = True, True
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, host="127.0.0.1"):
        return f"http://{host}:{self.server_port}"

    def offer(self, repository, files, changes=None, **more):
        """A repository as the hub would: its list (with changes, name -> fields) and its files."""
        rows = []
        for name, content in files.items():
            row = {"type": "file", "path": name, "size": len(content),
                   "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
            if name.endswith(".safetensors"):
                row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
            rows.append(row | (changes or {}).get(name, {}))
            self.files[f"/{repository}/resolve/main/{name}"] = content
        self.files[f"/api/models/{repository}/tree/main"] = json.dumps(rows).encode()

    def asked(self, end):
        return [headers for path, headers in self.seen if path.endswith(end)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, self.path
        server.seen.append((path, dict(self.headers)))
        self.close_connection = True
        if path in server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect[path])
            return self.end()
        codes = server.status.get(path, [])
        if codes or path not in server.files:
            self.send_response(codes.pop(0) if codes else 404)
            return self.end()
        body, start, total = server.files[path], 0, len(server.files[path])
        if server.ranges and self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                self.send_response(416)
                return self.end()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.end(body[start:], server.cut.get(path, []))

    def end(self, body=b"", cut=()):
        if self.server.lengths:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut.pop(0) if cut else None])

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    with Server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url())
        monkeypatch.setenv("DICE_WEIGHTS", str(tmp_path / "weights"))
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(model, "PAUSE", 0.0)
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The files of a small model that loads."""
    directory = tmp_path_factory.mktemp("hub") / "model"
    _, tokenizer = dice.tiny_model()
    state = dice.new_model(CONFIG, 0).state_dict()
    model.write_checkpoint(directory, CONFIG, state, tokenizer)
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def hub(server, checkpoint):
    """The server with a whole repository, of which not everything is wanted."""
    rest = {"README.md": b"words", "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"twice",
            "original/model.safetensors": b"folder", "../../evil.safetensors": b"outside"}
    server.offer(REPOSITORY, checkpoint | rest)
    return server


def file(server, name="model.safetensors"):
    return f"/{REPOSITORY}/resolve/main/{name}"


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(match, name="llama3-8b"):
    with pytest.raises(InputError, match=match) as caught:
        model.resolve(name)
    assert "\n" not in str(caught.value) and "by hand" in str(caught.value)
    return str(caught.value)


def partial(tmp_path):
    return tmp_path / "weights" / ".Llama-3-Base-8B-SFT-DPO.partial"


# -------------------------------------------------------------------------------- names
PARAMETERS = {  # as published
    "llama3-8b": 8030261248, "zephyr-7b": 7241732096, "gpt2": 124439808, "gpt2-medium": 354823168,
    "gpt2-large": 774030080, "gpt2-xl": 1557611200, "llama3.2-1b": 1235814400, "qwen2.5-0.5b": 494032768,
    "smollm2-135m": 134515008}


def test_the_names():
    assert set(PARAMETERS) | {"tiny", "llama3-8b-sft", "zephyr-7b-sft"} == set(model.NAMES)
    for name, count in PARAMETERS.items():
        shapes = model.parameter_shapes(model.NAMES[name].shape)
        assert sum(map(math.prod, shapes.values())) == count, name
    for name, own in model.SETTINGS.items():
        settings = dice.Settings(**{"model": name, **own})
        settings.device = "cpu"
        settings.settle()
        assert settings.reference in ("", *model.NAMES)
        shape = model.NAMES[name].shape
        assert not shape or settings.max_new_tokens < shape.context
        reference = settings.reference and model.NAMES[settings.reference]
        assert not reference or reference.shape == shape


def test_shapes_go_through_a_config_json():
    for name, named in model.NAMES.items():
        if named.shape:
            assert model.parse_config(model.config_json(named.shape), name) == named.shape, name


def test_zephyr_has_the_context_of_its_window():
    raw = model.config_json(model.NAMES["zephyr-7b"].shape)
    upstream = raw | {"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}
    config = model.parse_config(upstream, "config.json")
    assert config == model.NAMES["zephyr-7b"].shape
    assert model.config_json(config) == upstream  # what we save, others load as what it was


def test_gpt2_ends_with_its_end_token_not_with_the_word_none(tmp_path):
    dice.tiny.write_tokenizer(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    end = tokenizer["added_tokens"][0]["id"]
    vocab["None"] = end + 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": end}))
    assert model.read_tokenizer(tmp_path).stop_ids == (end,)


def test_names_that_are_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="tiny: is made by dice.py"):
        model.resolve("tiny")
    with pytest.raises(InputError, match="no-such: not a model directory.*llama3-8b, .*smollm2-135m"):
        model.resolve("no-such")


def test_a_stand_in_runs(monkeypatch):
    small = dataclasses.replace(CONFIG, vocab_size=2000, tied=True, width=256, head_size=64)
    monkeypatch.setitem(model.NAMES, "gpt2", dataclasses.replace(model.NAMES["gpt2"], shape=small))
    config, tokenizer = model.stand_in("gpt2")
    assert config == small and len(tokenizer.stop_ids) == 5 and tokenizer.vocab_size == 2000
    prompt, answer = tokenizer.prompt("Why is the sky blue?"), tokenizer.answer("Light. \ud83d\ude00")
    assert len(prompt) == 6 and 0 <= min(prompt + answer) and max(prompt) < 1995
    assert answer[-1] in tokenizer.stop_ids
    net = dice.new_model(config, 0)
    net.norm.weight.data.mul_(0.05)  # so that a tied head does not say the last token again and again
    answers = list(dice.generate(net, [prompt] * 4, 32, stop_ids=tokenizer.stop_ids, seed=0, rows=128,
                                 max_new_tokens=57, temperature=1.0, top_p=1.0))
    assert all(tokenizer.decode(ids[:-1]) for _, _, ids, _ in answers if len(ids) > 1)
    assert len({len(ids) for _, _, ids, _ in answers}) > 1
    for name in ("tiny", "out/mine"):
        with pytest.raises(InputError, match=f"--weights dummy.*not for {name}"):
            model.stand_in(name)


# -------------------------------------------------------------------------------- what goes well
def test_a_whole_repository(hub, checkpoint, tmp_path, capsys):
    directory = model.resolve("llama3-8b")
    assert directory == tmp_path / "weights" / "Llama-3-Base-8B-SFT-DPO"
    assert contents(directory) == checkpoint and not (tmp_path / "evil.safetensors").exists()
    assert {path.name for path in directory.parent.iterdir()} == {".lock", directory.name}
    config = model.read_config(directory)
    assert config == CONFIG and model.read_tokenizer(directory).chat == "plain"
    state = model.read_weights(directory, config)
    assert all(torch.equal(p, state[name]) for name, p in dice.new_model(CONFIG, 0).state_dict().items())
    told = capsys.readouterr().err
    assert f"downloading {hub.url()}/{REPOSITORY} to {directory}" in told
    assert "model.safetensors: 100%" in told
    before = len(hub.seen)
    assert model.resolve("llama3-8b") == directory and len(hub.seen) == before  # no second time


def test_shards(server, checkpoint, tmp_path):
    shards = {"model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two",
              "model.safetensors.index.json": b"{}", "config.json": b"{}", "vocab.json": b""}
    server.offer(REPOSITORY, shards)
    assert contents(model.resolve("llama3-8b")) == shards


def test_a_directory_that_is_there_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("DICE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(InputError, match="gpt2: not a model directory"):
        model.resolve("gpt2")
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    assert model.resolve("gpt2") == tmp_path / "gpt2"
    monkeypatch.delenv("DICE_WEIGHTS")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(tmp_path)
    assert model.resolve("gpt2") == Path("weights/gpt2")


@pytest.mark.parametrize("bar", [True, False])
def test_broken_transfers_go_on_where_they_stopped(hub, checkpoint, monkeypatch, bar):
    if not bar:
        monkeypatch.setenv("TQDM_DISABLE", "1")
    hub.cut[file(hub)] = [1000, 0, 0, 0, 2000, 1, 0, 0, 0, 500]  # each time that it gets on it has 5 tries
    hub.cut[TREE] = [3, 0]
    hub.status[file(hub, "config.json")] = [503, 429, 500]
    assert contents(model.resolve("llama3-8b")) == checkpoint
    ranges = [headers.get("Range") for headers in hub.asked("/model.safetensors")]
    assert ranges == [None, *["bytes=1000-"] * 4, "bytes=3000-", *["bytes=3001-"] * 4, "bytes=3501-"]


def test_a_server_without_ranges_starts_again(hub, checkpoint):
    hub.ranges, hub.cut[file(hub)] = False, [1000, 500, 3000]
    assert contents(model.resolve("llama3-8b")) == checkpoint
    assert len(hub.asked("/model.safetensors")) == 4


def test_a_server_without_lengths(hub, checkpoint):
    hub.lengths, hub.cut[file(hub)] = False, [1000]
    assert contents(model.resolve("llama3-8b")) == checkpoint


def test_an_interrupted_download_goes_on(hub, checkpoint, tmp_path, monkeypatch):
    real = model.receive

    def interrupted(url, part, *rest):
        if part.name == "model.safetensors.part":
            part.write_bytes(checkpoint["model.safetensors"][:1234])
            raise KeyboardInterrupt
        real(url, part, *rest)

    monkeypatch.setattr(model, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.resolve("llama3-8b")
    assert not (tmp_path / "weights" / "Llama-3-Base-8B-SFT-DPO").exists()
    (partial(tmp_path) / "model-00009-of-00009.safetensors").write_bytes(b"no longer on the hub")
    (partial(tmp_path) / "tokenizer.json").write_bytes(b"damaged on the disk")
    monkeypatch.setattr(model, "receive", real)
    hub.seen.clear()
    assert contents(model.resolve("llama3-8b")) == checkpoint
    assert [headers["Range"] for headers in hub.asked("/model.safetensors")] == ["bytes=1234-"]
    assert not hub.asked("/config.json") and hub.asked("/tokenizer.json")


def test_a_part_that_is_complete_or_too_long(hub, checkpoint, tmp_path):
    partial(tmp_path).mkdir(parents=True)
    weights = checkpoint["model.safetensors"]
    (partial(tmp_path) / "model.safetensors.part").write_bytes(weights)
    (partial(tmp_path) / "config.json.part").write_bytes(bytes(9999))
    assert contents(model.resolve("llama3-8b")) == checkpoint
    assert not hub.asked("/model.safetensors") and len(hub.asked("/config.json")) == 2


def test_redirects_and_the_token(hub, checkpoint, monkeypatch):
    """Renamed repositories redirect on the hub itself, large files to another host, without the token."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    cdn = Server()
    cdn.files["/signed?key=1"] = checkpoint["model.safetensors"]
    hub.redirect[file(hub)] = f"{cdn.url('localhost')}/signed?key=1"
    hub.redirect[file(hub, "config.json")] = "/moved"
    hub.files["/moved"] = checkpoint["config.json"]
    cdn.cut["/signed?key=1"] = [700]
    assert contents(model.resolve("llama3-8b")) == checkpoint
    assert all(headers["Authorization"] == "Bearer secret" for _, headers in hub.seen)
    assert hub.asked("/moved") and len(cdn.seen) == 2
    assert not any("Authorization" in headers for _, headers in cdn.seen)
    assert cdn.seen[1][1]["Range"] == "bytes=700-"
    cdn.shutdown()
    cdn.server_close()


def fetch(barrier):
    barrier.wait()
    model.resolve("llama3-8b")


def test_two_processes(hub, checkpoint, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=fetch, args=(barrier,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert contents(tmp_path / "weights" / "Llama-3-Base-8B-SFT-DPO") == checkpoint
    assert len(hub.asked("/model.safetensors")) == 1


# -------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("code", [401, 403])
def test_gated(hub, tmp_path, code):
    hub.status[file(hub, "config.json")] = [code]
    told = refused(f"HTTP Error {code}.*accept its terms.* {hub.url()}/{REPOSITORY}, and set HF_TOKEN")
    assert str(tmp_path / "weights" / "Llama-3-Base-8B-SFT-DPO") in told and REPOSITORY in told
    assert len(hub.asked("/config.json")) == 1


def test_not_there(server):
    refused("not downloaded: HTTP Error 404: Not Found; try again")
    assert len(server.seen) == 1


def test_unreachable(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused("http://127.0.0.1:9/api/.*refused")
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    refused("HF_ENDPOINT file:///etc: is not an http")
    monkeypatch.setenv("HF_ENDPOINT", "http://a b")
    refused("not downloaded")


def test_a_transfer_that_never_gets_on(hub, tmp_path):
    hub.cut[file(hub)] = [1000] + [0] * 99
    refused("broke off after 1000 of [0-9]+ bytes; try again")
    assert len(hub.asked("/model.safetensors")) == 1 + model.TRIES
    assert (partial(tmp_path) / "model.safetensors.part").stat().st_size == 1000
    hub.cut.clear()
    model.resolve("llama3-8b")


@pytest.mark.parametrize("change", [1, -1])
def test_wrong_size(server, checkpoint, change):
    size = len(checkpoint["model.safetensors"])
    server.offer(REPOSITORY, checkpoint, {"model.safetensors": {"size": size + change}})
    refused(f"model.safetensors: has {size} bytes, announced were {size + change}")
    server.lengths = False
    refused("model.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_wrong_digest(hub, checkpoint, tmp_path, name):
    hub.files[file(hub, name)] = bytes(len(checkpoint[name]))
    refused(f"{name}: its digest is .* announced was .* thrown away; try again")
    assert not (partial(tmp_path) / f"{name}.part").exists()
    assert not (tmp_path / "weights" / "Llama-3-Base-8B-SFT-DPO").exists()
    hub.files[file(hub, name)] = checkpoint[name]
    assert contents(model.resolve("llama3-8b")) == checkpoint


@pytest.mark.parametrize("listing", [
    b"<html>", b"{}", b"[1]", b'{"error": "x"}', b'[{"path": "config.json", "size": "1", "oid": "00"}]',
    b'[{"path": "config.json", "size": -1, "oid": "%s"}]' % (b"0" * 40), b"[" * 9999, b"\xff",
    b'[{"path": "config.json", "size": 1, "oid": "zz"}]', b'[{"path": 1, "size": 1, "oid": "0"}]'])
def test_a_list_that_is_none(server, listing):
    server.files[TREE] = listing
    refused("tree/main: (not a list|lists no)")


def test_repositories_without_what_we_read(server, checkpoint):
    server.offer(REPOSITORY, {"config.json": b"{}", "pytorch_model.bin": b"x"})
    refused("lists no safetensors but 'pytorch_model.bin'")
    server.offer(REPOSITORY, {"model.safetensors": b"{}"})
    refused("lists no config.json")


def test_too_little_room(server, checkpoint, monkeypatch, tmp_path):
    server.offer(REPOSITORY, checkpoint, {"model.safetensors": {"size": 10 ** 18}})
    refused("needs 1000000000.00 GB more and .* are free; make room, or set DICE_WEIGHTS")
    assert not server.asked("/config.json")
    usage = shutil.disk_usage(tmp_path)
    need = sum(map(len, checkpoint.values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    server.offer(REPOSITORY, checkpoint)
    refused("needs 0.00 GB more")
    (partial(tmp_path) / "model.safetensors.part").write_bytes(checkpoint["model.safetensors"][:1])
    model.resolve("llama3-8b")  # that byte made the difference


def test_a_place_that_cannot_be_written(hub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DICE_WEIGHTS", str(tmp_path / "file" / "weights"))
    refused("Not a directory|cannot")


# -------------------------------------------------------------------------------- data/ultrafeedback.py
PROMPTS = b'{"instruction": "Why?"}\n{"instruction": "Who are you?"}\n'
PAIRS = b'{"instruction": "Why?", "output": ["Because.", "No."]}\n'


@pytest.fixture
def source(server, monkeypatch, tmp_path):
    server.files = {"/UF/prompt.json": PROMPTS, "/UF/preference.json": PAIRS}
    monkeypatch.setenv("DICE_DATA_URL", f"{server.url()}/UF/")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(ultrafeedback, "DIRECTORY", tmp_path / "uf-10k")
    return server


def test_the_papers_data(source, tmp_path, capsys):
    source.cut["/UF/preference.json"] = [10]
    assert ultrafeedback.main([]) == 0
    told = capsys.readouterr().out
    assert "prompt.json: 2 prompts, the longest of 12 characters\n" in told
    assert "preference.json: 1 pairs, answers of 6 characters on average, the longest of 8\n" in told
    assert (tmp_path / "uf-10k" / "prompt.json").read_bytes() == PROMPTS
    assert (tmp_path / "uf-10k" / "preference.json").read_bytes() == PAIRS
    assert not any("Authorization" in headers for _, headers in source.seen)
    before = len(source.seen)
    assert ultrafeedback.main([]) == 0 and len(source.seen) == before


def test_where_its_files_are_is_known_to_the_names():
    root = Path(model.__file__).parent
    for key, name in (("prompts", "prompt.json"), ("preferences", "preference.json")):
        assert root / model.SETTINGS["llama3-8b"][key] == ultrafeedback.DIRECTORY / name


@pytest.mark.parametrize("name, content, match", [
    ("prompt.json", b"", "prompt.json: holds no rows"),
    ("prompt.json", b"404: Not Found", "prompt.json line 1: not valid JSON"),
    ("prompt.json", PROMPTS + b'{"text": 1}', "prompt.json line 3: has no"),
    ("preference.json", PAIRS + b'{"instruction": "a", "output": ["b"]}', "preference.json line 2"),
    ("preference.json", None, "HTTP Error 404")])
def test_data_of_another_form(source, tmp_path, capsys, name, content, match):
    if content is None:
        del source.files[f"/UF/{name}"]
    else:
        source.files[f"/UF/{name}"] = content
    assert ultrafeedback.main([]) == 2
    told = capsys.readouterr().err
    assert match in told and told.splitlines()[-1].startswith("ultrafeedback.py: ") and "by hand" in told
    assert not (tmp_path / "uf-10k" / name).exists()
    source.files[f"/UF/{name}"] = {"prompt.json": PROMPTS, "preference.json": PAIRS}[name]
    assert ultrafeedback.main([]) == 0
