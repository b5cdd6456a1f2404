"""Kill a run again and again, and compare what it ends with to a run that was left alone.

    python tests/kill.py --kills 20

Both are `python dice.py` in directories of their own, with the settings ARGV if none are given, killed with
SIGKILL after random times. Exit code 0: every file but timing.jsonl is the same to the byte.
"""
import argparse
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DICE = Path(__file__).resolve().parent.parent / "dice.py"
WORLD = {"SFT_EXAMPLES": 2000, "PREFERENCES": 48, "HELD_OUT": 6, "DICE_PROMPTS": 10}  # takes seconds
ARGV = ("--sft-steps 100 --dpo-steps 8 --samples 4 --steps 40 --min-valid 0 --chunk 32 --save-steps 5 "
        "--data-filter fdpo").split()
FORKS = multiprocessing.get_context("forkserver")  # no run waits for torch: the server has imported it
FORKS.set_forkserver_preload(["dice"])

def start(directory, argv, launcher=()):
    """`python dice.py` in directory/run, in the background. launcher: python's arguments before it."""
    directory.mkdir(exist_ok=True)
    with open(directory / "log.txt", "a") as log:
        return subprocess.Popen([sys.executable, *launcher, DICE, "--out", "run", "--device", "cpu", *argv],
                                cwd=directory, stdout=log, stderr=log)

def finish(directory, argv):
    assert start(directory, argv).wait() == 0, (directory / "log.txt").read_text()[-2000:]

def start_small(directory, argv, count=1):
    """The processes of a run in directory/run, in the background, in a small tiny world."""
    os.environ["PYTHONPATH"] = str(DICE.parent)  # the fork server of Python 3.11 knows no other sys.path
    directory.mkdir(exist_ok=True)
    with socket.create_server(("localhost", 0)) as free:
        meeting = dict(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(count))
    processes = []
    for rank in range(count):
        environment = meeting | {"RANK": str(rank)} if count > 1 else {}
        processes.append(FORKS.Process(target=small_run, args=(directory, argv, environment)))
        processes[-1].start()
    return processes

def small_run(directory, argv, environment):
    import dice
    from data import plots, tiny
    os.environ.update(environment)
    os.chdir(directory)
    for stream in (1, 2):
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    vars(tiny).update(WORLD)
    plots.save = lambda *_: None
    sys.exit(dice.main([*argv, "--out", "run", "--device", "cpu"]))

def contents(directory):
    """{name: bytes} of what a run has left."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*"))
            if path.is_file() and path.name not in ("timing.jsonl", ".lock")}

def progress(directory):
    """How many steps and chunks a run has done, those that it did again included."""
    timing = directory / "run/timing.jsonl"
    return timing.read_bytes().count(b"\n") if timing.exists() else 0

def differences(one, two):
    one, two = contents(one), contents(two)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the run itself has its own")
    options, argv = parser.parse_known_args()
    argv = argv or ARGV
    scratch, moments, kills = Path(tempfile.mkdtemp()), random.Random(options.seed), 0
    finish(scratch / "alone", argv)
    whole = progress(scratch / "alone")
    print(f"left alone: {whole} chunks and steps", flush=True)
    while kills < options.kills:
        process = start(scratch / "killed", argv)
        # Far enough to get a little further each time, not so far that it ends before the last kill.
        until = progress(scratch / "killed") + moments.uniform(0, 2 * whole / options.kills)
        while process.poll() is None and progress(scratch / "killed") < until:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2))
        if process.poll() is None:
            process.kill()
            process.wait()
            kills += 1
            kept = ", ".join(sorted(path.name for path in (scratch / "killed/run/partial").glob("*")))
            print(f"kill {kills}: {kept or 'between stages'}", flush=True)
        else:
            print(f"it ended after {kills} kills; begun again from nothing", flush=True)
            shutil.rmtree(scratch / "killed")
    finish(scratch / "killed", argv)
    different = differences(scratch / "alone" / "run", scratch / "killed" / "run")
    print(f"{kills} kills; files that differ: {', '.join(different) or 'none'}")
    shutil.rmtree(scratch)
    return bool(different)

if __name__ == "__main__":
    sys.exit(main())
