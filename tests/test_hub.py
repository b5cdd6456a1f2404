"""data/hub.py against a server of this process: whole, broken, resumed, refused, redirected, wrong."""
import hashlib
import json
import multiprocessing
import random
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_dice import parsed

import dice
import model as models
from data import files, hub, ultrafeedback
from data.files import InputError

REPOSITORY = "someone/some-model"
TREE = f"/api/models/{REPOSITORY}/tree/main"
WEIGHTS = "model.safetensors"
FILES = {"config.json": b'{"model_type": "llama"}', WEIGHTS: random.Random(0).randbytes(9000),
         "tokenizer.json": b'{"model": {}}', "tokenizer_config.json": b"{}"}

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
    def offer(self, files, sizes=()):
        """A repository as the hub would: its list (with other sizes, name -> size) and its files."""
        rows = []
        for name, content in files.items():
            row = {"path": name, "size": dict(sizes).get(name, len(content)),
                   "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
            if name.endswith(".safetensors"):
                row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}
            rows.append(row)
            self.files[place(name)] = content
        self.files[TREE] = json.dumps(rows).encode()
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
def server(monkeypatch):
    with Server() as server:
        # The server offers a whole repository, of which not everything is wanted.
        server.offer(FILES | {"README.md": b"words", "pytorch_model.bin": b"pickle", "../x.safetensors": b"x",
                              "consolidated.safetensors": b"twice", "x/model.safetensors": b"folder"})
        monkeypatch.setenv("HF_ENDPOINT", server.url())
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(hub, "PAUSE", 0.0)
        yield server
        server.shutdown()

@pytest.fixture
def target(tmp_path):
    return tmp_path / "weights" / "some-model"

def place(name=WEIGHTS):
    return f"/{REPOSITORY}/resolve/main/{name}"

def fetch(target):
    hub.download_repository(REPOSITORY, target)
    return {path.name: path.read_bytes() for path in target.iterdir()}

def partial(target):
    return target.with_name(".some-model.partial")

def refused(match, target):
    with pytest.raises(InputError, match=match) as caught:
        fetch(target)
    assert "\n" not in str(caught.value) and f"into {target} by hand" in str(caught.value)
    start = f"{REPOSITORY}: no such directory is here, and it was not downloaded from the hub: "
    assert str(caught.value).startswith(start) and not target.exists()

# ---------------------------------------------------------------------------------------- what goes well
def test_a_whole_repository(server, target, capsys):
    assert fetch(target) == FILES
    assert {path.name for path in target.parent.iterdir()} == {".lock", target.name}
    told = capsys.readouterr().err
    assert told == f"downloading {server.url()}/{REPOSITORY} to {target}\n"  # no bar in a log file
    assert fetch(target) == FILES and len(server.asked(f"main/{WEIGHTS}")) == 1  # no second time
    shards = {"model-00001-of-00002.safetensors": b"one", "model-00002-of-00002.safetensors": b"two",
              "model.safetensors.index.json": b"{}", "config.json": b"{}", "vocab.json": b""}
    server.offer(shards)
    assert fetch(target.with_name("sharded")) == shards

@pytest.mark.parametrize("bar", [True, False])
def test_broken_transfers_go_on_where_they_stopped(server, target, monkeypatch, bar):
    if not bar:
        monkeypatch.setenv("TQDM_DISABLE", "1")
    server.cut[place()] = [1000, 0, 0, 0, 2000, 1, 0, 0, 0, 500]  # each time that it gets on it has 5 tries
    server.cut[TREE] = [3, 0]
    server.status[place("config.json")] = [503, 429, 500]
    assert fetch(target) == FILES
    ranges = [headers.get("Range") for headers in server.asked(f"main/{WEIGHTS}")]
    assert ranges == [None, *["bytes=1000-"] * 4, "bytes=3000-", *["bytes=3001-"] * 4, "bytes=3501-"]

@pytest.mark.parametrize("lacks, cut", [("ranges", [1000, 500, 3000]), ("lengths", [1000])])
def test_servers_without_ranges_or_lengths(server, target, lacks, cut):
    setattr(server, lacks, False)
    server.cut[place()] = list(cut)
    assert fetch(target) == FILES
    assert len(server.asked(f"main/{WEIGHTS}")) == 1 + len(cut)  # without ranges it starts again

