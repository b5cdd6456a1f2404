"""How fast, in how much memory: sampling, scoring and DPO training beside transformers and trl if installed.

    python tests/bench.py                                         25M parameters, float32, CPU: ten minutes
    python tests/bench.py --device cuda --model-shape llama3-8b   bfloat16; writes 16 GB of scratch weights

Every line of the table is a process of its own, one after the other, with the same weights from the same
directory, the same work and the same number of threads. Its peak memory is the process's (on a GPU: what
torch allocated). Useful tokens are real ones: no padding, nothing after the end token. The floor is the
time that the arithmetic alone would take at the rate of a large matrix product, measured in the same run:
two operations per weight and token forward and four backward (the head's weights only where a token is
predicted), and the causal half of attention.

    sampling    K = 16 answers for each prompt. Weights are random and one id in a hundred is a stop id, so
                at temperature 1 lengths are geometric with a mean of 100, on both sides; the limit is 512
    scoring     log-probs of answers with such lengths; transformers: a plain forward of padded rows
    training    DPO, batch 8, prompts of 20-80 and answers of 10-400 tokens. Ours includes scoring the
                reference first; trl's is DPOTrainer with its defaults but float32, and at its fastest
"""

import argparse
import gc
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import dice
import model as models
from data import tiny

SHAPES = {
    "1m": (models.Config(vocab_size=4096, context=1024, layers=2, width=128, heads=4, kv_heads=2,
                         head_size=32, hidden=384, tied=True), dict(prompts=2, pairs=8)),
    "25m": (models.Config(vocab_size=32000, context=1024, layers=8, width=384, heads=8, kv_heads=4,
                          head_size=48, hidden=1024, tied=True), dict(prompts=8, pairs=40)),
    "llama3-8b": (models.NAMES["llama3-8b"].shape, dict(prompts=32, pairs=64)),
}
K, MAX_NEW, BATCH = 16, 512, 8

# ----------------------------------------------------------------------------------------------------------
# The work: the same for both sides


