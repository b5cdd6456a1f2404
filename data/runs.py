"""The directory of a run that nothing can spoil: killed at any moment, the same command goes on from there.

What makes that simple: every file appears whole or not at all; a stage is done when its checkpoint is there;
within a stage, finished chunks of work and the training's last checkpoint are kept in partial/; and what is
done again comes out the same, because everything random is drawn from the seed and its place in the run.

Also here, as it is not the method: several processes, what to do when memory runs out, and the dry run.
"""
import gc
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import model as models
from model import InputError

# ---------------------------------------------------------------------------------------- processes
# torchrun starts one process a GPU; each does its share of the chunks of samples and log-probs, and of every
# training step. All of them see the same directory. The first one writes what there is one of.


def own_device(device):
    """"cuda" is another GPU for each process that torchrun has started."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def join_processes(device):
    """Meet the other processes of torchrun, if it started this one. Returns the device of this process."""
    device = own_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # One may wait long for another's chunk; who is gone is noticed at once.
        dist.init_process_group(backend_for(device), timeout=timedelta(days=7))
    if ":" in device:
        torch.cuda.set_device(device)  # FSDP takes the current one
    return device


def backend_for(device):
    return "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"


def leave_processes():
    if dist.is_initialized():
        gc.collect()  # a model left over holds threads of the group, and the process would end in an abort
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Wait for all processes."""
    over_all(0.0)


def over_all(values, how="SUM"):
    """A number, or a list of numbers, summed (or the largest, "MAX") over the processes."""
    if world() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)  # on the CPU, where gloo is
    dist.all_reduce(total, op=getattr(dist.ReduceOp, how))
    return total.tolist()


def shard(model, settings, device):
    """Make a model on the CPU ready for training on this process' device, in place.

    Of each weight the processes keep a float32 part each (FSDP2; with one process, all of it): steps of 5e-7
    would be lost in the rounding of bfloat16 weights. Layer by layer they meet as a copy in the dtype of the
    arithmetic, and go again; gradients add up in float32.
    """
    if not dist.is_initialized():
        dist.init_process_group(backend_for(device), store=dist.HashStore(), rank=0, world_size=1)
    options = {"mesh": init_device_mesh(torch.device(device).type, (world(),)),
               "mp_policy": MixedPrecisionPolicy(getattr(torch, settings.dtype), torch.float32,
                                                 cast_forward_inputs=False)}
    if offloads(settings, sum(p.numel() for p in model.parameters()), device):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.startswith("cuda"))
    groups = [*model.layers, model]  # what meets at once; the embedding apart, unless the head needs it too
    if model.head is not None:
        groups.insert(0, model.embed)
    for module in groups:
        fully_shard(module.float(), **options)
    model.computes = torch.device(device), getattr(torch, settings.dtype)


def offloads(settings, count, device):
    """Does the state of training `count` parameters (16 bytes each: float32 weight, gradient, two moments)
    live in main memory? By itself if it would leave less than 10 GB of the GPU's to activations."""
    if settings.offload != "auto" or not device.startswith("cuda"):
        return settings.offload == "yes"
    return 16 * count / world() + 10e9 > torch.cuda.get_device_properties(device).total_memory


def whole(tensor):
    """A tensor of which processes may hold parts, on each of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor):
    """This process' own part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def lost_contact(error):
    """Does this RuntimeError say that another process is gone?"""
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error))


# ---------------------------------------------------------------------------------------- interruption
STOP = []  # the signal that asks the run to stop


class Interrupted(Exception):
    """Raised at a safe point after Ctrl-C or SIGTERM."""


def safe_point():
    if STOP:
        raise Interrupted


@contextmanager
def held_signals():
    """Ctrl-C and SIGTERM wait for the next safe point; a second one does not."""
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


# ---------------------------------------------------------------------------------------- files
def say(text):
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