def test_an_interrupted_download_goes_on(server, target, monkeypatch):
    real = hub.receive
    def interrupted(url, part, *rest):
        if part.name == f"{WEIGHTS}.part":
            part.write_bytes(FILES[WEIGHTS][:1234])
            raise KeyboardInterrupt
        real(url, part, *rest)
    monkeypatch.setattr(hub, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(target)
    assert not target.exists()
    (partial(target) / "model-00009-of-00009.safetensors").write_bytes(b"no longer on the hub")
    (partial(target) / "tokenizer.json").write_bytes(b"damaged on the disk")
    monkeypatch.setattr(hub, "receive", real)
    server.seen.clear()
    assert fetch(target) == FILES
    assert [headers["Range"] for headers in server.asked(f"main/{WEIGHTS}")] == ["bytes=1234-"]
    assert not server.asked("/config.json") and server.asked("/tokenizer.json")

def test_a_part_that_is_complete_or_too_long(server, target):
    partial(target).mkdir(parents=True)
    (partial(target) / f"{WEIGHTS}.part").write_bytes(FILES[WEIGHTS])
    (partial(target) / "config.json.part").write_bytes(bytes(9999))
    assert fetch(target) == FILES
    assert not server.asked(f"main/{WEIGHTS}") and len(server.asked("/config.json")) == 2

def test_redirects_and_the_token(server, target, monkeypatch):
    """Renamed repositories redirect on the hub itself, large files to another host, without the token."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Server() as cdn:
        cdn.files["/signed?key=1"] = FILES[WEIGHTS]
        server.redirect[place()] = f"{cdn.url('localhost')}/signed?key=1"
        server.redirect[place("config.json")] = "/moved"
        server.files["/moved"] = FILES["config.json"]
        cdn.cut["/signed?key=1"] = [700]
        assert fetch(target) == FILES
        assert all(headers["Authorization"] == "Bearer secret" for _, headers in server.seen)
        assert server.asked("/moved") and len(cdn.seen) == 2 and cdn.seen[1][1]["Range"] == "bytes=700-"
        assert not any("Authorization" in headers for _, headers in cdn.seen)
        cdn.shutdown()

@pytest.mark.parametrize("token", ["secret\n", " secret"])
def test_a_token_may_have_blanks_around_it(server, target, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    fetch(target)
    assert all(headers["Authorization"] == "Bearer secret" for _, headers in server.seen)

@pytest.mark.parametrize("name, value, told", [
    ("HF_TOKEN", "hush\nhush", "HF_TOKEN: has characters"),
    ("HF_TOKEN", "hush\u20ac", "HF_TOKEN: has characters"),
    ("HF_TOKEN", "hush\x7f", "HF_TOKEN: has characters"), ("HF_TOKEN", "hush", "HTTP Error 404: no HF_TOKEN"),
    ("HF_ENDPOINT", "http://me:hush@127.0.0.1:9", "HF_ENDPOINT 127.0.0.1:9: is not an .* without user"),
    ("HF_ENDPOINT", "http://me:hu/sh@[", r"HF_ENDPOINT \[: is not"),
    ("DICE_DATA_URL", "http://me:hush@127.0.0.1:9", "DICE_DATA_URL 127.0.0.1:9: is not")])
def test_no_secret_is_shown(server, target, monkeypatch, capfd, name, value, told):
    monkeypatch.setenv(name, value)
    monkeypatch.setitem(Handler.responses, 404, ("no hush", ""))  # a server that repeats the token
    server.files.clear()
    if name == "DICE_DATA_URL":
        assert ultrafeedback.main([]) == 2
        shown = capfd.readouterr().err
    else:
        refused(told, target)
        with pytest.raises(InputError) as caught:
            fetch(target)
        shown = str(caught.value) + "".join(capfd.readouterr())
    assert re.search(told, shown) and "hu" not in shown.replace("the hub", "")

def meet_and_fetch(barrier, target):
    barrier.wait()
    fetch(target)

def test_two_processes(server, target):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=meet_and_fetch, args=(barrier, target)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0] and fetch(target) == FILES
    assert len(server.asked(f"main/{WEIGHTS}")) == 1

# ---------------------------------------------------------------------------------------- what is refused
def test_gated_absent_unreachable_or_not_writable(server, target, monkeypatch):
    for code in (401, 403):
        server.status[place("config.json")] = [code]
        refused(f"{code}.*accept its terms.* {server.url()}/{REPOSITORY}, and set HF_TOKEN", target)
    assert len(server.asked("/config.json")) == 2
    (target.parent / "file").write_text("")
    refused("Not a directory|cannot", target.parent / "file" / "weights" / "some-model")
    for address, match in [("http://127.0.0.1:9", "http://127.0.0.1:9/api/.*refused"),
                           ("http://a b", "http://a b"), ("http://[", r"HF_ENDPOINT http://\[: is not"),
                           ("http://a:x", "http://a:x: is not"), ("http://:80", "http://:80: is not"),
                           ("http://a..b", r"a\.\.b: is not"), ("http://127.0.0.1:99999", ":99999"),
                           ("http://a/\xe9", "is not an http"),
                           ("file:///etc", "HF_ENDPOINT file:///etc: is not an http")]:
        monkeypatch.setenv("HF_ENDPOINT", address)
        refused(match, target)

def test_a_name_is_a_directory_here_or_a_repository_of_the_hub(server, tmp_path, monkeypatch, capsys):
    """--model, --reference, --reward and --reward-model. What is mistyped leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DICE_WEIGHTS", raising=False)
    monkeypatch.setitem(models.PRESETS, "mine", models.Preset(REPOSITORY, None, {}))
    files.write_rows(Path("pairs.jsonl"), [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    def mistyped(name):
        assert dice.main(["--model", name, "--preferences", "pairs.jsonl"]) == 2
        return capsys.readouterr().err.splitlines()[-1]
    told = "dice.py: out/tny: no such directory is here, and it was not downloaded from the hub: "
    assert mistyped("out/tny").startswith(f"{told}HTTP Error 404: Not Found; correct the name, or put its ")
    tree = "/api/models/out/tny/tree/main"
    assert len(server.asked(tree)) == 1  # no second try
    server.status[tree] = [401]  # what the hub says if there is no token
    assert f"; correct the name, or accept its terms, if any, on {server.url()}/out" in mistyped("out/tny")
    with monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no network
        assert mistyped("out/tny").startswith(f"{told}http://127.0.0.1:9{tree}: ")
    asked = len(server.seen)
    for name in ("tny", "./tny", "../tny", "a/b/c", "a//b", "a b/c", "a/..", "a/b--c", "-a/b", "a/b."):
        with pytest.raises(InputError, match="not a model directory .*, ORGANISATION/NAME of .* gpt2"):
            models.resolve(name)
    with pytest.raises(InputError, match="tiny: is made by dice.py"):
        models.resolve("tiny")
    assert len(server.seen) == asked and [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    assert models.resolve(REPOSITORY) == models.resolve("mine") == Path("weights", REPOSITORY)
    monkeypatch.setenv("DICE_WEIGHTS", str(tmp_path / "elsewhere"))
    assert models.resolve("mine") == models.resolve(REPOSITORY) == tmp_path / "elsewhere" / REPOSITORY
    assert len(server.asked("main/config.json")) == 2  # once for each place
    assert parsed("--model", REPOSITORY).out == "out/some-model"
    shutil.move("weights/someone", "someone")  # a directory is taken, whatever the hub has
    assert models.resolve(REPOSITORY) == Path(REPOSITORY)

def test_a_transfer_that_never_gets_on(server, target):
    server.cut[place()] = [1000] + [0] * 99
    refused("broke off after 1000 of 9000 bytes; try again", target)
    assert len(server.asked(f"main/{WEIGHTS}")) == 1 + hub.TRIES
    assert (partial(target) / f"{WEIGHTS}.part").stat().st_size == 1000
    server.cut.clear()
    assert fetch(target) == FILES

@pytest.mark.parametrize("size", [8999, 9001])
def test_wrong_size(server, target, size):
    server.offer(FILES, sizes={WEIGHTS: size})
    refused(f"{WEIGHTS}: has 9000 bytes, announced were {size}", target)
    server.lengths = False
    refused(WEIGHTS, target)

@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_wrong_digest(server, target, name):
    server.files[place(name)] = bytes(len(FILES[name]))
    refused(f"{name}: its digest is .* announced was .* thrown away; try again", target)
    assert not (partial(target) / f"{name}.part").exists()
    server.files[place(name)] = FILES[name]
    assert fetch(target) == FILES

LISTS = [
    b"<html>", b"{}", b"[1]", b'{"error": "x"}', b'[{"path": "config.json", "size": "1", "oid": "00"}]',
    b'[{"path": "config.json", "size": -1, "oid": "%s"}]' % (b"0" * 40), b"[" * 9999, b"\xff",
    b'[{"path": "config.json", "size": 1, "oid": "zz"}]', b'[{"path": 1, "size": 1, "oid": "0"}]']

def test_repositories_without_what_we_read(server, target):
    for listing in LISTS:
        server.files[TREE] = listing
        refused("tree/main: (not a list|lists no)", target)
    server.offer({"config.json": b"{}", "pytorch_model.bin": b"x"})
    refused("lists no safetensors but 'pytorch_model.bin'", target)
    server.offer({WEIGHTS: b"{}"})
    refused("lists no config.json", target)

def test_too_little_room(server, target, monkeypatch):
    server.offer(FILES, sizes={WEIGHTS: 10 ** 18})
    refused("needs 1000000000.00 GB more and .* are free; make room, or set DICE_WEIGHTS", target)
    assert not server.asked("/config.json")
    usage, size = shutil.disk_usage(target.parent), sum(map(len, FILES.values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    server.offer(FILES)
    refused("needs 0.00 GB more", target)
    (partial(target) / f"{WEIGHTS}.part").write_bytes(FILES[WEIGHTS][:1])
    assert fetch(target) == FILES  # that byte made the difference

# ---------------------------------------------------------------------------------------- the paper's data
PAPER = {"prompt.json": b'{"instruction": "Why?"}\n{"instruction": "Who are you?"}\n',
         "preference.json": b'{"instruction": "Why?", "output": ["Because.", "No."]}\n'}

@pytest.fixture
def source(server, monkeypatch, tmp_path):
    server.files = {f"/UF/{name}": content for name, content in PAPER.items()}
    monkeypatch.setenv("DICE_DATA_URL", f"{server.url()}/UF/")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(ultrafeedback, "DIRECTORY", tmp_path / "uf-10k")
    return server

def test_the_papers_data(source, tmp_path, capsys):
    source.cut["/UF/preference.json"] = [10]
    assert ultrafeedback.main([]) == 0
    told = capsys.readouterr().out
    assert told == f"{tmp_path / 'uf-10k'}: 2 prompts and 1 pairs\n"
    assert {name: (tmp_path / "uf-10k" / name).read_bytes() for name in PAPER} == PAPER
    assert not any("Authorization" in headers for _, headers in source.seen)
    before = len(source.seen)
    assert ultrafeedback.main([]) == 0 and len(source.seen) == before

@pytest.mark.parametrize("name, content, match", [
    ("prompt.json", b"", "prompt.json: holds no rows"),
    ("prompt.json", b"404: Not Found", "prompt.json line 1: not valid JSON"),
    ("prompt.json", PAPER["prompt.json"] + b'{"text": 1}', "prompt.json line 3: has no"),
    ("preference.json", b'{"instruction": "a", "output": ["b"]}', "preference.json line 1"),
    ("preference.json", None, "HTTP Error 404")])
def test_data_of_another_form(source, tmp_path, capsys, name, content, match):
    source.files[f"/UF/{name}"] = content
    if content is None:
        del source.files[f"/UF/{name}"]
    assert ultrafeedback.main([]) == 2
    told = capsys.readouterr().err
    assert match in told and told.splitlines()[-1].startswith("ultrafeedback.py: ") and "by hand" in told
    assert not (tmp_path / "uf-10k" / name).exists()
    source.files[f"/UF/{name}"] = PAPER[name]
    assert ultrafeedback.main([]) == 0
