"""How fast, in how much memory: sampling, scoring and DPO training beside transformers and trl if installed.

    python tests/bench.py                                         25M parameters, float32, CPU: ten minutes
    python tests/bench.py --device cuda --model-shape llama3-8b   bfloat16; writes 16 GB of scratch weights
    python tests/bench.py --device cuda --model-shape llama3.2-1b --task standard     what others publish
    python tests/bench.py --dtype bfloat16                        does it pay on this processor?

Every line of the table is a process of its own, one after the other, with the same weights from the same
directory, the same work and the same number of threads. Its peak memory is the process's (on a GPU: what
torch allocated). Useful tokens are real ones: no padding, nothing after the end token. The floor is the
time that the arithmetic alone would take at the rate of a large matrix product, measured in the same run:
two operations per weight and token forward and four backward (the head's weights only where a token is
predicted), and the causal half of attention. For sampling it is the time of reading all weights once a step
and the keys and values of every row, at the rate of a large copy, where that is longer. The columns "matrix"
and "memory" (for sampling: MBU) are the shares of these two times in the time that was measured. MFU of
training: 6 operations per weight and useful token, at the same rate. The last line is all this as JSON.

    sampling    K = 16 answers for each prompt. Weights are random and one id in so many is a stop id, so at
                temperature 1 lengths are geometric, on both sides: a mean of 100 and a limit of 512 tokens
                (llama3-8b: prompts of 50-1000, a mean of 400, a limit of 2048, 256 rows in flight;
                `generate` has no way to keep its batch full and gets 8 of the 256 prompts, 128 rows)
    scoring     log-probs of answers with such lengths; transformers: a plain forward of padded rows
    training    DPO, batch 8, prompts of 20-80 and answers of 10-400 tokens (llama3-8b: 50-1000 and 10-1000).
                Ours includes scoring the reference first; trl's is DPOTrainer with its defaults but float32,
                and at its fastest
    standard    the work of nano-vllm's bench.py, to the token: 256 prompts of 100-1024 tokens, an answer of
                100-1024 tokens to each, none ends earlier, 133,966 tokens in all. On an A800 of 80 GB it
                publishes, in tokens/s: llama3.2-1b 15,068 (vLLM 12,627), qwen2.5-0.5b 24,121 (vLLM 17,711).
                A CPU gets 16 prompts and answers of 10-100 tokens
"""
import argparse
import gc
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

import dice
import model as models
from data import memory, processes, runs, tiny

# Lengths of prompts, answers and pairs; numbers of prompts to sample for (ours, theirs) and to score; pairs
SMALL = dict(prompt=(20, 200), mean=100, limit=512, rows=10**6, pair=((20, 80), (10, 400)))
LARGE = dict(prompt=(50, 1000), mean=400, limit=2048, rows=256, pair=((50, 1000), (10, 1000)))
SHAPES = {  # the network, and the work for it
    "1m": (models.Config(vocab_size=4096, context=1024, layers=2, width=128, heads=4, kv_heads=2,
                         head_size=32, hidden=384, tied=True),
           SMALL | dict(prompts=2, theirs=2, scored=2, pairs=8)),
    "25m": (models.Config(vocab_size=32000, context=1024, layers=8, width=384, heads=8, kv_heads=4,
                          head_size=48, hidden=1024, tied=True),
            SMALL | dict(prompts=8, theirs=8, scored=8, pairs=40)),
    "smollm2-135m": (models.PRESETS["smollm2-135m"].shape,
                     SMALL | dict(prompts=2, theirs=2, scored=2, pairs=8)),
    "llama3-8b": (models.PRESETS["llama3-8b"].shape,
                  LARGE | dict(prompts=256, theirs=8, scored=32, pairs=64))}
for name in ("llama3.2-1b", "qwen2.5-0.5b"):
    SHAPES[name] = models.PRESETS[name].shape, SHAPES["llama3-8b"][1]
K, BATCH = 16, 8

