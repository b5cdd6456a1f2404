"""Processes and signals. torchrun starts one process for each GPU; without it there is one process. All see
the same directory of the run. Each does its share of the work. The first one writes the shared files."""
import gc
import io
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data.files import InputError

def own_device(device):
    """With torchrun, "cuda" is a GPU of its own for each process."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device

def join_processes(device):
    """Meet the other processes of torchrun, if it started this one. Returns the device of this process."""
    device = own_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # A process may wait long for another one's chunk. If another process ends, it notices at once.
        try:
            dist.init_process_group(backend_for(device), timeout=timedelta(days=7))
        except (ValueError, RuntimeError) as error:  # RANK is not set, MASTER_PORT is no number, ...
            raise InputError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: the processes cannot meet ({error}); "
                             "start them with torchrun, or unset WORLD_SIZE", alone=True) from None
    if ":" in device:
        torch.cuda.set_device(device)  # FSDP takes the current one
    if device.startswith("cuda"):
        torch.backends.cuda.enable_cudnn_sdp(False)  # use Flash: cuDNN makes a new plan for each shape
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            # Chunks, passes and stages have unlike sizes. What one has freed is of use to the next one then.
            # (torch reads the variable when it is imported, which is over.)
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    return device

def nvidia_driver():
    """Version of the driver of an NVIDIA GPU; "" if there is no GPU, or if CUDA_VISIBLE_DEVICES hides it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return ""
    text, there = "", Path("/dev/nvidia0").exists()
    try:
        if there:
            text = Path("/proc/driver/nvidia/version").read_text()
        else:  # under WSL, or a GPU with another number
            ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            text = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):  # no such file or program, or it finds no GPU
        pass
    version = re.search(r"\d+\.\d+(\.\d+)?", text)
    return version[0] if version else "of unknown version" if there else ""

def cgroup(name):
    """The text of a file of this process' cgroup, which limits what a container may use."""
    group = Path("/proc/self/cgroup").read_text().split("::")[1].strip()
    return Path(f"/sys/fs/cgroup{group}/{name}").read_text()

def usable_cores():
    """How many cores this process may use, by its affinity and the quota of its cgroup. torch takes all cores
    of the machine; more threads than cores wait for each other in every small product."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = cgroup("cpu.max").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError, IndexError):  # no such file, or "max": no quota
        return cores

def backend_for(device):
    return "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"

def leave_processes():
    if dist.is_initialized():
        gc.collect()  # a model that still exists uses threads of the group, and the process would abort
        dist.destroy_process_group()

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world():
    return dist.get_world_size() if dist.is_initialized() else 1

def is_first():
    """Is this the first process? Before join_processes() too."""
    return os.environ.get("RANK", "0") == "0"

def sum_over_processes(numbers, how="SUM"):
    """A list of numbers, each summed over the processes (or the largest: "MAX", the smallest: "MIN")."""
    if world() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, where gloo is
    dist.all_reduce(total, op=getattr(dist.ReduceOp, how))
    return total.tolist()

def any_process(condition):
    return sum_over_processes([float(bool(condition))], "MAX")[0] > 0

def barrier():
    """Wait for all processes."""
    sum_over_processes([0.0])

def share(items, tokens):
    """This process' part of a training step: (group, weight) of each pass of at most `tokens` tokens.

    With FSDP every process takes part in every pass. One without a group repeats an item with weight 0.
    FSDP takes the mean over the processes, so all other weights are the number of processes."""
    mine = sorted(items, key=len, reverse=True)[rank()::world()]
    groups = batches(mine, tokens, padded=False)
    passes = int(sum_over_processes([float(len(groups))], "MAX")[0])
    idle = [((mine or items)[-1:], 0)] * (passes - len(groups))
    return [(group, world()) for group in groups] + idle

def batches(items, tokens, size=len, padded=True):
    """Items in groups of similar size, largest first. No group has more than `tokens`, if all its items are
    padded to its first one or, not padded, together; an item that is larger has a group of its own."""
    groups, total = [], 0
    for item in sorted(items, key=size, reverse=True):
        total += size(groups[-1][0]) if groups and padded else size(item)
        if groups and total <= tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
            total = size(item)
    return groups

def lost_contact(error):
    """Does this RuntimeError say that another process has ended?"""
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error))

def log_info(text):
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)

class Progress(tqdm):
    """The bar of a loop, with tokens per second. Where stderr is no terminal: a line of text at most every
    minute, and one at the end; nothing of a loop that takes less than a minute."""
    def __init__(self, label, total, unit, **more):
        self.tokens, self.shown = 0, None
        self.is_log = not sys.stderr.isatty()
        if self.is_log:
            line = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}{postfix}, {elapsed} so far, {remaining} left"
            more |= {"file": io.StringIO(), "bar_format": line, "leave": True}
            more |= {"delay": 60, "mininterval": 60, "miniters": 1}
        if rank() > 0:
            more["disable"] = True
        # smoothing 0: the time left is by the mean speed, as answers end in groups. position 0: the bar of
        # a loop inside another loop takes its place.
        more = dict(smoothing=0, position=0, dynamic_ncols=True) | more
        super().__init__(desc=label, total=total, unit=unit, **more)

    def advance(self, tokens):
        """One more is done; it has so many tokens."""
        self.tokens += tokens
        self.update()

    @property
    def format_dict(self):
        about = super().format_dict
        if self.tokens and about["elapsed"]:
            about["postfix"] = f"{self.tokens / about['elapsed']:.0f} tokens/s"
        return about

    def display(self, *args, **more):
        if not self.is_log:
            super().display(*args, **more)
        elif self.n != self.shown:  # the last line may stand there when the bar is closed
            self.shown = self.n
            print(self, file=sys.stderr, flush=True)

# ---------------------------------------------------------------------------------------- Interruption
STOP = []  # the signal that asks the run to stop

class Interrupted(Exception):
    """Raised at a safe point after Ctrl-C or SIGTERM."""

@contextmanager
def held_signals():
    """Ctrl-C and SIGTERM stop the run at the next safe point; a second one stops it at once."""
    def hold(number, frame):
        if STOP:
            raise KeyboardInterrupt
        STOP.append(number)
        os.write(2, b"\nstopping at the next safe point; once more to stop at once\n")

    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        STOP.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
