"""Memory: where the state of training is, and what fits."""
import math
import os
import re
from pathlib import Path

import torch

from data.files import InputError
from data.processes import any_process, cgroup, world
from model import OFFLOAD, count_parameters, fits_on_gpu, local_shard, parameter_shapes

MOMENTS = "exp_avg", "exp_avg_sq"

def choose_offload(settings, config, device, must_fit=True):
    """(what to offload, bytes of main memory for it): of "auto" the first that leaves 10 GB of the GPU for
    activations, and fits into the main memory that is free. If none does: InputError; for a dry run, which
    need not fit, the one that takes least."""
    count = count_parameters(config)
    free, needs = free_memory(), {}
    for way, (on_gpu, _) in OFFLOAD.items():
        fits = way == "no"
        if device.startswith("cuda"):
            fits = way == "all" or fits_on_gpu(settings, count, device, on_gpu / world())
        if settings.offload == way or (settings.offload == "auto" and fits):
            needs[way] = main_memory(settings, config, device, way)
        if not any_process(needs.get(way, math.inf) > free):  # all processes decide the same
            return way, needs[way]
    if not must_fit:
        return min(needs, key=needs.get), min(needs.values())
    asked = ", ".join(f"{need / 1e9:.1f} GB with --offload {way}" for way, need in needs.items())
    raise InputError(f"to train {count / 1e6:.0f} million parameters takes main memory: {asked}; "
                     f"{free / 1e9:.1f} GB are free. Free some, or take a larger machine or more GPUs")

def choose_recompute(settings, config, device):
    """Are activations computed again in the backward pass? "auto": yes, if those of the largest pass take
    more than half of the memory beside the state of training. The other half is for logits and copies."""
    if settings.recompute != "auto":
        return settings.recompute
    c, count = config, count_parameters(config)
    # Numbers that a layer keeps of a token: around its norms, its attention, and its MLP.
    attention = 2 * (c.heads + 2 * c.kv_heads) * c.head_size + c.heads * c.head_size
    numbers = 4 * c.width + attention + c.hidden * (4 if c.mlp == "swiglu" else 2)
    # A pair that is longer than a pass is a pass of its own.
    tokens = max(settings.train_tokens, 2 * min(settings.max_tokens, c.context))
    needed = tokens * c.layers * numbers * getattr(torch, settings.dtype).itemsize
    free = free_memory() - 16 * count / world()
    if device.startswith("cuda"):
        state = OFFLOAD[settings.offload][0] * count / world()
        free = torch.cuda.get_device_properties(device).total_memory - state
    return "yes" if any_process(needed > free / 2) else "no"

def main_memory(settings, config, device, way):
    """Bytes of main memory that the processes of this machine take to train, at most."""
    sizes = [math.prod(shape) / world() for shape in parameter_shapes(config).values()]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not device.startswith("cuda"):
        return processes * 16 * sum(sizes)
    # torch rounds pinned memory, which a GPU copies fast, up to a power of two for each tensor. Moments alone
    # are pinned. If all is offloaded, weights and gradients are.
    pinned = sum(2 ** math.ceil(math.log2(4 * size)) for size in sizes)
    kept = {"no": 0, "moments": 2 * pinned, "all": 2 * pinned + 8 * sum(sizes)}[way]
    # A model is read in main memory before it is placed, and put together there to be saved.
    return processes * (kept + getattr(torch, settings.dtype).itemsize * sum(sizes) * world())

def free_memory():
    """Bytes of main memory that this process may still take, by the machine and the limit of its cgroup."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        # What the kernel keeps of files that were read counts as used, but is freed when memory is needed.
        files = re.search(r"^inactive_file (\d+)", cgroup("memory.stat"), re.MULTILINE)
        return min(free, int(cgroup("memory.max")) - int(cgroup("memory.current")) + int(files[1]))
    except (OSError, ValueError, IndexError, TypeError):  # no such file, or "max": no limit
        return free

def machine(settings, device, needed):
    """One line: the device, its memory, the dtype, and what training needs of main memory."""
    s, name, place = settings, f"{torch.get_num_threads()} thread(s)", ""
    if s.device.startswith("cuda"):
        about = torch.cuda.get_device_properties(device)
        name = f"{about.name}, {about.total_memory / 1e9:.1f} GB"
        place = f" (--offload {s.offload}: {OFFLOAD[s.offload][1]})"
    free = free_memory()
    return (f"{world()} x {s.device}, {name}; {s.dtype}; training takes at most {needed / 1e9:.3g} of "
            f"{free / 1e9:.1f} GB of main memory{place}{': TOO LITTLE' if needed > free else ''}")

def rows_in_flight(model, prompts, count, sampling, most):
    """How many rows of the sampler, `most` or fewer, fit into what is free of the model's GPU."""
    if model.device.type != "cuda":
        return most
    # What torch has freed but keeps for itself counts as free.
    held = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    free = torch.cuda.mem_get_info(model.device)[0] + held
    lengths, config = [len(prompt.ids) for prompt in prompts], model.config
    answer = min(sampling.max_new_tokens, config.context - min(lengths))
    return min(most, rows_that_fit(config, model.dtype, max(lengths), answer, count, free))

def rows_that_fit(config, dtype, prompt, answer, count, free):
    """How many rows of the sampler fit into `free` bytes, for prompts and answers of so many tokens at most.
    All `count` answers of a prompt are drawn together: a multiple of count, and at least that."""
    c = config
    cached = 2 * c.layers * c.kv_heads * c.head_size * dtype.itemsize  # keys and values of a token
    # A prompt is read once for its answers: into a cache of its own, with the widest tensors of a layer.
    read = cached + 4 * (c.hidden + c.width) * dtype.itemsize
    # About 25 numbers of 4 bytes for each logit: to sort and to sum them, and what CUDA graphs hold of it.
    row = min(c.context, prompt + answer) * cached + prompt * read / count + 100 * c.vocab_size
    return max(count, int(0.9 * free / row) // count * count)  # a tenth is for what is not counted here

class AdamW(torch.optim.AdamW):
    """torch's AdamW. If its moments are offloaded, they are in main memory. Those of one parameter after the
    other come to the GPU in a step, and go back."""
    def __init__(self, weights, offload, **options):
        super().__init__(weights, **options)
        self.offload = offload

    @torch.no_grad()
    def step(self):
        if not self.offload:
            return super().step()
        [group] = self.param_groups
        weights = group["params"]
        for p in weights:
            group["params"], state = [p], self.state[p]  # torch's step sees this one alone
            kept = {key: state[key] for key in MOMENTS if state}
            for key, moment in kept.items():
                state[key] = torch.empty_like(p)
                local_shard(state[key]).copy_(moment)
            super().step()
            if not kept:  # after the first step
                on_gpu = local_shard(p).is_cuda
                kept = {key: torch.empty(local_shard(p).shape, pin_memory=on_gpu) for key in MOMENTS}
            for key, moment in kept.items():
                moment.copy_(local_shard(state[key]))
                state[key] = moment
        group["params"] = weights
