"""The directory of a run, and the four verbs by which dice.py uses it: stage, map, training and fit.
A run may be killed at any moment. The same command then goes on from there.

Three facts make this simple. A file is complete or not there. A stage is done when its checkpoint is there;
until then its finished chunks and the last state of its training are in partial/. A part that is done again
gives the same result, because every random number follows from the seed and its place in the run."""
import gc
import hashlib
import os
import shutil
import time
from contextlib import ExitStack, suppress
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import model as models
from data import files, memory
from data.files import InputError, require
from data.options import all_options, as_dict, flag
from data.processes import (
    STOP, Interrupted, Progress, any_process, barrier, held_signals, join_processes, leave_processes,
    log_info, rank, sum_over_processes, usable_cores, world)

# ---------------------------------------------------------------------------------------- Memory
OUT_OF_MEMORY = "out of memory", "allocate memory", "ALLOC_FAILED"  # CUDA, CPU, cuBLAS

class Restart(Exception):
    """The model must be loaded anew: memory ran out inside a pass of FSDP, and the budget is smaller now; or
    a saved state was damaged, and is removed now."""

def again_after_restart(train):
    """Decorator of a function that loads its own model: it begins again, from the last saved state."""
    def wrapped(*args, **options):
        while True:
            with suppress(Restart):
                return train(*args, **options)
    return wrapped

def free_last_model():
    """Free a model's memory before the next one is loaded. FSDP's models are in reference cycles."""
    if dist.is_initialized():
        gc.collect()
    torch.cuda.empty_cache()

