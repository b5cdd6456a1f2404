"""Downloads: one file, or the files of a repository on the Hugging Face hub.

A broken transfer continues where it stopped, also in the next run. A file or directory has its name only when
it is complete and has the announced size and digest."""
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from data.files import InputError, flush, one_at_a_time, require
from data.processes import Progress
from data.tokenizer import TOKENIZER_FILES

TRIES = 5  # give up after so many tries in a row that bring nothing new
PAUSE = 0.5  # seconds before the second try; each later pause is twice as long
ADDRESS = re.compile(r"https?://([\w-]{1,63}(\.[\w-]{1,63})*|\[[\da-f:.]+\])(:\d{1,5})?(/[!-?A-~]*)?", re.A)
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)

class Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, *answer):
        new = super().redirect_request(request, *answer)
        if new and urlsplit(new.full_url)[:2] != urlsplit(request.full_url)[:2]:
            new.remove_header("Authorization")  # the token is for the first host only
        return new

def download(url: str, path: Path, size=None, digest=None, token=""):
    """Fetch a file; an incomplete one is kept in path.part. OSError if it cannot be fetched or written,
    InputError if its size or digest is not the given one."""
    if digest and path.exists() and digest_of(path, digest) == digest:
        return
    part = path.with_name(path.name + ".part")
    tries, most = TRIES, 0  # most: the most bytes that there were before a try
    part.touch()
    with Progress(path.name, size, "B", unit_scale=True, smoothing=0.3) as bar:  # the speed of late
        while True:
            had = part.stat().st_size
            try:
                if not had or had != size:
                    receive(url, part, had, size, token, bar)
                break
            except BROKEN as error:
                code = getattr(error, "code", None)  # the status, if this is an HTTPError
                if code == 416:  # path.part is longer than the file
                    os.truncate(part, 0)
                elif code and code < 500 and code not in (408, 429):  # another try would not help
                    raise
                most = max(most, had)
                tries = TRIES if part.stat().st_size > most else tries - 1
                if not tries:
                    raise OSError(f"{url}: {error}") from None
                time.sleep(PAUSE * 2 ** (TRIES - tries))
    found = digest and digest_of(part, digest)
    if found != digest:
        part.unlink()
        raise InputError(f"{url}: its digest is {found}, announced was {digest}; it was thrown away")
    flush(part)
    os.replace(part, path)
    flush(path.parent)

def receive(url, part, start, size, token, bar):
    """Append the rest of a file to `part`, which has `start` bytes. One of BROKEN if it is cut short."""
    request = urllib.request.Request(url, headers={"User-Agent": "dice"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(Redirects)
    with opener.open(request, timeout=30) as response, open(part, "ab") as file:
        if not (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            start = 0  # this server always sends the whole file
            file.truncate(0)
        length = response.headers.get("Content-Length") or ""
        total = start + int(length) if length.isdecimal() else size
        require(size in (None, total), f"{url}: has {total} bytes, announced were {size}")
        bar.total, bar.n = total, start
        while block := response.read(2 ** 20):
            file.write(block)
            bar.update(len(block))
        if total not in (None, file.tell()):
            raise ConnectionError(f"broke off after {file.tell()} of {total} bytes")

def digest_of(path, like):
    """The digest of a file, of the same kind as `like`: sha256, or sha1 of git's blob (40 digits)."""
    if len(like) == 64:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha1(b"blob %d\0" % path.stat().st_size + path.read_bytes()).hexdigest()

def address(name, default):
    """The http(s) address in an environment variable. What may be a password in it is shown to nobody."""
    url = (os.environ.get(name) or default).strip().rstrip("/")
    require(ADDRESS.fullmatch(url), f"{name} {url.rpartition('@')[2]}: is not an http(s) address of a host, "
            "without user and password")
    return url

def download_repository(repository: str, directory: Path):
    """Fetch config, safetensors and tokenizer of a repository on the hub. InputError if that fails.
    The environment may name another hub (HF_ENDPOINT) and a token for gated repositories (HF_TOKEN)."""
    token = os.environ.get("HF_TOKEN", "").strip()
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        hub = address("HF_ENDPOINT", "https://huggingface.co")
        require(re.fullmatch("[!-~]*", token), "HF_TOKEN: has characters that no token has; copy it again")
        files = list_files(f"{hub}/api/models/{repository}/tree/main", token)
        directory.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(directory.parent / ".lock"):
            if directory.exists():  # another process has fetched it
                return
            partial.mkdir(exist_ok=True)
            missing = sum(size for size, _ in files.values())
            for path in partial.iterdir():
                if path.name.removesuffix(".part") in files:
                    missing -= path.stat().st_size
                else:  # left from an earlier version of the repository
                    path.unlink()
            free = shutil.disk_usage(partial).free
            require(missing <= free, f"needs {missing / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free; "
                    "make room, or set DICE_WEIGHTS to a directory elsewhere")
            print(f"downloading {hub}/{repository} to {directory}", file=sys.stderr)
            for name, (size, digest) in files.items():
                download(f"{hub}/{repository}/resolve/main/{name}", partial / name, size, digest, token)
            os.rename(partial, directory)
            flush(directory.parent)
    except (OSError, InputError) as error:
        code = getattr(error, "code", None)
        advice = "correct the name" if code == 404 else "try again"
        if code in (401, 403):  # without a token the hub says 401 of a repository that is not there, too
            advice = (f"correct the name, or accept its terms, if any, on {hub}/{repository}, and set "
                      "HF_TOKEN to your token")
        told = str(error).replace(token, "HF_TOKEN") if token else error  # a server may repeat it
        raise InputError(f"{repository}: no such directory is here, and it was not downloaded from the hub: "
                         f"{told}; {advice}, or put its config.json, *.safetensors and tokenizer files into "
                         f"{directory} by hand") from None

def list_files(url, token):
    """The files of a repository that we read: name -> (size, digest). Nothing is left on the disk: there may
    be no such repository."""
    with tempfile.TemporaryDirectory() as scratch:
        listing = Path(scratch, "listing.json")
        download(url, listing, token=token)
        content = listing.read_bytes()
    files, unsafe = {}, []
    try:
        for entry in json.loads(content):
            name, size = entry["path"], entry["size"]
            digest = (entry.get("lfs") or entry)["oid"]  # a large file has a sha256
            if name.endswith((".bin", ".pth")):
                unsafe.append(name)
            # Only known names: nothing can be written outside the directory.
            if name in ("config.json", "model.safetensors.index.json", *TOKENIZER_FILES) \
                    or re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name):
                if size < 0 or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
                    raise ValueError
                files[name] = size, digest
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{url}: not a list of files with sizes and digests") from None
    hint = f" but {min(unsafe)[:60]!r}: convert it" if unsafe else ""
    require(any(name.endswith(".safetensors") for name in files), f"{url}: lists no safetensors{hint}")
    require("config.json" in files, f"{url}: lists no config.json")
    return files