# ----------------------------------------------------------------------- The work: the same for both sides
def stop_ids(config, sizes):
    return list(range(config.vocab_size // sizes["mean"]))

def ids(rng, config, sizes, length):
    """Random ids; none is a stop id."""
    return rng.integers(config.vocab_size // sizes["mean"], config.vocab_size, length).tolist()

def prompts_of(config, sizes):
    rng = np.random.default_rng(0)
    return [ids(rng, config, sizes, n) for n in rng.integers(*sizes["prompt"], sizes["prompts"])]

def answers_of(config, sizes):
    """(prompt, answer) ids to score."""
    rng = np.random.default_rng(1)
    return [(prompt, ids(rng, config, sizes, min(sizes["limit"], rng.geometric(1 / sizes["mean"]))))
            for prompt in prompts_of(config, sizes)[:sizes["scored"]] for _ in range(K)]

def pairs_of(config, sizes):
    """(prompt, chosen, rejected) ids to train on."""
    rng = np.random.default_rng(2)
    prompt, answer = sizes["pair"]
    return [[ids(rng, config, sizes, rng.integers(*between)) for between in (prompt, answer, answer)]
            for _ in range(sizes["pairs"])]

def forward_flops(config, prompt, answer):
    """Operations of one forward pass over a prompt and an answer of these many tokens."""
    head = config.vocab_size * config.width
    # Looking up an embedding is no arithmetic.
    body = models.count_parameters(config) - head * (1 if config.tied else 2)
    n = prompt + answer
    return 2 * body * n + 2 * head * answer + 2 * config.layers * config.heads * config.head_size * n * n

def sampling_result(config, sizes, prompts, answers):
    """answers: (prompt index, length) each. The prompt is needed once, not K times. numbers: weights and
    cached keys and values that must be read, if as many rows as may be are always in flight."""
    prefill = [forward_flops(config, len(p), 0) for p in prompts]
    flops = sum(prefill) + sum(forward_flops(config, len(prompts[i]), n) - prefill[i] for i, n in answers)
    lengths = [n for _, n in answers]
    seen = sum(len(prompts[i]) * n + n * n / 2 for i, n in answers)  # places, over all steps
    numbers = sum(lengths) / min(sizes["rows"], len(answers)) * models.count_parameters(config) \
        + seen * 2 * config.layers * config.kv_heads * config.head_size
    return {"tokens": sum(lengths), "flops": flops, "numbers": numbers,
            "note": f"{len(lengths)} answers, mean {np.mean(lengths):.0f}, longest {max(lengths)}"}

def scoring_result(config, rows, logprobs):
    """A prompt must be read once, not for each of its K answers."""
    prompts = {tuple(p): forward_flops(config, len(p), 0) for p, _ in rows}
    flops = sum(prompts.values())
    flops += sum(forward_flops(config, len(p), len(a)) - prompts[tuple(p)] for p, a in rows)
    return {"tokens": sum(len(p) + len(a) for p, a in rows), "flops": flops,
            "note": f"mean log-prob {np.mean(logprobs):.3f}"}

def training_result(config, pairs, loss):
    """Policy forward and backward (three forwards' worth) and one forward of the reference."""
    tokens = sum(len(p) + len(a) for p, *both in pairs for a in both)
    return {"tokens": tokens, "model_flops": 6 * models.count_parameters(config) * tokens,
            "flops": 4 * sum(forward_flops(config, len(p), len(a)) for p, *both in pairs for a in both),
            "note": f"loss {loss:.4f}"}

# ------------- Our side. Each function loads what it needs and returns a function that does the work once.
def our_settings(args, config):
    preset = models.PRESETS[args.model_shape].settings if args.model_shape in models.PRESETS else {}
    passes = {key: preset[key] for key in ("score_tokens", "train_tokens") if key in preset}
    s = dice.Settings(device=args.device, dtype=name_of(dtype_of(args)), batch=BATCH, **passes)
    s.offload, _ = memory.choose_offload(s, config, args.device)
    s.recompute = memory.choose_recompute(s, config, args.device)
    return s

def our_samples(rows):
    return [dice.Sample(dice.Prompt("", p), a, "") for p, a in rows]

def our_sampling(args, config, sizes):
    net, prompts = dice.load_model(args.weights, args.device, dtype_of(args)), prompts_of(config, sizes)
    sampling = dice.Sampling(temperature=1.0, max_new_tokens=sizes["limit"])
    rows = memory.rows_in_flight(net, [dice.Prompt("", p) for p in prompts], K, sampling, sizes["rows"])
    def work():
        answers = [(index, len(answer)) for index, _, answer, _ in dice.generate(
            net, prompts, K, sampling, stop_ids=stop_ids(config, sizes), seed=0, rows=rows)]
        return sampling_result(config, sizes | {"rows": rows}, prompts, answers)
    return work

def our_standard(args, config, sizes):
    net, rng = dice.load_model(args.weights, args.device, dtype_of(args)), random.Random(0)
    count, least, most = (16, 10, 100) if args.device == "cpu" else (256, 100, 1024)
    prompts = [[rng.randint(0, 10000) % config.vocab_size for _ in range(rng.randint(least, most))]
               for _ in range(count)]
    limits = [rng.randint(least, most) for _ in range(count)]
    class OwnLimits(dice.DecodingBatch):
        """generate() has one limit for all answers; here each has its own."""
        def add(self, prompts, count, uniform, _):
            super().add(prompts, count, uniform, [limits[index] for index, _ in prompts])
    dice.DecodingBatch, sampling = OwnLimits, dice.Sampling(temperature=0.6, max_new_tokens=max(limits))
    def work():
        drawn = dice.generate(net, prompts, 1, sampling, stop_ids=[], seed=0, rows=count)
        answers = [(index, len(answer)) for index, _, answer, _ in drawn]
        return sampling_result(config, {"rows": count}, prompts, answers)
    return work

def our_scoring(args, config, sizes):
    net, rows = dice.load_model(args.weights, args.device, dtype_of(args)), answers_of(config, sizes)
    tokens = our_settings(args, config).score_tokens
    def work():
        logprobs = dict(dice.answer_logprobs(net, our_samples(rows), tokens))
        return scoring_result(config, rows, list(logprobs.values()))
    return work

def our_training(args, config, sizes):
    s, rows, log = our_settings(args, config), pairs_of(config, sizes), []
    net = models.prepare_training(dice.load_model(args.weights, "cpu", dtype_of(args)), s, args.device)
    run = runs.Run(s, {})  # nothing is written: one network, and its rows in memory
    torch.set_num_threads(args.threads)  # for the tiny world, the model of these settings, a run takes one
    run.stage_name, run.load, run.log = "dpo", lambda *_, **__: net, log.append
    run.log_speed = lambda *_, **__: None
    def work():
        samples = our_samples([(p, a) for p, *both in rows for a in both])
        for i, logprob in dice.answer_logprobs(net, samples, s.score_tokens):
            samples[i].logprob = logprob
        for unit in net.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # after a pass without gradients FSDP leaves weights as they were for that
        pairs = [dice.Pair(*both, "replayed") for both in zip(samples[::2], samples[1::2])]
        dice.train(run, s, "", pairs, dice.preference_loss, lr=1e-7, steps=len(pairs), epochs=1, batch=BATCH)
        return training_result(config, rows, log[-1]["loss"])
    return work

# ------------------------------------------------------------------------------------ transformers and trl
def their_model(args):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(args.weights, dtype=dtype_of(args)).to(args.device).eval()

@torch.inference_mode()
def their_sampling(args, config, sizes):
    net, prompts = their_model(args), prompts_of(config, sizes)[:sizes["theirs"]]
    width, stops = max(map(len, prompts)), stop_ids(config, sizes)
    # padded on the left
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=args.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=args.device)
    def work():
        torch.manual_seed(0)
        out = net.generate(tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                           num_return_sequences=K, max_new_tokens=sizes["limit"], eos_token_id=stops,
                           pad_token_id=0)
        answers = []
        for i, row in enumerate(out[:, width:].tolist()):
            ends = [t for t, token in enumerate(row) if token < len(stops)]
            answers.append((i // K, ends[0] + 1 if ends else len(row)))
        return sampling_result(config, sizes, prompts, answers)
    return work

def their_scoring(args, config, sizes):
    net, rows = their_model(args), answers_of(config, sizes)
    @torch.inference_mode()
    def work():
        scores = []
        for start in range(0, len(rows), BATCH):
            some = rows[start:start + BATCH]
            tokens, _ = dice.pad([p + a for p, a in some], args.device)
            mask = torch.stack([torch.arange(tokens.shape[1]) < len(p) + len(a) for p, a in some])
            logits = net(tokens, attention_mask=mask.to(args.device)).logits.float()
            logprobs = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
            for row, (p, a) in zip(logprobs, some):
                scores.append(row[len(p) - 1:len(p) + len(a) - 1].sum().item())
        return scoring_result(config, rows, scores)
    return work

def their_training(args, config, sizes, **options):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    class Pretokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *rest):
            return dataset  # it holds ids already, under the names that this would have written
    rows, net = pairs_of(config, sizes), their_model(args)
    data = Dataset.from_dict(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(list, zip(*rows)))))
    def work():
        cpu = args.device == "cpu"
        trainer = Pretokenised(
            net, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(args.weights),
            args=DPOConfig(output_dir=tempfile.mkdtemp(dir=Path(args.weights).parent), save_strategy="no",
                           report_to=[], disable_tqdm=True, use_cpu=cpu, bf16=not cpu, max_length=None,
                           learning_rate=1e-7, num_train_epochs=1, per_device_train_batch_size=BATCH,
                           **options))
        started = time.perf_counter()
        loss = trainer.train().training_loss
        return {**training_result(config, rows, loss), "seconds": time.perf_counter() - started}
    return work

def their_fast_training(args, config, sizes):
    return their_training(args, config, sizes, gradient_checkpointing=False, precompute_ref_log_probs=True)

WORK = {  # task: {who: (function, the package it needs)}; the first is ours
    "sampling": {"dice": (our_sampling, ""), "generate": (their_sampling, "transformers")},
    "scoring": {"dice": (our_scoring, ""), "forward": (their_scoring, "transformers")},
    "training": {"dice": (our_training, ""), "DPOTrainer": (their_training, "trl"),
                 "DPOTrainer, fastest": (their_fast_training, "trl")},
    "standard": {"dice": (our_standard, "")}}

# ---------------------------------------------------------------------------------------------- The table
def dtype_of(args):
    return getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))