def write(path, text):
    """A whole file or none, by the first process: all of them have the same to write."""
    if rank() == 0:
        models.write_file(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def line(row):
    """A dict as a line of JSON. What is not known, NaN here, is null there."""
    return json.dumps({key: None if value != value else value for key, value in row.items()}) + "\n"


def write_rows(path, rows):
    write(path, "".join(map(line, rows)))


def append(path, row):
    """A row at the end of a file of JSON lines."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line(row))


def whole_rows(path):
    """The rows of a file of JSON lines. A last line without its end was being written, and is taken out."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[:data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


class RunDirectory:
    """metrics.jsonl, timing.jsonl, partial/, and the lock of a run in the directory `out`."""

    def __init__(self, out):
        self.out, self.lock_file = Path(out), None

    def begin(self, identity):
        """Begin a run, or go on with the one of the same identity (a dict of JSON values).

        InputError if another process is at work in the directory, if it holds something else than a run, or a
        run of another identity, telling what differs.
        """
        if rank() == 0:
            self.claim(identity)
            for leftover in list(self.out.rglob(".*.tmp")):  # of writes that were cut short
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            for name in ("timing.jsonl", "metrics.jsonl"):  # and of lines
                whole_rows(self.out / name)
        barrier()
        self.metrics = whole_rows(self.out / "metrics.jsonl")
        self.logged = {(row["stage"], row.get("step")) for row in self.metrics}

    def claim(self, identity):
        known = self.out / "settings.json"
        if not known.exists() and self.out.exists() and (
                not self.out.is_dir() or any(path.name[0] != "." for path in self.out.iterdir())):
            raise InputError(f"{self.out}: holds files already, not a run's; choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock()
        if not known.exists():
            write(known, json.dumps(identity, indent=1) + "\n")
            return
        old = models.read_json(known)
        differ = [f"{key} have changed" if " " in key else
                  f"--{key.replace('_', '-')} {old.get(key)!r}, now {identity.get(key)!r}"
                  for key in sorted(old.keys() | identity.keys()) if old.get(key) != identity.get(key)]
        if differ:
            raise InputError(f"{self.out}: was begun with other settings ({'; '.join(differ)}); give the "
                             "same ones to go on, or choose another --out")
        say(f"{self.out}: goes on where it stopped")

    def lock(self):
        """One process in a directory at a time; the lock goes with the process, however that ends."""
        if fcntl is None:
            return
        self.lock_file = open(self.out / ".lock", "w")
        try:
            fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{self.out}: another process is at work in it; wait for it to end, or choose "
                             "another --out")

    def unlock(self):
        if self.lock_file:
            self.lock_file.close()

    def log(self, row):
        """A row of metrics.jsonl, once: what is done again after an interruption is there already."""
        key = row["stage"], row.get("step")
        if key not in self.logged:
            self.logged.add(key)
            self.metrics.append(row)
            if rank() == 0:
                append(self.out / "metrics.jsonl", row)

    def log_speed(self, what, seconds, **amount):
        """A row of timing.jsonl, apart from the metrics, which are the same whenever a run is repeated."""
        if rank() == 0:
            append(self.out / "timing.jsonl", {"what": what, **amount, "seconds": round(seconds, 4)})

    def partial(self, name):
        return self.out / "partial" / name.replace(" ", "-")

    def end_stage(self):
        """What was kept to go on within a stage is not needed after it."""
        barrier()
        if rank() == 0:
            shutil.rmtree(self.out / "partial", ignore_errors=True)
        barrier()

    def in_chunks(self, what, load, items, size, work, answers=1):
        """work(load(), chunk, update) on chunks of items, a list of JSON values each; all in one list.

        The values of a chunk are a line of a file in partial/ as soon as they are known, and are not worked
        out again; nothing is loaded if all of them are. Processes share the chunks. update: is told how many
        more answers are done; an item has `answers`.
        """
        def known():
            rows = [row for path in self.out.glob(f"partial/{self.partial(what).name}.*.jsonl")
                    for row in whole_rows(path)]
            return {row["chunk"]: row["values"] for row in rows}

        done, count = known(), math.ceil(len(items) / size)
        barrier()  # all have read before anyone writes
        mine = [i for i in range(count) if i not in done][rank()::world()]
        model = load() if mine else None
        with tqdm(total=len(items) * answers, desc=what, unit="answer", disable=rank() > 0, leave=answers > 1,
                  initial=sum(map(len, done.values()))) as bar:
            for i in mine:
                safe_point()
                started = time.perf_counter()
                values = work(model, items[i * size:(i + 1) * size], bar.update)
                path = self.partial(f"{what}.{rank()}.jsonl")
                append(path, {"chunk": i, "values": values})
                models.flush(path)
                done[i] = values
                self.log_speed(what, time.perf_counter() - started, answers=len(values))
        barrier()  # all have written
        if world() > 1:
            done = known()
        return [value for i in range(count) for value in done[i]]

    def save_training(self, stage, model, optimizer, step, history):
        """Keep what training goes on from after a step, and nothing older: weights, AdamW's moments, fDPO's
        choices. Each process keeps its own part, parameter by parameter: all at once may be more than main
        memory."""
        if rank() == 0:
            models.flush(self.out / "metrics.jsonl")  # no row may be lost where what comes after it is kept
        shutil.rmtree(self.state(stage, step), ignore_errors=True)  # of a process that was ahead when killed
        with models.whole_directory(self.state(stage, step)) as scratch:
            models.write_json(scratch / "about.json", {"history": history})
            for name, p in model.named_parameters():
                models.write_tensors(scratch / f"{name}.safetensors", self.trained(p, optimizer))
        barrier()
        for older in self.states(stage):
            if older != step:
                shutil.rmtree(self.state(stage, older))

    def resume_training(self, stage, model, optimizer, history):
        """Put back what all processes kept last of a training, if anything; returns the steps it took."""
        step = int(min(over_all([float(max(self.states(stage), default=-1))], "MIN")))
        if step < 0:
            return 0
        kept = self.state(stage, step)
        history += models.read_json(kept / "about.json")["history"]
        for p in model.parameters():  # a step of nothing makes the optimizer's state, in the right place
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, p in model.named_parameters():
                tensors = models.read_tensors(kept / f"{name}.safetensors")
                for key, tensor in self.trained(p, optimizer).items():
                    tensor.copy_(tensors[key])
                optimizer.state[p]["step"].fill_(step)
        say(f"{stage}: goes on after step {step}")
        return step

    @staticmethod
    def trained(p, optimizer):
        """A parameter and AdamW's moments of it, as far as they are this process' own."""
        return {"weight": part(p)} | {key: part(optimizer.state[p][key]) for key in ("exp_avg", "exp_avg_sq")}

    def state(self, stage, step):
        return self.partial(f"{stage}.{step}.{rank()}-of-{world()}")

    def states(self, stage):
        return [int(path.name.split(".")[1])
                for path in self.out.glob(f"partial/{stage}.*.{rank()}-of-{world()}")]


# ---------------------------------------------------------------------------------------- memory
class Budget:
    """Padded tokens in one pass through a model. When memory runs out on that it is halved, for good."""

    def __init__(self, tokens, what):
        self.tokens, self.what = tokens, what

    def shrink(self, group, size):
        """Memory has run out on this group of dice.Sample or dice.Pair, of `size` padded tokens each.
        InputError if it is one alone."""
        if len(group) == 1:
            raise InputError(f"out of memory in {self.what} with one alone, of {len(group[0])} tokens, on "
                             f"the prompt {str(group[0].prompt.content)[:60]!r}; leave such long ones out "
                             "(--max-tokens, --max-new-tokens), or take a larger machine")
        self.tokens = size * len(group) // 2
        say(f"out of memory in {self.what}: from here on {self.tokens} tokens in a pass, to the same result")


class Shrunk(Exception):
    """Memory ran out in the middle of FSDP's work: the budget is smaller now, and the model of no use."""


OUT_OF_MEMORY = "out of memory", "allocate memory", "ALLOC_FAILED"  # CUDA, CPU, cuBLAS


def out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def free_last_model():
    """FSDP's models hold themselves, in circles: without this the next one would find no room beside them."""
    if dist.is_initialized():
        gc.collect()
    torch.cuda.empty_cache()


def within_memory(work, *args):
    """work(*args), or None where memory ran out. By then, behind the except, what it had is free again."""
    try:
        return work(*args)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise


def free_memory():
    """Bytes of main memory that are free, or could be made so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---------------------------------------------------------------------------------------- the dry run
def plan(run, count, sampling, scoring):
    """What a dice.Run will do, take and need, as text. count: parameters of its policy; sampling, scoring:
    seconds that a token takes to be drawn, to be read. InputError where the disk is too small."""
    s, c = run.settings, run.config
    lengths = [len(x.tokens) for p in run.offline for x in (p.chosen, p.rejected)] or [s.max_new_tokens / 2]
    answer, prompt = sum(lengths) / len(lengths), sum(len(p.ids) for p in run.prompts) / len(run.prompts)
    drawn, dpo_steps = s.rounds * len(run.prompts) * s.samples, 0 if run.reference else s.dpo_steps
    pairs = s.sft_steps * s.sft_batch / 2 + dpo_steps * s.batch + s.rounds * s.steps * s.batch
    hours = [seconds / 3600 for seconds in (  # a training pass is three: forward, and backward twice as much
        drawn * answer * sampling, 2 * drawn * (prompt / s.samples + answer) * scoring,
        3 * pairs * 2 * (prompt + answer) * scoring)]

    size = 2 if s.dtype == "bfloat16" else 4  # bytes of a weight
    stages = s.rounds + run.is_tiny + (s.sft_steps > 0) + (dpo_steps > 0)
    disk = stages * count * size + 2 * 12 * count + drawn * 12 * answer  # two states of training, at most
    there = next(path for path in (run.out, *run.out.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if disk > free:
        raise InputError(f"{run.out}: the run needs about {disk / 1e9:.1f} GB of disk, and there are "
                         f"{free / 1e9:.1f} GB")
    cache = 2 * s.rows * min(c.context, prompt + s.max_new_tokens) * c.layers * c.kv_heads * c.head_size
    need = {"sampling": (count + cache) * size, "scoring": count * size, "training": 16 * count / world()}
    if offloads(s, count, run.device):
        need["training"] = count * size / c.layers  # a layer at a time; the rest is in main memory
    free_last_model()
    have = torch.cuda.mem_get_info(run.device)[0] if s.device.startswith("cuda") else free_memory()
    return "\n".join((
        f"plan for {run.out}; nothing was written",
        f"data     {len(run.prompts)} prompts of {prompt:.0f} tokens, {len(run.offline)} offline pairs and "
        f"{len(run.held_out)} held out",
        f"policy   {count / 1e6:.1f} million parameters, {s.dtype} on {s.device}",
        f"stages   SFT of {s.sft_steps} steps, DPO of {dpo_steps}, {s.rounds} rounds of "
        f"{drawn // max(1, s.rounds)} samples and {s.steps} steps of {s.batch} pairs",
        f"time     about {sum(hours):.2g} hours, if answers have {answer:.0f} tokens: sampling "
        f"{hours[0]:.2g}, scoring {hours[1]:.2g}, training {hours[2]:.2g}",
        f"disk     {disk / 1e9:.2f} GB of {free / 1e9:.0f} GB free: {stages} checkpoints, the state of the "
        "training, the samples",
        f"memory   {', '.join(f'{what} {n / 1e9:.2f} GB' for what, n in need.items())}, and what passes "
        f"through; {have / 1e9:.1f} GB are free" + ("" if max(need.values()) < have else ": TOO LITTLE")))
