"""Kill a run again and again, and compare what it ends with to a run that was left alone.

    python tests/kill.py --kills 20

Both are `python dice.py` in directories of their own, killed with SIGKILL after random times. Exit code 0: every
file but timing.jsonl is the same to the byte.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DICE = Path(__file__).resolve().parent.parent / "dice.py"
SMALL = """
import sys
sys.path.insert(0, {root!r})
from data import tiny
tiny.SFT_EXAMPLES, tiny.PREFERENCES, tiny.HELD_OUT, tiny.DICE_PROMPTS = 2000, 64, 6, 10
import dice
sys.exit(dice.main())
""".format(root=str(DICE.parent))


def start(directory, argv, small=False, processes=1):
    """A run in directory/run, in the background; small: of a world that takes seconds."""
    directory.mkdir(exist_ok=True)
    program = [str(DICE)]
    if small:
        program = [str(directory / "small.py")]
        Path(program[0]).write_text(SMALL)
    if processes > 1:
        program = [
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            "--standalone",
            *program,
        ]
    log = open(directory / "log.txt", "a")
    return subprocess.Popen(
        [sys.executable, *program, "--out", "run", "--device", "cpu", *argv],
        cwd=directory,
        stdout=log,
        stderr=log,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(directory, argv, small=False, processes=1):
    code = start(directory, argv, small, processes).wait()
    assert code == 0, f"exit code {code}: " + (directory / "log.txt").read_text()[-2000:]


def contents(directory):
    """{name: bytes} of what a run has left."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("timing.jsonl", ".lock")
    }


def differences(one, two):
    one, two = contents(one), contents(two)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the run itself has its own")
    options, argv = parser.parse_known_args()
    scratch, moments = Path(tempfile.mkdtemp()), random.Random(options.seed)
    started = time.monotonic()
    finish(scratch / "alone", argv)
    seconds = time.monotonic() - started
    print(f"left alone: {seconds:.0f} s", flush=True)
    kills = 0
    while kills < options.kills:
        process = start(scratch / "killed", argv)
        # long enough to get a little further each time, short enough not to end before the last kill
        try:
            process.wait(3 + moments.uniform(0, 2 * seconds / options.kills))
            print(f"it ended after {kills} kills; begun again from nothing", flush=True)
            shutil.rmtree(scratch / "killed")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            here = scratch / "killed" / "run"
            print(
                f"kill {kills}: {', '.join(p.name for p in sorted(here.glob('partial/*'))) or 'between stages'}"
            )
    finish(scratch / "killed", argv)
    different = differences(scratch / "alone" / "run", scratch / "killed" / "run")
    print(f"{kills} kills; files that differ: {', '.join(different) or 'none'}")
    shutil.rmtree(scratch)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