# ---------------------------------------------------------------------------------------- The run
class Run:
    """metrics.jsonl, timing.jsonl, partial/, the checkpoints, and the lock of a run in its directory.

    with run: ... begins the run, or goes on with it. InputError if another process works in the directory, or
    if it holds anything but this run; the message names the settings that differ."""
    def __init__(self, settings, contents):
        """contents: path -> hash, of the data files as they were read."""
        self.settings, self.contents = settings, contents
        self.out, self.device = Path(settings.out), join_processes(settings.device)
        if settings.model == "tiny":  # small products: a second thread gains little, and waits if it is busy
            torch.set_num_threads(1)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(usable_cores())
        # Lowered for the rest of the run when memory runs out. (On a GPU rows are not: see map().)
        self.budget = {name: getattr(settings, name) for name in ("rows", "score_tokens", "train_tokens")}
        self.stage_name = ""

    def __enter__(self):
        s = self.settings
        s.offload, needed = memory.choose_offload(s, self.config, self.device)  # before hours of sampling
        s.recompute = memory.choose_recompute(s, self.config, self.device)
        with ExitStack() as stack:  # an error here unlocks the directory again
            if rank() == 0:
                self.claim(stack)
                log_info(memory.machine(s, self.device, needed))
                self.report_defaults()
                files.whole_rows(self.out / "timing.jsonl")  # removes a line that was cut short
                files.whole_rows(self.out / "metrics.jsonl")
            barrier()
            self.metrics = files.whole_rows(self.out / "metrics.jsonl")
            self.logged = {(row["stage"], row.get("step")) for row in self.metrics}
            stack.enter_context(held_signals())
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, traceback):
        self.stack.close()
        if error is None:
            leave_processes()

    def report_defaults(self):
        """Log where the defaults may not be what the user of a model of their own expects."""
        if getattr(self.settings, "of_paper", False) and models.count_parameters(self.config) < 2e9:
            log_info("settings that are not given are the paper's, for a model of 8B; --preset NAME takes "
                     "those of a smaller model")
        system = self.tokenizer.template_system()
        if system and self.settings.chat == "auto" and not self.settings.system:
            log_info(f"the system message of the model's chat template is not used ({system[:200]!r}); "
                     "--system TEXT gives one")

    def claim(self, stack):
        """Lock the directory, compare its settings.json with this run's, and write this run's."""
        path, now = self.out / "settings.json", as_dict(self.settings)
        known = path.exists()
        taken = self.out.exists() and (not self.out.is_dir() or any(self.out.glob("[!.]*")))
        require(known or not taken, f"{self.out}: holds files already, not a run's; choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        lock = files.try_lock(self.out / ".lock")
        require(lock, f"{self.out}: another process is at work in it; let it end, or choose another --out")
        stack.enter_context(lock)
        now |= self.hashes()
        if known:
            differ = self.differences(files.read_json(path), now)
            require(not differ, f"{self.out}: was begun with other settings ({'; '.join(differ)}); give the "
                    "same ones to go on, or choose another --out")
            last = f"round-{self.settings.rounds}" if self.settings.rounds else "dpo"
            done = (self.out / "evaluation" / f"{last}.jsonl").exists()
            log_info(f"{self.out}: {'is finished' if done else 'goes on where it stopped'}")
            files.remove_scratch(self.out)
        files.write_file(path, partial(files.write_json, value=now))

    def hashes(self):
        """{"contents of --model": hash, ...} of the models and data files that are given to the run."""
        found, start = {}, Path(self.settings.start_from)
        given = {"model": [self.policy_dir], "reference": [self.prev_dir],
                 "reward": [self.reward_models[self.settings.reward][0]],
                 "judge": [self.reward_models[self.settings.judge][0]],
                 "start_from": sorted(path.parent for path in start.glob("*/config.json"))}
        for name, f in all_options(type(self.settings)).items():
            path = getattr(self.settings, name, "")
            directories = [x for x in given.get(name, []) if x and x.parent != self.out]
            if f.metadata["contents"] and path:
                value = models.hash_of(*directories) if directories else self.contents.get(path, path)
                found[f"contents of {flag(name)}"] = value
        return found

    def differences(self, old, now):
        """What differs in two settings.json and changes results, in words. An absent setting: its default."""
        differ, options = [], all_options(type(self.settings)) | getattr(self.settings, "of_losses", {})
        for name in sorted(old.keys() | now.keys()):
            about = options.get(name)
            if about and (about.metadata["contents"] or not about.metadata["identity"]):
                continue
            default = about.default if about else None
            before, after = old.get(name, default), now.get(name, default)
            if before != after and " " in name:
                differ.append(f"{name} have changed")
            elif before != after and not about:
                differ.append(f"{flag(name)} {before!r}, which this code does not know")
            elif before != after:
                differ.append(f"{flag(name)} {before!r}, now {after!r}")
        return differ

    # ---------------------------------------------------------------------------------------- The four verbs
    def stage(self, name, make, *args):
        """The checkpoint directory out/NAME. If it is not there, make(self, *args) gives its weights, pairs
        (name, tensor). With --start-from the stages before the first round are the other run's."""
        self.stage_name = name.split("/")[0]
        if self.settings.start_from and not name.startswith("round"):
            directory = Path(self.settings.start_from) / name
            require(directory.exists(), f"--start-from {self.settings.start_from}: has no {name} yet; finish "
                    "that run first")
            return directory
        directory = self.out / name
        if any_process(not directory.exists()):
            dtype, state, started = getattr(torch, self.settings.dtype), {}, time.perf_counter()
            for key, tensor in make(self, *args):  # all processes take part
                if rank() == 0:
                    state[key] = tensor.to("cpu", dtype)
                    if not state[key].isfinite().all():
                        raise InputError(f"{self.stage_name}: {key} is not finite after the last step; it "
                                         "is not saved. Begin anew with a lower learning rate", alone=True)
            if rank() == 0:
                self.flush_metrics()
                models.write_checkpoint(directory, self.config, state, self.tokenizer)
            self.end_stage()
            log_info(f"{self.stage_name}: done after {(time.perf_counter() - started) / 60:.1f} minutes")
        return directory

    def given(self, directory, seed):
        """A model that the run begins with. One of random weights is made first, as a stage of its own."""
        if directory and directory.parent == self.out:
            return self.stage(directory.name, models.random_model, seed)
        return directory

    def end_stage(self):
        """Remove partial/: it is not needed after the end of its stage."""
        barrier()
        if rank() == 0:
            shutil.rmtree(self.out / "partial", ignore_errors=True)
        barrier()

    def map(self, label, fn, items, model, budget, count=1, check=None):
        """A list of results, `count` for each item. fn(network, chunk, budget) yields (index, result) for all
        results of a chunk of the items, in any order. A result is a JSON value, or a tuple that begins with
        the token ids of a sampled answer.

        model: a checkpoint directory, loaded only if a result is missing, or a network. budget: "rows" or
        "score_tokens"; where memory runs out it is lowered, and the chunk is done again. A finished chunk is
        kept, as a line of a file in partial/, under the label and a hash of the items; InputError if other
        items were kept under the label. The processes share the chunks; the bar is of the first one's share.
        check(chunk, results) is called after the first chunk, to warn early."""
        s, label = self.settings, f"{self.stage_name} {label}"
        # The prompts of a chunk have similar lengths: a row of the sampler has room for the longest of them.
        # The longest prompts come first: if memory runs out, it is at once.
        order = longest_first(items) if budget == "rows" else range(len(items))
        items = [items[i] for i in order]
        hashed = hash_of(items)
        # A prompt costs as much as its K answers.
        size = s.chunk * (1 if budget == "rows" else getattr(s, "samples", 1))
        done = self.kept(label, hashed)
        barrier()  # all have read before one writes
        chunks = []
        for start in range(0, len(items), size):
            stop = min(start + size, len(items))
            if any(i not in done for i in range(start * count, stop * count)):
                chunks.append((start, items[start:stop]))
        mine = chunks[rank()::world()]
        network = self.load(model) if mine and isinstance(model, Path) else model
        total = len(items) * count
        initial = total - count * sum(len(chunk) for _, chunk in chunks)
        share = initial + count * sum(len(chunk) for _, chunk in mine)
        with Progress(label, share, "answer", initial=initial, leave=count > 1) as bar:
            for start, chunk in mine:
                started = time.perf_counter()
                least = count if budget == "rows" else max(map(len, chunk))
                limits = self.budget
                if budget == "rows" and self.device.startswith("cuda"):  # they follow from what is free now
                    rows = memory.rows_in_flight(network, chunk, count, s.sampling, s.rows)
                    limits = {"rows": rows}
                results = self.again(limits, budget, least, label, chunk, self.run_chunk,
                                     fn, network, chunk, count, bar, bar.n)
                path = self.partial(f"{label}.{rank()}.jsonl")
                files.append_row(path, {"items": hashed, "first": start * count, "results": results})
                files.flush(path)
                if check and start == 0:
                    check(chunk, results)
                self.log_speed(label, time.perf_counter() - started, answers=len(results))
        barrier()  # all have written
        done, results = self.kept(label, hashed), [None] * total
        for place, i in enumerate(order):
            results[i * count:(i + 1) * count] = [done[place * count + k] for k in range(count)]
        return results

    def run_chunk(self, budget, fn, network, chunk, count, bar, begin):
        results = [None] * (len(chunk) * count)
        bar.update(begin - bar.n)  # back, if this is another try
        self.safe_point(STOP)
        for i, result in fn(network, chunk, budget):
            results[i] = result
            # Sampling gives (token ids, finish reason). What is scored has its tokens already.
            bar.advance(len(result[0] if isinstance(result, tuple) else chunk[i]))
            self.safe_point(STOP)
        return results

    def kept(self, label, hashed):
        """{index: result} of the finished chunks of a label."""
        done = {}
        for path in self.out.glob(f"partial/{self.partial(label).name}.*.jsonl"):
            for row in files.whole_rows(path):
                require(row["items"] == hashed, f"{path}: has results of other items under the same label; "
                        f"remove {path.parent} to begin this stage again")
                done |= enumerate(row["results"], row["first"])
        return done

    def training(self, weights, optimizer, stream, batch, steps):
        """Yields (step, group): the next `batch` items of the stream, for steps 0 .. steps - 1 at most.
        weights: name -> parameter that is trained.

        Restores the state that was saved last, skips the items before it, saves a state every --save-steps,
        and stops at the next step after Ctrl-C."""
        first = self.saved = self.restore(weights, optimizer)
        stream, stage = iter(stream), self.stage_name
        for _ in islice(stream, first * batch):
            pass
        with Progress(stage, steps, "step", initial=first) as bar:
            for step in range(first, steps):
                stop = any_process(STOP)  # all processes, or none
                if stop or step % self.settings.save_steps == 0:
                    self.save_training(weights, optimizer, step)
                self.safe_point(stop)
                started = time.perf_counter()
                group = list(islice(stream, batch))
                if not group:  # the filter has left nothing more to train on
                    return
                yield step, group
                optimizer.zero_grad(set_to_none=True)  # saving, and fDPO's sampling, may need its memory
                tokens = sum(map(len, group))
                self.log_speed(stage, time.perf_counter() - started, tokens=tokens)
                bar.advance(tokens)

    def fit(self, fn, model, items, *args):
        """fn(tokens, model, items, *args), with --train-tokens; again with fewer where memory runs out."""
        label, least = f"{self.stage_name} training", max(map(len, items))
        return self.again(self.budget, "train_tokens", least, label, items,
                          fn, model, items, *args, training=model)

    @staticmethod
    def again(budget, name, least, label, items, fn, *args, training=None):
        """fn(budget[name], *args); again with a smaller one where memory runs out. least: the smallest, for
        one item alone. training: the model, if it is trained. sample.py uses it too, and has no run."""
        while True:
            try:
                return fn(budget[name], *args)
            except RuntimeError as error:
                known = any(text in str(error) for text in OUT_OF_MEMORY)
                if not known and not isinstance(error, torch.OutOfMemoryError):
                    raise
            # Subtle: this stands after the except block, where the tensors of fn are free again.
            gc.collect()
            torch.cuda.empty_cache()
            now = budget[name]
            if training is not None and world() > 1:
                raise InputError(f"{label}: out of memory, and several processes cannot lower it in a step; "
                                 f"give the same command with {flag(name)} {now // 2}", alone=True)
            if now <= least:
                prompts = [getattr(x, "prompt", x) for x in items]  # of Prompts, Samples or Pairs
                content = max(prompts, key=lambda prompt: len(prompt.ids)).content
                unit = name.split("_")[-1]  # rows, or tokens
                raise InputError(f"{label}: out of memory with one alone, of {least} {unit}, on the prompt "
                                 f"{str(content)[:60]!r}; lower --max-tokens, --max-new-tokens or --samples, "
                                 "or take a larger machine", alone=True)
            budget[name] = max(least, now * 3 // 4 if name == "rows" else now // 2)
            log_info(f"{label}: out of memory; again with {flag(name)} {budget[name]}")
            if training is not None and training.sharded:  # FSDP cannot go on after a pass that broke off
                raise Restart

    # --------------------------------------------------------------------------------------------------------
    # The state of a training: the weights and AdamW's moments, a file for each parameter, because all at once
    # may be more than main memory. Each process keeps its own shards.
    def save_training(self, weights, optimizer, step):
        """Keep the state before a step, and no older one. One that is not finite is not kept."""
        finite = all(bool(models.local_shard(p).isfinite().all()) for p in weights.values())
        if step <= self.saved or any_process(not finite):
            return
        self.flush_metrics()
        shutil.rmtree(self.state_path(step), ignore_errors=True)  # left if others were behind when killed
        with files.whole(self.state_path(step)) as scratch:
            scratch.mkdir()
            for name, p in weights.items():
                save_file(state_of(p, optimizer), scratch / f"{name}.safetensors")
        barrier()
        for older in self.saved_steps():
            if older != step:
                shutil.rmtree(self.state_path(older))
        self.saved = step

    def restore(self, weights, optimizer):
        """Put back the last state of this training that all processes have; returns its number of steps."""
        step = int(sum_over_processes([float(max(self.saved_steps(), default=0))], "MIN")[0])
        if not step:
            return 0
        for p in weights.values():  # a step of zero gradients makes the optimizer's state, in its place
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        damaged = False
        with torch.no_grad():
            for name, p in weights.items():
                try:
                    with models.open_safetensors(self.state_path(step) / f"{name}.safetensors") as file:
                        for key, tensor in state_of(p, optimizer).items():
                            tensor.copy_(file.get_tensor(key))
                except InputError:
                    damaged = True
                optimizer.state[p]["step"].fill_(step)
        if any_process(damaged):
            log_info(f"{self.stage_name}: the state after step {step} is damaged and thrown away")
            if damaged:
                shutil.rmtree(self.state_path(step))
            raise Restart
        log_info(f"{self.stage_name}: goes on after step {step}")
        return step

    def state_path(self, step):
        return self.partial(f"{self.stage_name}.{step}.{rank()}-of-{world()}")

    def saved_steps(self):
        pattern = f"partial/{self.stage_name}.*.{rank()}-of-{world()}"
        return [int(path.name.split(".")[1]) for path in self.out.glob(pattern)]

    # ------------------------------------------------------------ What is logged, and what stops a run
    def log(self, row):
        """Add a row to metrics.jsonl. A step that is done again after an interruption has its row already."""
        key = row["stage"], row.get("step")
        if key not in self.logged:
            self.logged.add(key)
            self.metrics.append(row)
            if rank() == 0:
                files.append_row(self.out / "metrics.jsonl", row)

    def flush_metrics(self):
        """What is kept on the disk from here on needs the rows of all steps before it."""
        if rank() == 0 and self.metrics:
            files.flush(self.out / "metrics.jsonl")
            files.flush(self.out)

    def log_step(self, step, row, lr):
        self.log({"stage": self.stage_name, "step": step + 1, **row, "lr": lr})

    def log_speed(self, what, seconds, **amount):
        """Add a row to timing.jsonl. It is a file of its own, as no two runs have the same times."""
        if rank() == 0:
            row = {"what": what, **amount, "seconds": round(seconds, 4)}
            files.append_row(self.out / "timing.jsonl", row)

    def write_rows(self, name, rows):
        """Write a file of the run's directory. All processes have the same rows; the first one writes."""
        if rank() == 0:
            files.write_rows(self.out / name, rows)

    def partial(self, name):
        return self.out / "partial" / name.replace(" ", "-")

    def safe_point(self, stop):
        if stop:
            raise Interrupted(f"stopped. What is done is in {self.out}; the same command goes on from there")

    def not_finite(self, model, weights, optimizer, step, group, row, answer_logprobs):
        """An InputError for a step that would spoil the model. Saves the state before it, and its batch."""
        optimizer.zero_grad(set_to_none=True)
        self.save_training(weights, optimizer, step)
        samples = []
        for item in group:
            samples += [item.chosen, item.rejected] if hasattr(item, "chosen") else [item]
        logprobs = dict(answer_logprobs(model, samples, self.budget["score_tokens"]))
        name = f"{self.stage_name}-not-finite.jsonl"
        self.write_rows(name, [{"prompt": x.prompt.content, "text": x.text, "tokens": x.tokens,
                                "ref_logprob": x.logprob, "logprob": logprobs[i]}
                               for i, x in enumerate(samples)])
        return InputError(f"{self.stage_name}, step {step + 1}: loss {row['loss']}, gradient norm "
                          f"{row['grad_norm']}; the step was not taken, the state before it is kept. Look at "
                          f"its answers in {self.out / name}, or begin anew with a lower --lr")

def state_of(p, optimizer):
    """A parameter and AdamW's moments of it: this process' shards."""
    moments = {key: models.local_shard(optimizer.state[p][key]) for key in memory.MOMENTS}
    return {"weight": models.local_shard(p), **moments}

def longest_first(prompts):
    """The indices of prompts, those of the longest first."""
    return sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))

def hash_of(items):
    """sha256 of the ids of prompts, or of prompts and answers."""
    digest = hashlib.sha256()
    for x in items:
        for ids in (x.prompt.ids, x.tokens) if hasattr(x, "tokens") else (x.ids,):
            digest.update(b"%d " % len(ids) + np.array(ids, dtype=np.int64).tobytes())
    return digest.hexdigest()
