"""The dry run: what a run will do, take and need."""
import math
import shutil
import time
from dataclasses import replace

import torch

import model as models
from data import memory
from data.files import require
from data.processes import log_info, rank, world
from data.runs import free_last_model

def print_plan(run, new_model, generate, answer_logprobs, make_sample, prompts_of_round):
    """Print stages, hours, disk and memory of a run; write nothing. Then InputError if the disk is too small,
    or main memory for the training."""
    s, c, offload = run.settings, run.config, run.settings.offload
    s.offload, needed = memory.choose_offload(s, c, run.device, must_fit=False)
    machine = memory.machine(s, run.device, needed)
    run.report_defaults()
    rounds = [(s.of_round(t), prompts_of_round(run, t)) for t in range(1, s.rounds + 1)]
    count, sampling, scoring = measure(run, new_model, generate, answer_logprobs, make_sample)
    # Mean tokens of a prompt and of an answer. Without offline answers: half of the longest.
    prompt = sum(len(p.ids) for p in run.prompts) / len(run.prompts)
    lengths = [len(x.tokens) for p in run.offline for x in (p.chosen, p.rejected)]
    answer = sum(lengths) / len(lengths) if lengths else s.sampling.max_new_tokens / 2
    answer = min(answer, s.sampling.max_new_tokens)
    drawn = sum(of_round.samples * len(prompts) for of_round, prompts in rounds)
    per_answer = sum(len(prompts) for _, prompts in rounds) * prompt / max(1, drawn)  # a prompt is read once
    sft_steps = 0 if s.start_from else s.sft_steps
    dpo_steps = 0 if s.start_from or s.reference else s.dpo_steps
    pairs = sft_steps * s.sft_batch / 2 + dpo_steps * s.batch
    pairs += sum(of_round.steps * of_round.batch for of_round, _ in rounds)
    # A pass of training takes three times as long as one of scoring: the backward pass takes two.
    hours = {"sampling": drawn * answer * sampling / 3600,
             "scoring": 2 * drawn * (per_answer + answer) * scoring / 3600,
             "training": 3 * pairs * 2 * (prompt + answer) * scoring / 3600}
    size = 2 if s.dtype == "bfloat16" else 4  # bytes of a weight
    random = [path for path in (run.policy_dir, run.prev_dir) if path and path.parent == run.out]
    stages = len(rounds) + (sft_steps > 0) + (dpo_steps > 0) + (0 if s.start_from else len(random))
    disk = stages * count * size + 2 * 12 * count + drawn * 12 * answer  # two states of training, at most
    free = shutil.disk_usage(next(p for p in (run.out, *run.out.absolute().parents) if p.exists())).free
    full = "" if disk <= free else ": TOO LITTLE"
    free_last_model()
    have, rows = memory.free_memory(), min(s.rows, s.chunk * s.samples)
    capacity = min(c.context, prompt + s.sampling.max_new_tokens)
    if s.device.startswith("cuda"):
        have = torch.cuda.mem_get_info(run.device)[0]
        left, dtype = have - count * size, getattr(torch, s.dtype)
        rows = min(rows, memory.rows_that_fit(c, dtype, prompt, capacity - prompt, s.samples, left))
    cache = 2 * rows * capacity * c.layers * c.kv_heads * c.head_size
    need = {"sampling": (count + cache) * size, "scoring": count * size, "training": 16 * count / world()}
    if s.device.startswith("cuda"):
        copies = (size + 4) * count if models.gathers_once(s, count, run.device) else 0
        need["training"] = models.OFFLOAD[s.offload][0] * count / world() + copies
    enough = "" if max(need.values()) < have else ": TOO LITTLE"
    times = "not known: this machine lacks the memory to measure it"
    if math.isfinite(sampling):
        parts = ", ".join(f"{what} {spoken(h)}" for what, h in hours.items())
        times = f"about {spoken(sum(hours.values()))}, if answers have {answer:.0f} tokens: {parts}"
    needs = ", ".join(f"{what} {n / 1e9:.2f} GB" for what, n in need.items())
    if rank() == 0:
        print(f"""plan for {run.out}; nothing was written
machine  {machine}
data     {len(run.offline)} offline pairs and {len(run.held_out)} held out
prompts  {len(run.prompts)} of {prompt:.0f} tokens; {drawn} samples in {s.rounds} rounds
policy   {count / 1e6:.1f} million parameters, {s.dtype} on {s.device}
stages   SFT of {sft_steps} steps, DPO of {dpo_steps}, {s.rounds} rounds of {s.steps} steps of {s.batch} pairs
time     {times}
disk     {disk / 1e9:.2f} GB of {free / 1e9:.0f} GB free{full}; {stages} checkpoints, training state, samples
memory   {needs}, and activations; {have / 1e9:.1f} GB are free{enough};
         {rows} rows are sampled at once""")
    require(disk <= free, f"{run.out}: needs {disk / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free")
    s.offload = offload
    memory.choose_offload(s, c, run.device)

def spoken(hours):
    """Hours in words; below one hour, minutes."""
    minutes = math.ceil(60 * hours)
    if minutes > 60:
        return f"{hours:.1f} hours"
    return "1 minute" if minutes == 1 else f"{minutes} minutes"

def measure(run, new_model, generate, answer_logprobs, make_sample):
    """(parameters of the policy, seconds to sample a token, seconds to read and score one). The seconds are
    NaN where the model does not fit."""
    s, saved = run.settings, run.policy_dir.exists()
    count = models.count_parameters(run.config)
    size = 2 if saved and s.dtype == "bfloat16" else 4  # bytes of a weight; random ones are made in float32
    fits = count * size < memory.free_memory()
    if s.device.startswith("cuda"):
        fits = fits and count * getattr(torch, s.dtype).itemsize < torch.cuda.mem_get_info(run.device)[0]
    if not fits:
        return count, math.nan, math.nan
    log_info(f"making the model, {count / 1e6:.1f} million parameters")
    if saved:
        model = run.load(run.policy_dir)
    else:  # a run makes it from random weights
        model = new_model(run.config, s.seed).to(run.device, getattr(torch, s.dtype))
    prompts = run.prompts[:max(1, s.rows // s.samples)]
    ids = [p.ids for p in prompts]
    for tokens, what in ((2, "to warm up"), (32, "to measure")):  # the first time is slower than the others
        sampling = replace(s.sampling, max_new_tokens=min(tokens, s.sampling.max_new_tokens))
        log_info(f"sampling {len(ids) * s.samples} answers of {sampling.max_new_tokens} tokens {what}")
        started = time.perf_counter()
        drawn = list(generate(model, ids, s.samples, sampling, stop_ids=[], seed=s.seed, rows=s.rows))
        per_sampled = (time.perf_counter() - started) / sum(len(tokens) for _, _, tokens, _ in drawn)
        samples = [make_sample(prompts[i], tokens, "") for i, _, tokens, _ in drawn[:64]]
        log_info(f"scoring {len(samples)} of them {what}")
        started = time.perf_counter()
        list(answer_logprobs(model, samples, s.score_tokens))
        read = sum(len(x.tokens) for x in samples) + sum(map(len, {tuple(x.prompt.ids) for x in samples}))
        per_read = (time.perf_counter() - started) / read
    return count, per_sampled, per_read