def name_of(dtype):
    return str(dtype).removeprefix("torch.")

def wait(args):
    if args.device != "cpu":
        torch.cuda.synchronize()

def fastest(args, times, work):
    """Seconds of the fastest of some repetitions."""
    seconds = []
    for _ in range(times):
        wait(args)
        started = time.perf_counter()
        work()
        wait(args)
        seconds.append(time.perf_counter() - started)
    return min(seconds)

def matrix_rate(args):
    """Operations per second of a large matrix product."""
    m, n = (2048, 1024) if args.device == "cpu" else (8192, 8192)
    a, b = (torch.randn(size, n, device=args.device, dtype=dtype_of(args)) for size in (m, n))
    return 2 * m * n * n / fastest(args, 20, lambda: a @ b)

def copy_rate(args):
    """Bytes per second that a large copy reads and writes."""
    a = torch.zeros(2**25 if args.device == "cpu" else 2**30, device=args.device, dtype=torch.uint8)
    b = torch.empty_like(a)
    return 2 * len(a) / fastest(args, 10, lambda: b.copy_(a))

def one(args):
    """The process behind one line of the table: prints a JSON object."""
    task, who = args.only.split("/")
    work, best = WORK[task][who][0](args, *SHAPES[args.model_shape]), {}
    for repeat in range(args.repeat):
        gc.collect()
        wait(args)
        started = time.perf_counter()
        result = work()
        wait(args)
        result.setdefault("seconds", time.perf_counter() - started)
        if repeat == 0:
            unit = 1 if sys.platform == "darwin" else 1024
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            memory = memory if args.device == "cpu" else torch.cuda.max_memory_allocated()
        best = min(best or result, result, key=lambda r: r["seconds"])
    print(json.dumps({**best, "memory": memory}), flush=True)
    processes.leave_processes()