def ids(rng, config, length):
    """Random ids; none is a stop id, since those are the lowest ones."""
    return rng.integers(config.vocab_size // 100, config.vocab_size, length).tolist()


def stop_ids(config):
    return list(range(config.vocab_size // 100))


def prompts_of(config, sizes):
    rng = np.random.default_rng(0)
    return [ids(rng, config, n) for n in rng.integers(20, 200, sizes["prompts"])]


def answers_of(config, sizes):
    """(prompt, answer) ids to score."""
    rng = np.random.default_rng(1)
    return [(prompt, ids(rng, config, min(MAX_NEW, rng.geometric(0.01))))
            for prompt in prompts_of(config, sizes) for _ in range(K)]


def pairs_of(config, sizes):
    """(prompt, chosen, rejected) ids to train on."""
    rng = np.random.default_rng(2)
    return [[ids(rng, config, rng.integers(low, high)) for low, high in ((20, 80), (10, 400), (10, 400))]
            for _ in range(sizes["pairs"])]


def forward_flops(config, prompt, answer):
    """Operations of one forward pass over a prompt and an answer of these many tokens."""
    total = sum(int(np.prod(shape)) for shape in models.parameter_shapes(config).values())
    head = config.vocab_size * config.width
    body = total - head * (1 if config.tied else 2)  # looking up an embedding is no arithmetic
    n = prompt + answer
    return 2 * body * n + 2 * head * answer + 2 * config.layers * config.heads * config.head_size * n * n


def sampling_result(config, prompts, answers):
    """answers: (prompt index, length) each. The prompt is needed once, not K times."""
    prefill = [forward_flops(config, len(p), 0) for p in prompts]
    flops = sum(prefill) + sum(forward_flops(config, len(prompts[i]), n) - prefill[i] for i, n in answers)
    lengths = [n for _, n in answers]
    return {"tokens": sum(lengths), "flops": flops,
            "note": f"{len(lengths)} answers, mean {np.mean(lengths):.0f}, longest {max(lengths)}"}


def scoring_result(config, rows, logprobs):
    return {"tokens": sum(len(p) + len(a) for p, a in rows),
            "flops": sum(forward_flops(config, len(p), len(a)) for p, a in rows),
            "note": f"mean log-prob {np.mean(logprobs):.3f}"}


def training_result(config, pairs, loss):
    """Policy forward and backward (three forwards' worth) and one forward of the reference."""
    return {"tokens": sum(len(p) + len(a) for p, *both in pairs for a in both),
            "flops": 4 * sum(forward_flops(config, len(p), len(a)) for p, *both in pairs for a in both),
            "note": f"loss {loss:.4f}"}


# ----------------------------------------------------------------------------------------------------------
# Our side. Each function loads what it needs and returns a function that does the work once.


def our_settings(args):
    return dice.Settings(device=args.device, dtype=name_of(dtype_of(args)), batch=BATCH)


def our_samples(rows):
    return [dice.Sample(dice.Prompt("", p), a, "") for p, a in rows]


def our_sampling(args, config, sizes):
    net, prompts = dice.load_model(args.weights, args.device, dtype_of(args)), prompts_of(config, sizes)

    def work():
        answers = [(index, len(answer)) for index, _, answer, _ in dice.generate(
            net, prompts, K, stop_ids=stop_ids(config), seed=0, temperature=1.0, max_new_tokens=MAX_NEW,
            rows=K * len(prompts))]
        return sampling_result(config, prompts, answers)
    return work


def our_scoring(args, config, sizes):
    net, rows = dice.load_model(args.weights, args.device, dtype_of(args)), answers_of(config, sizes)
    return lambda: scoring_result(config, rows, dice.score(
        net, our_samples(rows), dice.Budget(our_settings(args).score_tokens, "scoring")))


def our_training(args, config, sizes):
    net, rows, log = dice.load_model(args.weights, args.device), pairs_of(config, sizes), []
    s = our_settings(args)
    run = SimpleNamespace(settings=s, log=log.append, log_speed=lambda *_, **__: None,
                          resume_training=lambda *_: 0, score_budget=dice.Budget(s.score_tokens, "scoring"),
                          train_budget=dice.Budget(s.train_tokens, "training"))

    def work():
        samples = our_samples([(p, a) for p, *both in rows for a in both])
        for x, value in zip(samples, dice.score(net, samples, run.score_budget)):
            x.policy = value
        pairs = [dice.Pair(*both, "replayed") for both in zip(samples[::2], samples[1::2])]
        dice.train(run, "dpo", net, dice.preference_losses, pairs, lr=1e-7, steps=len(pairs), epochs=1,
                   batch=run.settings.batch)
        return training_result(config, rows, log[-1]["loss"])
    return work


# ----------------------------------------------------------------------------------------------------------
# transformers and trl


def their_model(args):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(args.weights, dtype=dtype_of(args)).to(args.device).eval()


@torch.inference_mode()
def their_sampling(args, config, sizes):
    net, prompts = their_model(args), prompts_of(config, sizes)
    width = max(map(len, prompts))
    # padded on the left
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=args.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=args.device)

    def work():
        torch.manual_seed(0)
        out = net.generate(tokens, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                           num_return_sequences=K, max_new_tokens=MAX_NEW, eos_token_id=stop_ids(config),
                           pad_token_id=0)
        answers = []
        for i, row in enumerate(out[:, width:].tolist()):
            ends = [t for t, token in enumerate(row) if token < config.vocab_size // 100]
            answers.append((i // K, ends[0] + 1 if ends else len(row)))
        return sampling_result(config, prompts, answers)
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


def their_training(args, config, sizes, **knobs):
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
                           **knobs))
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
}

# ----------------------------------------------------------------------------------------------------------


def dtype_of(args):
    return torch.float32 if args.device == "cpu" else torch.bfloat16


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def wait(args):
    if args.device != "cpu":
        torch.cuda.synchronize()


def matrix_rate(args):
    """Operations per second of a large matrix product."""
    m, n = (2048, 1024) if args.device == "cpu" else (8192, 8192)
    a, b = (torch.randn(size, n, device=args.device, dtype=dtype_of(args)) for size in (m, n))
    best = float("inf")
    for _ in range(20):
        wait(args)
        started = time.perf_counter()
        a @ b
        wait(args)
        best = min(best, time.perf_counter() - started)
    return 2 * m * n * n / best


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
    print(json.dumps({**best, "memory": memory}))


def table(args):
    config, _ = SHAPES[args.model_shape]
    rate = matrix_rate(args)
    if args.device != "cpu":
        torch.cuda.empty_cache()
    print(f"{args.model_shape}, {name_of(dtype_of(args))}, {args.device}, {torch.get_num_threads()} threads,"
          f" torch {torch.__version__}; a large matrix product runs at {rate / 1e9:.0f} GFLOP/s\n")
    print("| task | who | useful tokens/s | dice is faster by | peak memory | share of the floor | |")
    print("|---|---|---|---|---|---|---|")
    for task, sides in WORK.items():
        ours = None
        for who, (_, package) in sides.items():
            if package and not importlib.util.find_spec(package):
                print(f"| {task} | {who} | | | | | {package} is not installed |")
                continue
            result = subprocess.run(
                [sys.executable, __file__, "--only", f"{task}/{who}", "--weights", str(args.weights),
                 "--device", args.device, "--model-shape", args.model_shape, "--repeat", str(args.repeat),
                 "--threads", str(torch.get_num_threads())],
                capture_output=True, text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
            if result.returncode:
                error = (result.stderr.strip().splitlines() or ["killed"])[-1][:80]
                print(f"| {task} | {who} | | | | | failed: {error} |", flush=True)
                continue
            line = json.loads(result.stdout.strip().splitlines()[-1])
            speed = line["tokens"] / line["seconds"]
            ours = ours or speed
            print(f"| {task} | {who} | {speed:,.0f} | {ours / speed:.2f}x | {line['memory'] / 2**30:.2f} GB "
                  f"| {line['flops'] / rate / line['seconds']:.0%} "
                  f"| {line['note']}, {line['seconds']:.1f} s |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--model-shape", choices=SHAPES, default="25m", help="(default: 25m)")
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
        net = dice.new_model(config, 0)
        tokenizer = models.read_tokenizer(scratch)
        models.write_checkpoint(args.weights, config, net.state_dict(), tokenizer, dtype_of(args))
        del net
        table(args)


if __name__ == "__main__":
    main()
