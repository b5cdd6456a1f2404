"""Whole files, JSON, and the error for bad input.

A program can be killed at any moment. So a file is written under another name, flushed to the disk, and then
renamed: under its own name a file is always complete."""
import fcntl
import json
import os
import shutil
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

class InputError(Exception):
    """Bad input, in one line: what is wrong, where, what to do. main prints it to stderr and exits with 2."""
    def __init__(self, message: str, alone=False):
        """alone: of several processes, only this one has met it."""
        self.alone = alone
        # The message may quote any input: unprintable characters become \n, \u202e and so on.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:900]))

def require(condition, message: str):
    if not condition:
        raise InputError(message)

def parse_json(text, where):
    """The value of a JSON text. InputError if it is not JSON, or so deep that writing it again could fail."""
    try:
        value = json.loads(text, object_pairs_hook=unique)
        if depth(value) > 100:
            raise RecursionError
    except RecursionError:
        raise InputError(f"{where}: not valid JSON: nested too deep") from None
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    return value

def unique(pairs):
    """The dict of a JSON object. The json module alone would drop the first value of a key given twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key is there twice in an object that begins with {pairs[0][0][:60]!r}")
    return value

def depth(value):
    if not isinstance(value, (dict, list)):
        return 0
    children = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, children), default=0)

def read_json(path: Path) -> dict:
    """The object in a JSON file; {} if there is no such file. InputError if it holds anything else."""
    value = parse_json(path.read_bytes(), path) if path.exists() else {}
    require(isinstance(value, dict), f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value

def write_json(path: Path, value: dict):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

def json_line(row: dict) -> str:
    """A row of a JSON lines file. A NaN, the value that is not equal to itself, becomes null."""
    return json.dumps({key: None if value != value else value for key, value in row.items()}) + "\n"

def write_rows(path: Path, rows):
    """A whole JSON lines file."""
    write_file(path, lambda scratch: scratch.write_text("".join(map(json_line, rows)), encoding="utf-8"))

def append_row(path: Path, row: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    with names_the_file(path), open(path, "a", encoding="utf-8") as file:
        file.write(json_line(row))

def whole_rows(path: Path) -> list[dict]:
    """The rows of a JSON lines file; [] if there is no such file. A kill or a power loss can leave a line
    that is cut short or damaged: such lines are removed from the file."""
    rows, whole = [], []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(row, dict):
            rows.append(row)
            whole.append(line)
    if len(whole) < len(lines):
        write_file(path, lambda scratch: scratch.write_bytes(b"".join(whole)))
        print(f"{path}: lines that were cut short or damaged are removed: {len(lines) - len(whole)}",
              file=sys.stderr)
    return rows

@contextmanager
def names_the_file(path: Path):
    """An OSError in this block names a file. Python leaves it out where writing fails, on a full disk say."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from error

def remove_scratch(directory: Path):
    """Remove what a killed process has left of whole() below a directory. No link is followed."""
    for path in list(directory.rglob(".*." + 8 * "[0-9a-f]" + ".tmp")):
        remove(path)

def remove(path: Path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

@contextmanager
def whole(path: Path):
    """Gives a path at which to make a file, or a directory of files. After the block it is renamed to `path`:
    that is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with names_the_file(path):
            yield scratch
            for part in (*scratch.glob("*"), scratch):
                flush(part)
            os.replace(scratch, path)
            flush(path.parent)
    except BaseException:  # also Ctrl-C
        remove(scratch)
        raise

def write_file(path: Path, write):
    """Make a file by write(scratch), with a path to write to."""
    with whole(path) as scratch:
        write(scratch)

def flush(path: Path):
    """Wait until a file or a directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)

def try_lock(path: Path, how=fcntl.LOCK_EX | fcntl.LOCK_NB):
    """Lock a file until the returned file is closed. None if another process has locked it. Nothing is
    written into the file, and a link is not followed: it may lead to any file."""
    file = open(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW), "a")
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        file.close()
        return None
    return file

def one_at_a_time(path: Path):
    """For a `with` block: no other process is inside one with this lock file. A killed process frees it."""
    file = try_lock(path)
    if not file:
        print(f"waiting: another process is downloading to {path.parent}", file=sys.stderr)
    return file or try_lock(path, fcntl.LOCK_EX)