def table(args):
    rate, copies, device, lines = matrix_rate(args), copy_rate(args), args.device, []
    if args.device != "cpu":
        torch.cuda.empty_cache()
        device = torch.cuda.get_device_name(args.device)
    about = {"model_shape": args.model_shape, "dtype": name_of(dtype_of(args)), "device": device,
             "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in about.items()) + f"; a large matrix product runs at "
          f"{rate / 1e9:.0f} GFLOP/s, a large copy at {copies / 1e9:.0f} GB/s\n")
    print("| task | who | useful tokens/s | at the floor | matrix | memory | dice is faster by | peak memory "
          "| |")
    print("|---|---|---|---|---|---|---|---|---|")
    for task, sides in WORK.items():
        if args.task not in (None, task):
            continue
        ours = None
        for who, (_, package) in sides.items():
            if package and not importlib.util.find_spec(package):
                print(f"| {task} | {who} | | | | | | | {package} is not installed |")
                continue
            result = subprocess.run(
                [sys.executable, __file__, "--only", f"{task}/{who}", "--weights", str(args.weights),
                 "--device", args.device, "--model-shape", args.model_shape, "--repeat", str(args.repeat),
                 "--dtype", about["dtype"], "--threads", str(about["threads"])],
                capture_output=True, text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
            if result.returncode:
                error = (result.stderr.strip().splitlines() or ["killed"])[-1][:80]
                print(f"| {task} | {who} | | | | | | | failed: {error} |", flush=True)
                continue
            line = json.loads(result.stdout.strip().splitlines()[-1])
            speed = line["tokens"] / line["seconds"]
            ours = ours or speed
            matrix = line["flops"] / rate / line["seconds"]
            memory = line.get("numbers", 0) * dtype_of(args).itemsize / copies / line["seconds"]
            mfu = line.get("model_flops", 0) / rate / line["seconds"]
            lines.append({"task": task, "who": who, "tokens": line["tokens"], "seconds": line["seconds"],
                          "tokens_per_second": speed, "matrix": matrix, "memory": memory, "mfu": mfu,
                          "peak_memory": line["memory"]})
            print(f"| {task} | {who} | {speed:,.0f} | {speed / max(matrix, memory):,.0f} | {matrix:.0%} "
                  f"| {f'{memory:.0%}' if memory else ''} | {ours / speed:.2f}x "
                  f"| {line['memory'] / 1e9:.2f} GB | {line['note']}, {line['seconds']:.1f} s"
                  f"{f', MFU {mfu:.0%}' if mfu else ''} |", flush=True)
    print(json.dumps({**about, "matrix_rate": rate, "copy_rate": copies, "lines": lines}))

def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--dtype", choices=("float32", "bfloat16"), help="(default: bfloat16 on cuda, float32 on a CPU)")
    add("--model-shape", choices=SHAPES, default="25m", help="(default: 25m)")
    add("--task", choices=WORK, help="this one alone (default: all)")
    add("--repeat", type=int, default=1, help="do the work so often, report the fastest (default: 1)")
    add("--threads", type=int, default=0, help="threads of torch (default: torch's own choice)")
    add("--only", metavar="TASK/WHO", help=argparse.SUPPRESS)
    add("--weights", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.only:
        return one(args)
    with tempfile.TemporaryDirectory() as scratch:
        args.weights, config = Path(scratch) / "weights", SHAPES[args.model_shape][0]
        tiny.write_tokenizer(Path(scratch))
        net = dice.new_model(config, 0).to(dtype_of(args))
        tokenizer = models.read_tokenizer(scratch)
        models.write_checkpoint(args.weights, config, net.state_dict(), tokenizer)
        del net
        table(args)

if __name__ == "__main__":
    main()
