"""DICE: bootstrapping language models with DPO implicit rewards (arXiv 2406.09760), in one file.

A model pi_t that DPO has trained from pi_{t-1} carries a reward: log pi_t(y|x) - log pi_{t-1}(y|x). One round
of DICE turns that reward into new preference pairs, with no new labels. dice_round() is the whole method:

    1. sample   K answers to each prompt from pi_t                              sample_answers, generate
    2. score    their log-probs under pi_t and pi_{t-1}: the implicit reward    add_rewards, answer_logprobs
    3. shape    reward - alpha * length; alpha takes out the length bias        search_alpha
    4. pair     the best answer of each prompt against its worst                make_pairs, choose_pairs
    5. replay   mix in a share gamma of the original offline pairs              mix_replay
    6. train    DPO from pi_t, with pi_t as the reference, gives pi_{t+1}       preference_loss, train

    python dice.py                                                  laptop: the tiny world, SFT, DPO, DICE
    python dice.py --model llama3-8b                                GPU: the paper's run
    torchrun --nproc-per-node=8 dice.py --model llama3-8b           the same run on 8 GPUs
"""
# The literature calls two models "the reference". Here `prev` is pi_{t-1}, which the reward needs, and `ref`
# is pi_t, which the DPO loss needs. The settings --reference and --reward-reference name a `prev`. A name
# that ends in _dir is a checkpoint directory, `model` is a network. The tiny world is a toy task with a small
# model of random weights and a judge that knows the truth: data/tiny.py.
#
# Checkpoints, and where a model lives (dtype, GPUs), are in model.py. What a long run needs is behind four
# verbs of the object `run`, data/runs.py:
# - run.stage(name, make, *args): a checkpoint directory. If it is not there yet, make(run, *args) gives its
#   weights.
# - run.map(label, fn, items, model, budget, count=1): fn(network, some items, number) yields (index, result),
#   `count` for each item. Returns the results of all items in order. budget: which setting gives the number,
#   such as "rows". model: a network, or a directory, which is loaded only if a result is missing.
#   Finished parts are kept on disk until the stage is done, under the stage, label and a hash of the items.
# - run.training(...): the batches of a training. It saves its state and goes on from the last one.
# - run.fit(fn, model, items, *args): fn(tokens, model, items, *args), so that it fits into memory: if memory
#   runs out, again with fewer tokens in a pass.
# With several processes (torchrun) these verbs also share the work.
#
# What is done differently from the paper and its code:
# - The token ids that were sampled are scored and trained on. Text is never tokenised a second time.
# - The reward leaves out the factor beta. So alpha is in nats per character; the paper's is beta times ours.
# - alpha is found by bisection, not by a scan of a grid.
# - The reference log-probs of the DPO loss are computed before training: one model is in memory, not two
#   (for the losses with a KL it is two).
# - Answers of real models are judged by a reward model (--judge, or data/judge.py afterwards), not by GPT-4.

import hashlib
import math
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import model as models
from data import jsonl, memory, options, plan, report, reward_model, runs, tiny
from data.files import require
from data.options import TINIEST, option
from data.processes import batches, log_info, share, sum_over_processes

# ------------------------------------------------------------------------------------------------------------
# Settings. Each stands here once: the command line, --help and the checks are made from these two classes.
# option(default, help, least value, largest value). A preset of model.py (--model NAME) has its own defaults.
# base_option: the models before the first round were made with it, so with --start-from it cannot be changed.
# machine_option: it may be another one when a run goes on. The others may not. path_option: the path may be
# another one, what is in the file or directory may not.
base_option, machine_option = partial(option, base=True), partial(option, identity=False)
path_option = partial(option, contents=True)

@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: all that sample_token() is told. sample.py has the same options."""
    temperature: float = option(0.9, "randomness; 0: always the likeliest token", 0, group="sampling")
    top_p: float = option(1.0, "draw from the likeliest tokens, of this probability together", TINIEST, 1)
    max_new_tokens: int = option(2048, "longest answer; one without an end by then is cut, and not used", 1)

@dataclass
class Settings:
    # group: the options from here to the next group stand under this title in --help.
    model: str = path_option("tiny", "preset, path, or ORGANISATION/NAME", base=True, group="model and data")
    reference: str = path_option("", "what --model was DPO-trained from; if none, DPO comes first", base=True)
    prompts: str = path_option("", "JSON lines, prompts to sample for; without it those of --preferences")
    preferences: str = path_option("", "JSON lines, offline pairs: for the DPO stage and the replay")
    judge: str = path_option("", "a reward model that compares the models' answers to --judge-prompts")
    judge_prompts: str = path_option("", "JSON lines, prompts for that; nothing is trained on them")
    start_from: str = path_option("", "a run; this one takes its settings and its SFT and DPO models")
    out: str = machine_option("", "directory of the run; without it out/NAME_OF_MODEL")
    weights: str = base_option("real", "dummy: random ones, to measure speed", choices=("real", "dummy"))
    chat: str = base_option("auto", "chat format", choices=("auto", "llama3", "zephyr", "chatml", "plain"))
    system: str = base_option("", "system message of each conversation that begins with none")
    # The defaults of the method, of losses and of training are the paper's.
    rounds: int = machine_option(2, "of DICE; the paper saw no gain past the third", 0, group="the method")
    samples: int = option(16, "answers sampled to each prompt in a round, K", 2)
    max_prompts: int = option(10**6, "most prompts of a round; if there are more, it draws some", 1)
    gamma: float = option(0.5, "share of offline pairs in a round's training mixture", 0, 1)
    alpha: str = option("auto", "reward lost per unit length; auto: no length gap in pairs; 2x: twice that")
    length_unit: str = option("chars", "the unit of that length", choices=("chars", "tokens"))
    reward: str = path_option("implicit", "ranks answers: implicit, gold (tiny world's judge), or a model")
    reward_reference: str = option("previous", "earlier model in the reward", choices=("previous", "first"))
    rejected: str = option("worst", "which answer is paired with the best", choices=("worst", "random"))
    data_filter: str = option("none", "fdpo: drop pairs no better than own answers", choices=("none", "fdpo"))
    min_chars: int = option(3, "a sampled answer of so many characters or fewer is not used", 0)
    max_chars: int = option(6700, "a sampled answer of so many characters or more is not used", 1)
    min_valid: float = option(0.5, "share of a prompt's answers that must be usable, else no pair", 0, 1)
    loss: str = option("dpo", "of all training on pairs", group="losses")
    beta: float = option(0.1, "how strongly the model is held to its reference in training", TINIEST)
    sampling: Sampling = field(default_factory=Sampling)
    lr: float = option(5e-7, "learning rate of the rounds, after the warm-up", TINIEST, group="training")
    warmup: int = option(50, "first steps of each stage, in which the learning rate rises to its value", 0)
    batch: int = option(32, "pairs per optimizer step, of DPO and the rounds; changes results", 1)
    steps: int = option(300, "optimizer steps of a round, at most", 1)
    epochs: int = option(1, "passes over a stage's pairs, at most", 1)
    clip: float = option(1.0, "largest norm of a gradient; a larger one is scaled down to it", TINIEST)
    max_tokens: int = option(4096, "longest prompt and answer of an offline pair; longer are not used", 1)
    held_out: int = base_option(256, "pairs, at most an eighth, kept from training, to check the reward", 0)
    # Before the first round: SFT, then DPO.
    sft_steps: int = base_option(0, "optimizer steps of SFT; 0: none", 0, group="first stages (SFT and DPO)")
    sft_lr: float = base_option(2e-5, "learning rate of SFT, before its warm-up and cosine", TINIEST)
    sft_batch: int = base_option(32, "chosen answers per optimizer step of SFT; changes results", 1)
    dpo_steps: int = base_option(300, "optimizer steps of DPO, at most; 0: none", 0)
    dpo_lr: float = base_option(5e-7, "learning rate of that DPO, after the warm-up", TINIEST)
    seed: int = base_option(0, "of all random numbers; changes results", 0, group="the machine")
    device: str = machine_option("auto", "cpu, cuda, cuda:1, ..., mps; auto: cuda if there is one")
    dtype: str = option("auto", "of numbers; auto: bfloat16 on cuda", choices=("auto", "float32", "bfloat16"))
    offload: str = machine_option("auto", "state of training in main memory; auto: as little as possible",
                                  choices=("auto", "no", "moments", "all"))
    recompute: str = machine_option("auto", "keep no activations, compute them again; auto: if it must",
                                    choices=("auto", "yes", "no"))
    # Results depend on none of these, up to rounding.
    rows: int = machine_option(256, "answers drawn at once, at most; on a GPU no more than fit", 1)
    chunk: int = machine_option(64, "prompts after which results are saved; changes no result", 1)
    score_tokens: int = machine_option(4096, "tokens scored at once, padded; for speed and memory", 1)
    train_tokens: int = machine_option(2048, "tokens trained on at once; for speed and memory", 1)
    save_steps: int = machine_option(100, "training steps between two saved states", 1)
    # What the chosen loss declares beside its formula: {name: value}
    loss_options: dict = field(default_factory=dict)

    def of_round(self, t):
        """The settings of round t. A schedule belongs here, such as replace(self, gamma=1 / (t + 1))."""
        return replace(self)

# ------------------------------------------------------------------------------------------------------------
# Losses: pure functions of tensors (B,). The names of the parameters say what a loss gets:
#   w, l      chosen (winning) and rejected (losing) answer
#   pi, ref   log-prob of the answer under the policy and under its reference, summed over its tokens
#   n         tokens of the answer
#   score     its shaped reward; for an offline answer the score in its data
#   kl        SeqKL(ref || policy) of the answer
# beta is a setting of the run. add() declares the options of a loss itself (name=option(...)) and its own
# default for a setting (name=value). --loss NAME is the name of the function without _loss. A loss may also
# return columns to log: (losses (B,), {"name": values (B,)}).
LOSSES = options.Losses(Settings, inputs=("pi", "ref", "n", "score", "kl"), settings=("beta",))

@LOSSES.add()
def dpo_loss(pi_w, pi_l, ref_w, ref_l, beta):
    """-log sigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l))). DPO, arXiv 2305.18290, eq. 7"""
    return -F.logsigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l)))

@LOSSES.add(label_smoothing=option(0.1, "share of pairs taken to be labelled wrongly", 0, 0.5))
def cdpo_loss(pi_w, pi_l, ref_w, ref_l, beta, label_smoothing):
    """DPO when a label is wrong with this probability: Mitchell, "A note on DPO with noisy preferences"."""
    margin = beta * ((pi_w - ref_w) - (pi_l - ref_l))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)

@LOSSES.add(length_margin=option(0.02, "added to the margin for each token by which chosen is longer", 0))
def lr_dpo_loss(pi_w, pi_l, ref_w, ref_l, n_w, n_l, beta, length_margin):
    """Length-regularised DPO, the loss of iLR-DPO (arXiv 2406.11817; R-DPO, arXiv 2403.19159)."""
    # Subtle: the sign is plus. A longer winner has a part of the margin already, so its gradient is smaller.
    return -F.logsigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l)) + length_margin * (n_w - n_l))

@LOSSES.add(offset=option(1.0, "factor of log(score_w - score_l)", 0))
def odpo_loss(pi_w, pi_l, ref_w, ref_l, score_w, score_l, beta, offset):
    """DPO with an offset (arXiv 2402.10571): a better winner must win by more. Needs score_w > score_l."""
    return -F.logsigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l)) - offset * (score_w - score_l).log())

@LOSSES.add()
def tdpo1_loss(pi_w, pi_l, ref_w, ref_l, kl_w, kl_l, beta):
    """Token-level DPO (arXiv 2404.11999): the margin has the difference of the two sequence KLs as well."""
    return -F.logsigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l) - (kl_l - kl_w)))

@LOSSES.add(kl_weight=option(0.5, "the paper's alpha, weight of the difference of the sequence KLs", 0))
def tdpo2_loss(pi_w, pi_l, ref_w, ref_l, kl_w, kl_l, beta, kl_weight):
    """TDPO1 with a weight, and with no gradient through the KL of the chosen answer. Same paper"""
    return -F.logsigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l) - kl_weight * (kl_l - kl_w.detach())))

@LOSSES.add()
def ipo_loss(pi_w, pi_l, ref_w, ref_l, n_w, n_l, beta):
    """(margin - 1 / (2 beta))^2, arXiv 2310.12036, eq. 17; beta is its tau."""
    # With mean log-probs per token, as in its authors' code and in TRL. The target 1 / (2 beta) is the same
    # for all pairs. Sums grow with the length, so mostly long answers would reach it.
    return ((pi_w - ref_w) / n_w - (pi_l - ref_l) / n_l - 1 / (2 * beta)).square()

@LOSSES.add(beta=2.0, target_margin=option(1.0, "the paper's gamma: the reward to win by", 0))
def simpo_loss(pi_w, pi_l, n_w, n_l, beta, target_margin):
    """No reference: the mean log-prob of an answer's tokens is its reward. SimPO, arXiv 2405.14734, eq. 6"""
    return -F.logsigmoid(beta * (pi_w / n_w - pi_l / n_l) - target_margin)

# ------------------------------------------------------------------------------------------------------------
# What flows through the loop
@dataclass
class Prompt:
    content: str | list  # one user turn, or messages {"role", "content"}
    ids: list[int]  # in the chat format, up to where the answer begins
    steps: str | None = None  # Step-DPO: the steps before the one that is scored (they are in ids)
    key = property(lambda self: str(self.content))  # the same question, whatever steps follow

@dataclass
class Sample:
    prompt: Prompt
    tokens: list[int]  # of the answer, with its end token (a cut answer and a step of Step-DPO have none)
    text: str
    number: int = 0  # 0 .. K - 1
    finish: str = "stop"  # or "length": cut
    logprob: float = math.nan  # log pi_t(y|x): in the reward, and the reference of the DPO loss
    prev_logprob: float = math.nan  # log pi_{t-1}(y|x), or of the first model: --reward-reference first
    older_logprob: float = math.nan  # for the report alone, see run_rounds
    reward: float = math.nan
    shaped: float = math.nan  # reward - alpha * length
    score: float = math.nan  # of an answer in a data file (for ODPO)

    def __len__(self):
        return len(self.prompt.ids) + len(self.tokens)

@dataclass
class Pair:
    chosen: Sample
    rejected: Sample
    source: str  # "generated", or "replayed": from the data file
    prompt = property(lambda self: self.chosen.prompt)

    def __len__(self):
        return len(self.chosen) + len(self.rejected)

# ------------------------------------------------------------------------------------------------------------
# One round of DICE
def dice_round(run, t, policy_dir, prev_dir, older_dir=None):
    """From pi_t and pi_{t-1} to pi_{t+1}: returns its weights, as (name, tensor)."""
    s = run.settings.of_round(t)
    # Before hours are spent: how often does the reward agree with offline pairs that this run does not train
    # on? (A model from elsewhere may know them.)
    add_rewards(run, s, "held-out", answers_of(run.held_out), policy_dir, prev_dir)
    report.check_held_out(run, s)
    # Steps 1 and 2. With --reward-reference first, prev_dir is the first model. It may be None if another
    # reward than the implicit one ranks the answers. older_dir is for the report: see run_rounds. The loss
    # and the report need these log-probs whatever the reward is. add_rewards finds them kept.
    samples = sample_answers(run, s, "samples", policy_dir, prompts_of_round(run, t), s.samples, stream=t)
    for model_dir, name in (policy_dir, "logprob"), (prev_dir, "prev_logprob"), (older_dir, "older_logprob"):
        if model_dir:
            add_logprobs(run, "samples", samples, model_dir, name)
    add_rewards(run, s, "samples", samples, policy_dir, prev_dir)
    # Steps 3 and 4. lost: how many prompts give no pair, and why.
    alpha, pairs, lost = make_pairs(samples, s, np.random.default_rng([s.seed, t, 1]))
    # Step 5. Generated answers have their log-prob under pi_t, the reference of the DPO loss. Replayed
    # answers get it now.
    pairs = mix_replay(pairs, run.offline, s.gamma, np.random.default_rng([s.seed, t]))
    add_logprobs(run, "replay", answers_of(pairs, "replayed"), policy_dir)
    # Files, lines, and a picture of the shaping, which takes the last two arguments.
    report.log_round(run, s, alpha, samples, pairs, lost, usable_answers(samples, s)[0], choose_pairs)
    # Step 6.
    return train_on_pairs(run, s, t, policy_dir, prev_dir, pairs, lr=s.lr, steps=s.steps)

def prompts_of_round(run, t):
    """The prompts to sample for in round t."""
    # All of them in every round, as in the paper's code. If there are more than --max-prompts, some of them.
    return jsonl.draw(run.prompts, run.settings.of_round(t).max_prompts, [run.settings.seed, t])

# The number of a stream of random numbers is a part of the seed. Round t has stream t. Evaluation and fDPO
# have others:
EVALUATION, FILTER = 2**31, 2**32

def sample_answers(run, s, label, policy, prompts, count, stream):
    """`count` answers to each prompt, drawn from the policy: Samples, in the order of the prompts."""
    # policy: a checkpoint directory, or a network. stream: the number of a stream of random numbers. Every
    # round has another one, so it draws other answers.
    # run.map gives draw_answers some prompts at a time and keeps what it yields. The budget "rows" (--rows)
    # is the number of sequences that are sampled at once. It gets smaller where memory runs out.
    fn = partial(draw_answers, s=s, count=count, stream=stream, stop_ids=run.tokenizer.stop_ids)
    drawn = run.map(label, fn, prompts, policy, "rows", count, check=partial(report.check_samples, s, label))
    return [Sample(prompts[i // count], ids, run.tokenizer.decode(ids), i % count, finish)
            for i, (ids, finish) in enumerate(drawn)]

def draw_answers(model, prompts, rows, s, count, stream, stop_ids):
    """For run.map: yields (index, (ids, finish reason)) of `count` answers to each prompt."""
    for i, k, tokens, finish in generate(model, [p.ids for p in prompts], count, s.sampling, seed=s.seed,
                                         stop_ids=stop_ids, stream=stream, rows=rows):
        yield i * count + k, (tokens, finish)

def add_logprobs(run, label, samples, model_dir, name="logprob"):
    """Give samples their log-prob under a model, as their attribute `name`."""
    # The token ids are scored as they were sampled. Decoding and encoding again may give other ids.
    label = f"{label} {name}"
    for x, logprob in zip(samples, run.map(label, answer_logprobs, samples, model_dir, "score_tokens")):
        setattr(x, name, logprob)

def add_rewards(run, s, label, samples, policy_dir, prev_dir):
    """Give samples their reward. The implicit one is DICE's; the others are for comparison."""
    if s.reward == "implicit":
        # run.map has kept the log-probs that are known under this label: nothing is computed twice.
        add_logprobs(run, label, samples, policy_dir)
        add_logprobs(run, label, samples, prev_dir, "prev_logprob")
        rewards = [implicit_reward(x.logprob, x.prev_logprob) for x in samples]
    elif s.reward == "gold":
        # The judge of the tiny world knows the truth: an upper bound for what labels can do.
        rewards = [tiny.judge(x.prompt.content, x.text) for x in samples]
    else:
        # A reward model, as in iLR-DPO. Its reward of an answer that is too long for it is NaN.
        directory, tokenizer = run.reward_models[s.reward]
        fn = partial(reward_model.score, tokenizer=tokenizer)
        rewards = run.map(f"{label} rewards", fn, samples, directory, "score_tokens")
    for x, reward in zip(samples, rewards):
        x.reward = reward
        require(math.isfinite(reward) or s.reward != "implicit", f"reward {reward} (log-probs {x.logprob}, "
                f"{x.prev_logprob}) for {x.prompt.key[:60]!r}; check the two models, or try --dtype float32")

def implicit_reward(logprob, prev_logprob):
    """log pi_t(y|x) - log pi_{t-1}(y|x). DICE, section 3.1"""
    # The reward that DPO's model carries is beta times this, up to a constant for each prompt. The constant
    # cancels between two answers to one prompt, and beta changes no order.
    return logprob - prev_logprob

def answers_of(pairs, source=None):
    """The answers of pairs, or of those from one source: chosen and rejected in turn."""
    return [x for p in pairs if source in (None, p.source) for x in (p.chosen, p.rejected)]

def answer_length(x, unit):
    return len(x.text) if unit == "chars" else len(x.tokens)

def make_pairs(samples, s, rng):
    """(alpha, pairs, lost): shape the rewards, and pair the answers of each prompt. DICE, section 3.2"""
    # Example: four answers to one prompt, of which best and worst make a pair.
    #     characters               100    400    250     50
    #     reward                   1.0    6.0    3.5    0.2     400 characters against 50
    #     shaped, alpha = 0.013   -0.3    0.8   0.25  -0.45     400 characters against 50
    #     shaped, alpha = 0.017   -0.7   -0.8  -0.75  -0.65     50 characters against 400: too much alpha
    groups, lost = usable_answers(samples, s)
    if not groups:
        raise options.no_usable_prompt(samples, s)
    # Tables (P, K): a row for each prompt, NaN where it has no such answer.
    reward, length = np.full((2, len(groups), s.samples), np.nan)
    for i, group in enumerate(groups):
        reward[i, :len(group)] = [x.reward for x in group]
        length[i, :len(group)] = [answer_length(x, s.length_unit) for x in group]
    # The rule for pairs. An option of the rule is passed on to it here.
    choose = partial(choose_pairs, noise=rng.random(reward.shape) if s.rejected == "random" else None)
    # alpha* is what search_alpha finds. "auto" is alpha*, "2x" is twice alpha*, a number is alpha itself.
    alpha, is_multiple = options.read_alpha(s.alpha)
    if is_multiple:
        alpha *= search_alpha(reward, length, choose)
    for x in samples:
        x.shaped = x.reward - alpha * answer_length(x, s.length_unit)
    pairs = []
    for i, best, worst in zip(*choose(reward - alpha * length)):
        chosen, rejected = groups[i][best], groups[i][worst]
        if chosen.shaped > rejected.shaped:  # two answers of equal shaped reward teach nothing
            pairs.append(Pair(chosen, rejected, "generated"))
    lost["all equal"] += len(groups) - len({p.prompt.key for p in pairs})
    # If no prompt has answers of different rewards, the length alone would have made the pairs.
    if s.gamma < 1 and (not pairs or (np.nanmax(reward, axis=1) == np.nanmin(reward, axis=1)).all()):
        raise options.nothing_to_prefer(len(groups))
    return alpha, pairs, lost

def usable_answers(samples, s):
    """(groups, lost): the usable answers of each prompt; how many prompts have too few, by the reason."""
    # Not used are answers that were cut (they have no end), answers of extreme length, and answers that the
    # reward model could not read. Of answers with the same text one is used: no text is paired with itself.
    # A prompt gives no pair if a share of less than min_valid is usable (each of equal texts counts).
    groups, lost = [], Counter()
    for start in range(0, len(samples), s.samples):
        group = samples[start:start + s.samples]
        valid = [x for x in group if x.finish == "stop" and s.min_chars < len(x.text) < s.max_chars
                 and math.isfinite(x.reward)]
        different = list({x.text: x for x in reversed(valid)}.values())  # of equal texts the first sample
        cut = sum(x.finish == "length" for x in group)
        wanted = max(2, s.min_valid * len(group))
        if len(different) > 1 and len(valid) >= wanted:
            groups.append(different)
        elif len(valid) >= wanted:
            lost["all equal"] += 1
        else:
            lost["cut" if len(valid) + cut >= wanted else "too few valid"] += 1
    return groups, lost

def choose_pairs(shaped, noise=None):
    """Shaped rewards (P, K) -> indices (N,) of prompts, of their chosen, of their rejected answers."""
    # Here one pair for each prompt, N = P: the best answer against the worst. Another rule, such as several
    # pairs a prompt, is a change of this function. The search for alpha* calls it hundreds of times, so it
    # works on the whole tables.
    prompt = np.arange(len(shaped))
    best = np.nanargmax(shaped, axis=1)
    others = shaped
    if noise is not None:  # a random other answer instead: the one with the least noise
        others = np.where(np.isnan(shaped), np.nan, noise)
        others[prompt, best] = np.nan
    worst = shaped.shape[1] - 1 - np.nanargmin(others[:, ::-1], axis=1)  # of equals the last, not `best`
    return prompt, best, worst

def length_gap(reward, length, choose, alpha):
    """How much longer the chosen answers are than the rejected ones, on average over the pairs."""
    # A mean of signed differences: pairs with a longer and with a shorter winner cancel out.
    prompt, best, worst = choose(reward - alpha * length)
    return float((length[prompt, best] - length[prompt, worst]).mean())

def search_alpha(reward, length, choose=choose_pairs):
    """alpha* of DICE, section 3.2: the alpha >= 0 that brings the length gap nearest to 0. Tables (P, K)."""
    # With more alpha the best answer can only get shorter, and the worst only longer. So the gap is a
    # staircase that goes down. Bisection finds the edges of a step. alpha* is the middle of the best step.
    # Example, the prompt of make_pairs:
    #     alpha from     0   0.01600   0.01657   0.01667
    #     gap          350       300       -50      -350     alpha* is 0.01662, the middle of the step of -50
    # (With --rejected random the gap is not always decreasing, but it crosses 0 all the same.)
    gap = partial(length_gap, reward, length, choose)
    if gap(0.0) <= 0:  # the chosen answers are the shorter ones already
        return 0.0
    # above: the last alpha with a gap above 0. below: the first alpha with a gap of 0 or less.
    above, below = bisect(gap, 0.0)
    if abs(gap(above)) <= abs(gap(below)):
        start = 0.0 if gap(0.0) == gap(above) else bisect(gap, gap(above))[1]
        return (start + above) / 2
    # The step of gap(below) ends where the gap gets smaller than it: the level is just under it.
    end, _ = bisect(gap, np.nextafter(gap(below), -np.inf))
    return (below + end) / 2 if end < 1e11 else below  # the lowest step has no end

def bisect(gap, level):
    """The last alpha with gap(alpha) > level, and the first with gap(alpha) <= level."""
    low, high = 0.0, 1e-6
    while gap(high) > level and high < 1e12:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gap(middle) > level else (low, middle)
    return low, high

def mix_replay(generated, offline, gamma, rng):
    """Experience replay: generated pairs and a share gamma of offline pairs, shuffled. DICE, section 3.3"""
    # Example: of 256 generated and 2048 offline pairs, gamma 0.5 takes 256 and 256, gamma 0.75 takes 256 and
    # 768. No prompt is on both sides. The share comes first: if too few offline pairs are left for it, fewer
    # generated pairs are used. Replay keeps the policy near human labels: without them the errors of its own
    # reward would grow from round to round.
    require((generated or gamma == 1) and (offline or gamma == 0),
            f"--gamma {gamma}: cannot mix {len(generated)} generated and {len(offline)} offline pairs; give "
            "--preferences FILE, or --gamma 0 to do without")
    offline = [offline[i] for i in rng.permutation(len(offline))]
    generated = [generated[i] for i in rng.permutation(len(generated))]
    # If a prompt has a generated pair, its offline pairs are not used. First come the prompts with the
    # fewest offline pairs: so more of these are left.
    offline_pairs = Counter(p.prompt.key for p in offline)
    generated.sort(key=lambda p: offline_pairs[p.prompt.key])
    # left: offline pairs that can still be used, if the first n generated pairs are. wanted: how many the
    # share needs. The largest n with enough of them counts. If there is none, all pairs are offline ones.
    new, old, left, taken = 0, len(offline), len(offline), set()
    for n, p in enumerate(generated, 1):
        if p.prompt.key not in taken:  # a prompt counts once, however many pairs it has
            left -= offline_pairs[p.prompt.key]
            taken.add(p.prompt.key)
        wanted = round(n * gamma / (1 - gamma)) if gamma < 1 else math.inf
        if wanted <= left:
            new, old = n, wanted
    taken = {p.prompt.key for p in generated[:new]}
    pairs = generated[:new] + [p for p in offline if p.prompt.key not in taken][:old]
    return [pairs[i] for i in rng.permutation(len(pairs))]

# ------------------------------------------------------------------------------------------------------------
# Training
# train_on_pairs chooses what to train on and with which loss, train is the loop over the steps, accumulate is
# the gradient of one step.

def preference_loss(model, pairs, s, ref_model=None):
    """(losses (B,), columns to log (B,)). x.logprob is the log-prob of an answer under the reference."""
    # A log-prob of the chosen answers that falls is normal: only the difference to the rejected is trained.
    samples = [p.chosen for p in pairs] + [p.rejected for p in pairs]  # one batch through the model
    prompts, answers = [x.prompt.ids for x in samples], [x.tokens for x in samples]
    if ref_model:  # TDPO needs whole distributions of the reference, not only known log-probs
        pi, kl = sequence_logprobs_and_kl(model, ref_model, prompts, answers)  # (2B,), (2B,)
    else:
        pi, kl = sequence_logprobs(model, prompts, answers), None  # (2B,)
    ref = pi.new_tensor([x.logprob for x in samples])
    n = pi.new_tensor([len(x.tokens) for x in samples])
    # A generated answer has a shaped reward, an offline answer the score in its data.
    score = pi.new_tensor([x.score if math.isnan(x.shaped) else x.shaped for x in samples])
    # The chosen half of pi is pi_w, the rejected half is pi_l, and so on.
    terms = {"beta": s.beta}
    for name, values in {"pi": pi, "ref": ref, "n": n, "score": score, "kl": kl}.items():
        if values is not None:
            terms[f"{name}_w"], terms[f"{name}_l"] = values.chunk(2)  # (B,), (B,)
    losses, columns = LOSSES[s.loss](terms, s.loss_options)
    # margin: beta times the difference of pi - ref, chosen less rejected, whatever the loss. A tie is wrong.
    margin = s.beta * ((terms["pi_w"] - terms["ref_w"]) - (terms["pi_l"] - terms["ref_l"]))
    stats = {"loss": losses, "accuracy": (margin > 0).float(), "margin": margin}
    for column, name in (("logprob", "pi"), ("tokens", "n"), ("kl", "kl")):
        if f"{name}_w" in terms:
            stats |= {f"chosen_{column}": terms[f"{name}_w"], f"rejected_{column}": terms[f"{name}_l"]}
    return losses, stats | columns

def sft_loss(model, samples, s):
    """(mean negative log-likelihood of each answer's tokens (B,), columns to log)."""
    logprobs = sequence_logprobs(model, [x.prompt.ids for x in samples], [x.tokens for x in samples])
    tokens = logprobs.new_tensor([len(x.tokens) for x in samples])
    losses = -logprobs / tokens
    return losses, {"loss": losses, "answer_tokens": tokens}

def train_on_pairs(run, s, t, policy_dir, prev_dir, pairs, *, lr, steps):
    """Train the policy on pairs, with itself as the reference. t: the round, 0 for the DPO stage before."""
    # Most losses need known log-probs of the reference. Only a loss with a KL needs the reference itself.
    ref_model = run.load(policy_dir) if LOSSES.needs(s.loss, "kl") else None
    keep = None
    # In the DPO stage there is no implicit reward yet, so fDPO has nothing to filter by.
    if s.data_filter == "fdpo" and (t or s.reward != "implicit"):
        # Generated answers have the rewards of this round. Replayed answers get them now. What they got in an
        # earlier round does not count: the two models of the reward change.
        add_rewards(run, s, "replay", answers_of(pairs, "replayed"), policy_dir, prev_dir)
        keep = partial(fdpo_filter, run, s, t, policy_dir, prev_dir)
    return train(run, s, policy_dir, pairs, partial(preference_loss, ref_model=ref_model), lr=lr, steps=steps,
                 epochs=s.epochs, batch=s.batch, keep=keep)

@runs.again_after_restart
def train(run, s, model_dir, items, loss_fn, *, lr, steps, epochs, batch, cosine=False, keep=None):
    """AdamW on loss_fn(model, items, settings), from the checkpoint in model_dir. Returns the weights."""
    # In training the weights are float32: a step of 5e-7 would be lost in the rounding of bfloat16 weights.
    # The checkpoint has the dtype of the run again. The decorator: with FSDP, memory that runs out spoils the
    # model. Then train begins again from the last state.
    model = run.load(model_dir, train=True)
    weights = trainable(model)
    optimizer = memory.AdamW(weights.values(), s.offload == "moments", lr=lr, weight_decay=0.0, fused=True)
    steps = min(steps, math.ceil(epochs * len(items) / batch))
    # The order depends on the seed and the stage alone: a training that goes on sees the same batches.
    rng = np.random.default_rng([s.seed, *run.stage_name.encode()])
    stream = shuffled(items, epochs, rng, model, keep)
    # run.training goes on from the last saved state, saves new ones, and stops when Ctrl-C asks for it.
    for step, group in run.training(weights, optimizer, stream, batch, steps):
        # The learning rate is constant after a linear warm-up. For SFT it falls to 0, as a cosine.
        rate = lr * min(1, (step + 1) / max(1, s.warmup))
        if cosine:
            rate *= (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        # run.fit puts in the first argument of accumulate, the tokens of a pass.
        row = run.fit(accumulate, model, group, loss_fn, s)
        row["grad_norm"] = float(models.full_tensor(nn.utils.clip_grad_norm_(weights.values(), s.clip)))
        # One NaN in the gradient would turn all weights into NaN. So the run stops before this step,
        # and writes the items with their log-probs to a file.
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            raise run.not_finite(model, weights, optimizer, step, group, row, answer_logprobs)
        optimizer.step()
        run.log_step(step, row, lr=rate)
    return export(model)

def trainable(model):
    """The parameters that training changes, clips and saves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}

def export(model):
    """Yields (name, weight) of a model in training: whole, in float32."""
    # run.stage writes them in the dtype of the run. Subtle: with several processes each holds a shard of each
    # weight, so all of them must take part.
    for name, tensor in model.state_dict().items():
        yield name, models.full_tensor(tensor).detach()

def shuffled(items, epochs, rng, model, keep):
    """The items of all epochs, one after the other, each epoch in a new order."""
    for epoch in range(epochs):
        # fDPO: which items this epoch uses. Asked when the epoch begins, with the model as it is by then.
        if keep:
            items = keep(model, epoch, items)
        for i in rng.permutation(len(items)):
            yield items[i]

def accumulate(tokens, model, items, loss_fn, s):
    """Gradient of the mean loss over items, in passes of at most `tokens`; returns the columns' means."""
    # Gradients add up over the passes, so their size changes the memory that is needed, not the result.
    totals = Counter()
    model.zero_grad(set_to_none=True)
    # share: the passes of this process. The weight is the number of processes, as FSDP takes the mean over
    # them; or 0, if this process has nothing left but must take part.
    passes = share(items, tokens)
    for i, (group, weight) in enumerate(passes, 1):
        models.before_pass(model, last=i == len(passes))  # if sharded: gradients are summed in the last one
        losses, stats = loss_fn(model, group, s)
        (losses.sum() * weight / len(items)).backward()  # adds to the gradient of the passes before
        # In double precision, so that what is logged does not depend on the passes. On the CPU, because not
        # every device has it.
        for name, values in stats.items():
            totals[name] += values.detach().cpu().double().sum().item() if weight else 0
        del losses, stats  # else the graph of this pass is in memory while that of the next one is made
    return dict(zip(totals, sum_over_processes([total / len(items) for total in totals.values()])))

def fdpo_filter(run, s, t, policy_dir, prev_dir, model, epoch, pairs):
    """The pairs that fDPO keeps for this epoch. Filtered DPO, arXiv 2404.13846"""
    # The policy in training answers each prompt once. A pair stays while its chosen answer has the higher
    # reward (without the length penalty). Dropped pairs stay dropped.
    # By ids, not by key: in Step-DPO the same question with other earlier steps is another prompt.
    prompts = {tuple(p.prompt.ids): p.prompt for p in pairs}
    # To sample, the weights in the dtype of the run: those in training are float32, and may be sharded.
    policy = build_model(model.config, export(model), getattr(torch, s.dtype)).to(model.device)
    label = f"fdpo epoch {epoch + 1}"
    samples = sample_answers(run, s, label, policy, list(prompts.values()), 1, FILTER + t * 2**16 + epoch)
    add_rewards(run, s, label, samples, policy_dir, prev_dir)
    reward = {tuple(x.prompt.ids): x.reward for x in samples}
    # Interrupted and begun again, an epoch finds these answers and rewards kept by run.map: the same choice.
    # A tie is dropped. Only the first epoch must keep a pair; with none left later, the training ends.
    kept = [p for p in pairs if reward[tuple(p.prompt.ids)] < p.chosen.reward]
    log_info(f"fDPO, epoch {epoch + 1}: {len(kept)} of {len(pairs)} pairs are kept")
    require(kept or epoch, "--data-filter fdpo: leaves no pair to train on. By this reward the policy's own "
            "answers are as good as every chosen one. Do without the filter, or stop here")
    return kept

# ------------------------------------------------------------------------------------------------------------
# Sequence log-probs
# Shapes: B batch, T time, C channels, H heads, G heads of keys and values, D head size, V vocabulary,
# K answers per prompt, P prompts, N tokens of all answers in a batch, n of a chunk of them, S keys in a cache
CHUNK_OF_LOGITS = 2**24  # logits in memory at once on a CPU: 64 MB, those of 130 tokens of Llama-3

def pad(sequences, device):
    """Lists of token ids -> (B, T), with zeros on the right, and lengths (B,)."""
    # Causal attention looks to the left only. Padding on the right is never seen by a real token.
    length = [len(ids) for ids in sequences]
    tokens = torch.tensor([ids + [0] * (max(length) - len(ids)) for ids in sequences])
    return tokens.to(device), torch.tensor(length, device=device)

def sequence_logprobs(model, prompts, answers):
    """log pi(answer | prompt), summed over the answer's tokens: B lists of token ids each -> (B,)."""
    # A sum, never a mean: DPO is about the probability of a whole answer. The end token is a part of the
    # answer: a model that is not scored on ending does not learn to end.
    hidden, targets = forward_answers(model, prompts, answers)
    return sum_by_answer(by_chunks(token_logprobs, model, hidden, targets), answers)

def forward_answers(model, prompts, answers):
    """Hidden states (N, C) that predict the tokens of the answers, and these tokens (N,)."""
    # The sequences stand one after the other, without padding (packing). Subtle: a token is predicted by the
    # output before it. So the last token of a sequence is no input. A token of a prompt is no target.
    # Example: the prompt 5 6 with the answer 7 8 2, and the prompt 5 with the answer 9 2. 2 is the end token.
    #     input     5   6   7   8   5   9      lengths 4 2
    #     target    -   7   8   2   9   2      mask: where there is a target
    inputs, targets, mask, lengths = [], [], [], []
    for prompt, answer in zip(prompts, answers):
        inputs += (prompt + answer)[:-1]
        targets += answer
        mask += [False] * (len(prompt) - 1) + [True] * len(answer)
        lengths.append(len(prompt) + len(answer) - 1)
    inputs, targets, mask = (torch.tensor(x, device=model.device) for x in (inputs, targets, mask))
    hidden = model(inputs[None], Packed(model, lengths))  # (1, all tokens, C)
    # Logits are made of answer tokens alone. For a small model they are most of the work.
    return hidden[0, mask], targets

def sum_by_answer(values, answers):
    """Sums (B,) of values (N,), one for each token of the B answers."""
    return torch.stack([part.sum() for part in values.split([len(ids) for ids in answers])])

def token_logprobs(model, hidden, targets):
    """log softmax(logits)[target] of hidden states (n, C) and targets (n,): (n,), in float32 or better."""
    return -F.cross_entropy(Logits.apply(hidden, model.head_weight), targets, reduction="none")

def by_chunks(fn, model, *tensors):
    """fn(model, *tensors), tensors (N, ...), computed for some of the N tokens at a time."""
    # The logits of a batch would be its largest tensor by far: 4096 tokens of Llama-3 take 2 GB in float32.
    # So they are made chunk by chunk. checkpoint: nothing of a chunk is kept; the backward pass makes it
    # again. A GPU gets larger chunks, as each chunk reads the whole weight of the head.
    size = max(1, CHUNK_OF_LOGITS * (8 if model.device.type == "cuda" else 1) // len(model.head_weight))
    fn = partial(checkpoint, fn, model, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([fn(*chunk) for chunk in zip(*(x.split(size) for x in tensors))])

class Logits(torch.autograd.Function):
    """hidden @ weight.T: (n, C), (V, C) -> (n, V), in float32 or better."""
    # Subtle: rounded to bfloat16, logits have an error of 0.04 nats a token, and a reward one of 1 nat. The
    # sums of a bfloat16 product are float32 anyway. CUDA gives them as they are, but without a gradient.
    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        if weight.is_cuda and weight.dtype == torch.bfloat16:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return hidden.to(dtype) @ weight.to(dtype).T

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        return grad @ weight, grad.T @ hidden

def sequence_logprobs_and_kl(model, ref_model, prompts, answers):
    """log pi(answer | prompt) (B,) and SeqKL(ref || pi) (B,), for TDPO, arXiv 2404.11999."""
    # SeqKL is the sum over the answer's tokens of KL(ref(.|prefix) || pi(.|prefix)). A KL needs the whole
    # distribution of both models at each token, not only the log-prob of the token.
    hidden, targets = forward_answers(model, prompts, answers)
    with torch.no_grad():
        ref_hidden, _ = forward_answers(ref_model, prompts, answers)
    logprobs, kl = by_chunks(partial(token_logprobs_and_kl, ref_model), model, hidden, ref_hidden, targets).T
    return sum_by_answer(logprobs, answers), sum_by_answer(kl, answers)

def token_logprobs_and_kl(ref_model, model, hidden, ref_hidden, targets):
    """Hidden states (n, C) of both models, targets (n,) -> log-probs and KLs (n, 2)."""
    pi = F.log_softmax(Logits.apply(hidden, model.head_weight), -1)  # (n, V)
    ref = F.log_softmax(Logits.apply(ref_hidden, ref_model.head_weight.detach()), -1)  # it is not trained
    kl = F.kl_div(pi, ref, reduction="none", log_target=True).sum(-1)
    return torch.stack((pi.gather(-1, targets[:, None])[:, 0], kl), dim=1)

@torch.no_grad()
def answer_logprobs(model, samples, tokens):
    """Sequence log-probs: yields (index of the sample, log-prob), in passes of at most `tokens` tokens."""
    # A prompt is read once for all its answers: first the prompts, then the answers as their continuation.
    indices = {}  # prompt -> indices of its samples
    for i, x in enumerate(samples):
        indices.setdefault(tuple(x.prompt.ids), []).append(i)
    for prompts in batches(indices, tokens):
        cache, last = prefill(model, [list(prompt) for prompt in prompts])
        # (row in the cache, index of the sample) of each answer. The first prompt is the longest.
        answers = [(row, i) for row, prompt in enumerate(prompts) for i in indices[prompt]]
        for group in batches(answers, tokens, size=lambda a: len(prompts[0]) + len(samples[a[1]].tokens)):
            rows, which = zip(*group)
            logprobs = continued_logprobs(model, cache, last, list(rows), [samples[i].tokens for i in which])
            yield from zip(which, logprobs.tolist())
        del cache, last  # else there are two caches while the next prompts are read

def continued_logprobs(model, prompt_cache, last, rows, answers):
    """sequence_logprobs (B,) of answers. Answer b continues the prompt in row rows[b] of the cache."""
    targets, length = pad(answers, model.device)  # (B, T)
    T = targets.shape[1]
    # The prompts are in the cache already. Only the answers go through the model, behind copies of them. The
    # end of the prompt, whose hidden state is in `last`, scores the first token of the answer.
    hidden = last[rows, None]  # (B, 1, C)
    if T > 1:
        cache = KVCache(model.config, len(rows), prompt_cache.longest + T, model.device, model.dtype)
        cache.copy(prompt_cache, rows, list(range(len(rows))))
        hidden = torch.cat((hidden, model(targets[:, :-1], cache)), dim=1)
    # The mask is made of lengths. The padding, 0, may be the id of a real token, such as the end token.
    mask = torch.arange(T, device=model.device) < length[:, None]
    return sum_by_answer(by_chunks(token_logprobs, model, hidden[mask], targets[mask]), answers)

# ------------------------------------------------------------------------------------------------------------
# The Transformer: GPT-2 and Llama, one forward for training, prefill and decoding
NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}

class Transformer(nn.Module):
    """GPT-2 and Llama differ by fields of models.Config. Parameter names: models.parameter_shapes."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.context, config.width) if config.position == "learned" else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = NORMS[config.norm](config.width, eps=config.eps)
        self.head = None  # tied: the head is the embedding
        if config.num_labels or not config.tied:
            self.head = nn.Linear(config.width, config.num_labels or config.vocab_size, bias=False)
        self.recompute = False  # activation checkpointing, layer by layer
        self.sharded = None  # (device, dtype, gathers_once), if model.py has sharded the weights

    # Where and in what it computes. The weights of a sharded model may be elsewhere.
    device = property(lambda self: self.sharded[0] if self.sharded else self.embed.weight.device)
    dtype = property(lambda self: self.sharded[1] if self.sharded else self.embed.weight.dtype)
    head_weight = property(lambda self: (self.embed if self.head is None else self.head).weight)  # (V, C)

    def logits(self, hidden):  # to draw tokens from; rounded to the dtype: log-probs use Logits
        return F.linear(hidden, self.head_weight)  # (..., C) -> (..., V)

    def forward(self, tokens, layout=None):
        """Token ids (B, T) -> hidden states after the last norm (B, T, C), which logits() takes."""
        # layout says what stands in a row of tokens: it gives their positions, prepare(), and attention,
        # attend(). None: a sequence from its start. Packed: several such sequences, one after the other.
        # KVCache: tokens that go on behind cached ones.
        if layout:
            position = layout.prepare(tokens)
        else:
            position = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        x, rope = self.embed(tokens), None
        if self.position is not None:
            x = x + self.position(position.clamp(max=self.config.context - 1))  # padding may be beyond it
        else:
            angle = position[:, None, :, None] * models.rotary_frequencies(self.config, tokens.device)
            rope = angle.cos(), angle.sin()  # (1 or B, 1, T, D)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, layout, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rope, layout)
        return self.norm(x)

class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        C, H, G, D = config.width, config.heads, config.kv_heads, config.head_size
        self.config, self.index = config, index
        self.norm1, self.norm2 = (NORMS[config.norm](C, eps=config.eps) for _ in range(2))
        self.qkv = nn.Linear(C, (H + 2 * G) * D, bias=config.qkv_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(D, eps=config.eps), nn.RMSNorm(D, eps=config.eps)
        self.out = nn.Linear(H * D, C, bias=config.out_bias)
        self.up = nn.Linear(C, config.hidden * (2 if config.mlp == "swiglu" else 1), bias=config.mlp_bias)
        self.down = nn.Linear(config.hidden, C, bias=config.mlp_bias)

    def forward(self, x, rope, layout):
        """x (B, T, C) -> (B, T, C)"""
        x = x + self.attention(self.norm1(x), rope, layout)
        h = self.up(self.norm2(x))
        if self.config.mlp == "swiglu":
            gate, h = h.chunk(2, dim=-1)
            h = F.silu(gate) * h
        else:
            h = F.gelu(h, approximate="tanh")
        return x + self.down(h)

    def attention(self, x, rope, layout):
        B, T, _ = x.shape
        H, G, D = self.config.heads, self.config.kv_heads, self.config.head_size
        qkv = self.qkv(x).view(B, T, H + 2 * G, D).transpose(1, 2)  # (B, H+2G, T, D)
        qk, v = qkv.split([H + G, G], dim=1)
        if self.config.qk_norm:  # Qwen3: every head of q and k is normalised before it is rotated
            qk = torch.cat((self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])), dim=1)  # (B, H+G, T, D)
        if rope:
            qk = rotate(qk, *rope)
        q, k = qk.split([H, G], dim=1)
        y = layout.attend(self.index, q, k, v) if layout else causal_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))

def causal_attention(q, k, v):
    """q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D): each token sees itself and those before it."""
    # As no mask is passed, CUDA can use Flash attention.
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

def varlen_attention(q, k, v, starts, k_starts, longest, k_longest, seen=None):
    """Flash attention for sequences one after the other: q (T, H, D), k and v (S, G, D) -> (T, H, D)."""
    # varlen: one call for sequences of various lengths. Sequence b has the queries from starts[b] to
    # starts[b + 1], and the first seen[b] keys (or all) from k_starts[b] on. No sequence is longer than
    # longest and k_longest. Subtle: its last query sees all its keys, the one before all but one, and so on.
    # The kernel is called by its inner name, because varlen_attn of torch.nn.attention has no grouped heads
    # and no seqused_k before torch 2.12.
    y, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, k_starts, longest, k_longest, dropout_p=0.0, is_causal=True, return_debug_mask=False,
        seqused_k=seen)
    return y

class Packed:
    """Sequences one after the other in one row of tokens, without padding."""
    # Attention stays within each sequence. All else in the network works on single tokens. T: all tokens.
    # The example of forward_answers: lengths 4 2, starts 0 4 6, positions 0 1 2 3 0 1.
    def __init__(self, model, lengths):
        self.lengths, self.varlen = lengths, models.has_varlen_kernel(model.config, model.device, model.dtype)
        self.starts = torch.tensor([0, *lengths]).cumsum(0).int().to(model.device)  # (B + 1,)

    def prepare(self, tokens):
        """The position (1, T) of each token in its sequence."""
        return torch.cat([torch.arange(n, device=tokens.device) for n in self.lengths])[None]

    def attend(self, layer, q, k, v):
        """Attention of q (1, H, T, D) to k and v (1, G, T, D) -> (1, H, T, D)."""
        if self.varlen:
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            y = varlen_attention(q, k, v, self.starts, self.starts, max(self.lengths), max(self.lengths))
            return y.transpose(0, 1)[None]
        sequences = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)))
        return torch.cat([causal_attention(*sequence) for sequence in sequences], dim=2)

def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864) of x (B, H, T, D): channel i turns with channel i + D/2."""
    # The pair (a, b) becomes (a cos - b sin, b cos + a sin). rotary_frequencies are negative in their first
    # half, so that half of `sin` is -sin. So a GPU launches five kernels, not eight. The angles are float32.
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((b, a), dim=-1) * sin).type_as(x)

def build_model(config, weights, dtype):
    """A Transformer of these weights, an iterable of (name, tensor)."""
    with torch.device("meta"):  # takes no memory: load_state_dict puts in the tensors
        model = Transformer(config)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights}, assign=True)
    return model

def new_model(config, seed):
    """A Transformer of random weights."""
    return build_model(config, models.random_weights(config, seed), torch.float32)

def load_model(directory, device, dtype=torch.float32):
    """The checkpoint in a Hugging Face directory as a Transformer."""
    config = models.read_config(directory)
    return build_model(config, models.read_weights(directory, config, dtype).items(), dtype).to(device)

# ------------------------------------------------------------------------------------------------------------
# KV cache and sampler
class KVCache:
    """Keys and values of many sequences (rows), each filled from position 0 to its own length."""
    # On CUDA in bfloat16, Flash attention reads of each row only as many positions as it has filled (varlen).
    # Elsewhere all rows are read up to the longest length, and a mask hides the rest.
    # The cache is one block of memory for all rows: (layers, rows, positions, G, D) for keys, and for values.
    def __init__(self, config, rows, capacity, device, dtype):
        shape = (config.layers, rows, capacity, config.kv_heads, config.head_size)
        # Subtle: zeros, not empty. A masked position has weight 0, but fresh memory may hold NaN, and
        # 0 * NaN is NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity, self.varlen = capacity, models.has_varlen_kernel(config, device, dtype)
        self.row = torch.arange(rows + 1, device=device)
        self.length = torch.zeros(rows, device=device, dtype=torch.long)  # filled positions of each row
        self.longest = 0  # no length is larger; the host knows it; without varlen, attention reads no more

    def prepare(self, tokens):
        """Tokens (B, T) continue the first B rows. Returns their positions (B, T)."""
        # Afterwards the caller sets self.length and self.longest, if the cache is used again: it alone knows
        # which tokens are padding. Example: rows of lengths 3 and 1, T = 2, capacity 6. The positions are
        # 3 4 and 1 2. With varlen, starts are 0 2 4 and 0 6 12, seen is 5 and 3. Without, S is 5, and the
        # query at position 3 sees the keys 0 to 3.
        B, T = tokens.shape
        self.position = self.length[:B, None] + torch.arange(T, device=tokens.device)
        if self.varlen:
            # The rows stand one after the other: row b has queries from b * T on, keys from b * capacity on.
            row = self.row[:B + 1].int()
            self.starts = row * T, row * self.capacity
            self.seen = self.position[:, -1].int() + 1  # (B,)
        elif self.longest:
            S = min(self.longest + T, self.capacity)
            future = torch.arange(S, device=tokens.device) > self.position[:, None, :, None]
            self.mask = self.k.new_zeros(future.shape).masked_fill(future, -math.inf)  # (B, 1, T, S)
        return self.position

    def attend(self, layer, q, k, v):
        """Append k, v (B, G, T, D) to the first B rows. Attention of q (B, H, T, D), each to its own row."""
        # Row b has length[b] keys from before, and its T new ones. T is 1 while an answer is decoded, the
        # length of the longest prompt while prompts are read, and that of the longest answer, less its last
        # token, while answers are scored.
        B, H, T, D = q.shape
        self.k[layer][self.row[:B, None], self.position] = k.transpose(1, 2)
        self.v[layer][self.row[:B, None], self.position] = v.transpose(1, 2)
        if not self.longest:  # prompts are read into an empty cache
            return causal_attention(q, k, v)
        k, v = self.k[layer], self.v[layer]  # (rows, capacity, G, D)
        if self.varlen:
            q, k, v = q.transpose(1, 2).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            y = varlen_attention(q, k, v, *self.starts, T, self.capacity, self.seen)
            return y.view(B, T, H, D).transpose(1, 2)
        # Subtle: H/G query heads share one head of keys. They go in as more queries (along T) of that head,
        # so cached keys and values are read once, and not repeated H/G times.
        S, G = self.mask.shape[-1], k.shape[2]
        k, v = k[:B, :S].transpose(1, 2), v[:B, :S].transpose(1, 2)  # (B, G, S, D)
        mask = self.mask if T == 1 else self.mask.repeat(1, 1, H // G, 1)  # one query's mask broadcasts
        y = F.scaled_dot_product_attention(q.reshape(B, G, -1, D), k, v, attn_mask=mask)
        return y.reshape(B, H, T, D)

    def copy(self, source, rows, places):
        """Copy rows of another cache, or of this one, to these places."""
        # One by one: together they would need as much memory again in between.
        for row, place in zip(rows, places):
            self.k[:, place, :source.longest] = source.k[:, row, :source.longest]
            self.v[:, place, :source.longest] = source.v[:, row, :source.longest]
        self.length[places] = source.length[rows]
        self.longest = max(self.longest, source.longest)

def prefill(model, prompts):
    """Read P prompts, lists of ids: a cache that holds them, and the last hidden state of each (P, C)."""
    # With an empty cache, attention is causal among the prompt's own tokens. Padding is written to the cache
    # too. It is beyond length[b], where no query looks, and the answer overwrites it.
    tokens, length = pad(prompts, model.device)
    cache = KVCache(model.config, *tokens.shape, tokens.device, model.dtype)
    hidden = model(tokens, cache)
    cache.length, cache.longest = length, tokens.shape[1]
    return cache, hidden[torch.arange(len(prompts), device=tokens.device), length - 1]

def sample_token(logits, uniform, sampling, candidates=None):
    """Logits (B, V) and a random number in [0, 1) for each row (B,) -> token ids (B,)."""
    if sampling.temperature < TINIEST:  # 0 is greedy, and so is all that float32 cannot divide by
        return logits.argmax(-1)
    probs, token = (logits.float() / sampling.temperature).softmax(-1), None  # (B, V)
    if sampling.top_p < 1:
        # The nucleus: the smallest set of tokens with a probability of top_p. It is nearly always among the
        # 64 likeliest tokens, and to find these takes a fraction of the time of a sort. But to ask whether 64
        # were enough makes the host wait for a GPU. Who must not wait says how many candidates there are. A
        # row whose nucleus is larger than that gets -1.
        V, count = probs.shape[-1], candidates or 64
        likeliest, token = probs.topk(min(count, V))  # in descending order
        while not candidates and count < V and (likeliest.sum(-1) < sampling.top_p).any():
            count *= 8
            likeliest, token = probs.topk(min(count, V))
        if count < V:
            token = token.masked_fill(likeliest.sum(-1, keepdim=True) < sampling.top_p, -1)
        before = likeliest.cumsum(-1) - likeliest  # the probability of all likelier tokens
        probs = likeliest.where(before < sampling.top_p, 0)
    # Invert the cumulative distribution. Example: the probabilities 0.5, 0.3, 0.2 add up to 0.5, 0.8, 1.0.
    # The number 0.6 draws the second token, the first one whose sum is above 0.6.
    cdf = probs.cumsum(-1)
    place = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)  # (B, 1)
    place = place.clamp(max=cdf.shape[-1] - 1)  # with NaN among the logits it would be one too far
    return (place if token is None else token.gather(1, place))[:, 0]

def uniform_numbers(seed, stream, prompt, number, count):
    """The random numbers in [0, 1) that a sample is drawn with, (count,)."""
    # They depend on nothing but the arguments: seed, stream, ids of the prompt, number of the sample. So an
    # answer is the same in any batch, with any number of processes, and after an interruption (on a GPU but
    # for rounding, which may depend on the batch).
    key = int.from_bytes(hashlib.sha256(np.array(prompt, dtype=np.int64)).digest()[:8], "little")
    return np.random.default_rng([seed, stream, key, number]).random(count, dtype=np.float32)

class DecodingBatch:
    """Sequences that are sampled together (continuous batching)."""
    # Rows of one KV cache:   0    1    2    3    4    5
    #                         run  end  run  run  end  run     rows 1 and 4 have ended
    #     take_finished       run  run  run  run   -    -      row 5 has moved into row 1
    #     add                 run  run  run  run  new  new     new prompts come in behind
    # What a step reads and writes is on the device, so that with varlen it does not wait for the GPU.
    def __init__(self, model, rows, capacity, limit, sampling, stop_ids):
        device = model.device
        self.model, self.sampling, self.stop_ids = model, sampling, set(stop_ids)
        self.is_stop = torch.zeros(model.config.vocab_size, device=device, dtype=torch.bool)
        self.is_stop[list(stop_ids)] = True
        self.cache = KVCache(model.config, rows, capacity, device, model.dtype)
        self.request = []  # (index of the prompt, number of the sample) of each running row
        # The last token of each row, how many tokens its answer has so far, and how many it may have.
        self.token, self.count, self.limit = torch.zeros(3, rows, device=device, dtype=torch.long)
        self.done = torch.ones(rows, device=device, dtype=torch.bool)
        # A row that has ended writes on behind its answer until take_finished(): hence one column more.
        self.answer = torch.zeros(rows, limit + 1, device=device, dtype=torch.long)
        # A random number for each token of a row. They are drawn before its first step.
        self.uniform = torch.zeros(rows, limit + 1, device=device)
        self.graphs = {}  # number of rows -> CUDA graph of a step
        # With varlen, steps are CUDA graphs. Then this is a limit, see sample_token. A row whose nucleus is
        # larger gets no token, and waits until there are more candidates.
        self.candidates = 1024 if self.cache.varlen else None
        self.waits = torch.zeros_like(self.done)

    def add(self, prompts, count, uniform, limits):
        """Start `count` rows for each of the prompts, (index, ids) each."""
        # uniform (new rows, tokens): their random numbers. limits: of each prompt, the longest answer.
        cache, last = prefill(self.model, [ids for _, ids in prompts])  # a prompt is read once for all rows
        new = slice(len(self.request), len(self.request) + len(prompts) * count)
        rows = np.repeat(np.arange(len(prompts)), count).tolist()
        self.cache.copy(cache, rows, list(range(new.start, new.stop)))
        # The logits after the prompt give the first token of all its answers. Each has its own random number.
        self.request += [(index, number) for index, _ in prompts for number in range(count)]
        self.count[new], self.done[new] = 0, False
        self.limit[new] = torch.tensor(limits, device=last.device).repeat_interleave(count)
        self.uniform[new, :-1] = torch.from_numpy(uniform).to(last.device)
        self.append_token(new, self.model.logits(last).repeat_interleave(count, dim=0))

    def step(self):
        """One more token for every row."""
        rows = len(self.request)
        if not self.cache.varlen:  # the mask grows with every step, so no two steps are the same
            self.forward(rows)
        else:
            # A step is a thousand launches of kernels. A CUDA graph launches them at once. There is one graph
            # for 16, 32, 64, ... rows. For a new number of rows one step runs normally first, as kernels set
            # themselves up in it. Then a step is captured.
            rows = min(max(16, 1 << (rows - 1).bit_length()), len(self.done))
            if rows in self.graphs:
                self.graphs[rows].replay()
            else:
                self.forward(rows)
                fn = partial(self.forward, rows)
                self.graphs[rows] = models.capture_cuda_graph(fn, self.model.device, self.graphs)
        self.cache.longest = min(self.cache.longest + 1, self.cache.capacity)

    def forward(self, rows):
        """One more token for those of the first rows that are not done. With varlen nothing waits here."""
        # A row that is done computes along with the others. Its length stays, so it overwrites one position.
        rows = slice(0, rows)
        hidden = self.model(self.token[rows, None], self.cache)
        self.cache.length[rows] += self.append_token(rows, self.model.logits(hidden[:, 0]), self.candidates)

    def append_token(self, rows, logits, candidates=None):
        """Draw a token for each of the rows, from logits (B, V). Returns which rows have got one (B,)."""
        place = self.count[rows, None]  # (B, 1)
        uniform = self.uniform[rows].gather(1, place)[:, 0]
        token = sample_token(logits, uniform, self.sampling, candidates)
        # The answer of a row that is done, or waits, stays.
        self.waits[rows] = (token < 0) & ~self.done[rows]
        drawn = ~(self.done[rows] | self.waits[rows])
        self.token[rows] = token.where(drawn, self.token[rows])
        self.answer[rows].scatter_(1, place, token[:, None])
        self.count[rows] += drawn
        # An answer ends with a stop token, which belongs to it, or at its limit: then it is cut.
        self.done[rows] |= drawn & (self.is_stop[token] | (self.count[rows] >= self.limit[rows]))
        return drawn

    def take_finished(self):
        """Take out the rows that have ended: a list of what generate() yields."""
        # tolist() waits for the device.
        done, waits = torch.stack((self.done, self.waits))[:, :len(self.request)].tolist()
        if any(waits):
            self.candidates *= 8
            self.graphs.clear()
        ended = [row for row, is_done in enumerate(done) if is_done]
        if not ended:
            return []
        finished = []
        for row, count, ids in zip(ended, self.count[ended].tolist(), self.answer[ended].tolist()):
            finish_reason = "stop" if ids[count - 1] in self.stop_ids else "length"
            finished.append((*self.request[row], ids[:count], finish_reason))
        # The last running rows move into the holes, so that the running rows are 0 .. left - 1 again.
        left = len(done) - len(ended)
        holes = [row for row in ended if row < left]
        movers = [row for row in range(left, len(done)) if not done[row]]
        if holes:
            for state in (self.token, self.count, self.limit, self.done, self.answer, self.uniform):
                state[holes] = state[movers]
            self.cache.copy(self.cache, movers, holes)
        for hole, mover in zip(holes, movers):
            self.request[hole] = self.request[mover]
        del self.request[left:]
        self.done[left:], self.cache.length[left:] = True, 0
        # Shorter rows may be left. Without varlen, attention reads less from here on.
        self.cache.longest = int(self.cache.length[:left].max()) if left else 0
        return finished

@torch.inference_mode()
def generate(model, prompts, count, sampling, *, stop_ids, seed, rows, stream=0, on_token=None):
    """Draw `count` answers to each prompt. Yields (index, number, ids, finish reason) of answers that end."""
    # prompts: lists of ids, each shorter than the context. rows: sequences at once, at most, but at least
    # those of one prompt. on_token: is called with each id as it is drawn, for a single sequence. index: of
    # the prompt. number: 0 .. count - 1. ids: of the answer. The finish reason is "stop": they end with the
    # end token; or "length": the answer was cut.
    context = model.config.context
    # No answer is longer than the room behind the shortest prompt, whatever --max-new-tokens says.
    limit = min(sampling.max_new_tokens, context - min(map(len, prompts)))
    rows = max(count, min(rows, len(prompts) * count) // count * count)  # all answers of a prompt, or none
    # All rows have room for the longest prompt and the longest answer, up to the context.
    capacity = min(context, max(map(len, prompts)) + limit)
    batch = DecodingBatch(model, rows, capacity, limit, sampling, stop_ids)
    # To ask a GPU which rows have ended is to wait for it. So it is asked every 16 steps only. Until then the
    # rows that have ended compute in vain.
    steps = 16 if batch.cache.varlen and on_token is None else 1
    waiting = deque(enumerate(prompts))
    while waiting or batch.request:
        # New prompts come in as soon as there is room for all their answers. Else every row goes on.
        room = (rows - len(batch.request)) // count
        if waiting and room:
            group = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            uniform = [uniform_numbers(seed, stream, ids, k, limit) for _, ids in group for k in range(count)]
            limits = [min(limit, context - len(ids)) for _, ids in group]
            batch.add(group, count, np.stack(uniform), limits)
        else:
            for _ in range(steps):
                batch.step()
        if on_token and not batch.waits[0]:
            on_token(int(batch.token[0]))
        yield from batch.take_finished()

# ------------------------------------------------------------------------------------------------------------
# The run: models and data, and the stages before the first round. Its directory and processes: data/runs.py
class Run(runs.Run):
    """Models, data and settings of a run. All input is read and checked before anything is written."""
    def __init__(self, settings, dry_run=False):
        s, self.is_tiny = settings, settings.model == "tiny"
        data = jsonl.read_data(s, tiny, dry_run)
        options.check_data(s, data)
        super().__init__(s, data.contents)
        # policy_dir is pi_1 and prev_dir is pi_0. Without --reference, policy_dir is the base model, prev_dir
        # None.
        self.policy_dir, self.prev_dir, self.config, self.tokenizer = models.find_models(s, self.out)
        self.reward_models = {name: models.find_reward_model(name) for name in (s.reward, s.judge)}
        pairs = load_pairs(data.preferences, self.tokenizer, s, self.config.context)
        count = len(pairs) - min(s.held_out, len(pairs) // 8)
        self.offline, self.held_out = pairs[:count], pairs[count:]
        prompts = data.prompts or {p.prompt.key: ("", p.prompt.content) for p in self.offline}.values()
        self.prompts = [self.prompt(content, where) for where, content in prompts]
        self.judge_prompts = [self.prompt(content, where) for where, content in data.judge_prompts]

    def prompt(self, content, where=""):
        ids, context = self.tokenizer.prompt(content), self.config.context
        require(len(ids) < context, f"{where}: the prompt has {len(ids)} tokens and leaves no room for an "
                f"answer in the model's context of {context}; shorten or remove it")
        return Prompt(content, ids)

    def load(self, model_dir, train=False):
        """The model in a directory, to sample from and score with, or to train."""
        runs.free_last_model()
        # Adapters (LoRA) would be added here, before the model is placed on devices.
        # To train, it is rounded to the dtype of the run first, so that it begins as the very model that is
        # its reference. ("auto" has been replaced in the settings by now.)
        model = load_model(model_dir, "cpu" if train else self.device, getattr(torch, self.settings.dtype))
        return models.prepare_training(model, self.settings, self.device) if train else model

def load_pairs(rows, tokenizer, s, context):
    """Pairs from rows of data/jsonl.py. Pairs that are too long are counted and left out, not cut."""
    pairs, limit = [], min(s.max_tokens, context)
    if LOSSES.needs(s.loss, "score"):
        options.check_scores(rows, s)
    for row in rows:
        scores, encode = row.scores or (math.nan, math.nan), tokenizer.answer
        prompt = Prompt(row.prompt, tokenizer.prompt(row.prompt), row.steps)
        if row.steps is not None:
            # Step-DPO (arXiv 2406.18629): the first steps belong to the prompt. Only the next step is scored,
            # and no end token follows it.
            encode = partial(tokenizer.encode, start=False)
            prompt.ids += encode(row.steps)
        chosen = Sample(prompt, encode(row.chosen), row.chosen, score=scores[0])
        rejected = Sample(prompt, encode(row.rejected), row.rejected, score=scores[1])
        if row.chosen != row.rejected and max(len(chosen), len(rejected)) <= limit:
            pairs.append(Pair(chosen, rejected, "replayed"))
    options.report_unused(rows, pairs, limit, s)
    return pairs

def sft(run, model_dir):
    """Supervised fine-tuning on the answers of the tiny world's writer, or on the pairs' chosen answers."""
    s, samples = run.settings, [p.chosen for p in run.offline]
    if run.is_tiny and not s.preferences:
        samples = [Sample(run.prompt(row["prompt"]), run.tokenizer.answer(row["chosen"]), row["chosen"])
                   for row in tiny.sft_examples(s.seed)]
    return train(run, s, model_dir, samples, sft_loss, lr=s.sft_lr, steps=s.sft_steps, batch=s.sft_batch,
                 epochs=math.ceil(s.sft_steps * s.sft_batch / len(samples)), cosine=True)

def offline_dpo(run, model_dir):
    """DPO on the offline pairs, with the model itself as the reference."""
    s = run.settings
    pairs = jsonl.draw(run.offline, s.dpo_steps * s.batch, [s.seed, 0])  # no more are trained on
    add_logprobs(run, "replay", answers_of(pairs), model_dir)
    return train_on_pairs(run, s, 0, model_dir, None, pairs, lr=s.dpo_lr, steps=s.dpo_steps)

def first_models(run):
    """Directories of pi_1 and pi_0: those given, or the base model after SFT and DPO."""
    s = run.settings
    # The tiny world, and --weights dummy, begin with random weights.
    policy_dir, prev_dir = run.given(run.policy_dir, s.seed), run.given(run.prev_dir, s.seed + 1)
    if not prev_dir and s.sft_steps:
        policy_dir = run.stage("sft", sft, policy_dir)
    if not prev_dir and s.dpo_steps:
        prev_dir, policy_dir = policy_dir, run.stage("dpo", offline_dpo, policy_dir)
    evaluate(run, "sft", prev_dir or policy_dir)
    if prev_dir:
        evaluate(run, "dpo", policy_dir, prev_dir)
    return policy_dir, prev_dir

def run_rounds(run, policy_dir, prev_dir):
    # The rounds one after the other: from pi_1 and pi_0 to pi_2, pi_3, ...
    first_dir, before_prev_dir = prev_dir, None
    for t in range(1, run.settings.rounds + 1):
        s = run.settings.of_round(t)
        first = s.reward_reference == "first"
        compared_dir = first_dir if first else prev_dir
        # For the report alone: with older_dir the reward of the round before is known too. It was
        # log pi_{t-1} - log pi_{t-2}, or log pi_{t-1} - log pi_0 with --reward-reference first. In round 1
        # there is none.
        older_dir = prev_dir if first and before_prev_dir else before_prev_dir
        new_dir = run.stage(f"round-{t}/policy", dice_round, t, policy_dir, compared_dir, older_dir)
        before_prev_dir = prev_dir if s.reward == "implicit" else None
        prev_dir, policy_dir = policy_dir, new_dir
        evaluate(run, f"round-{t}", policy_dir, prev_dir)

def evaluate(run, name, policy_dir, prev_dir=None):
    """Did the model get better? Four answers to each prompt for the judge, or log-probs of held-out pairs."""
    # Nothing of it is trained on. What run.map keeps of it is removed at the end, so the next model may use
    # the same label.
    s, samples = run.settings, answers_of(run.held_out)
    if (run.out / "evaluation" / f"{name}.jsonl").exists():
        return
    if run.judge_prompts:
        samples = sample_answers(run, s, "evaluation", policy_dir, run.judge_prompts, 4, EVALUATION)
        add_rewards(run, replace(s, reward=s.judge or "gold"), "evaluation", samples, policy_dir, prev_dir)
    add_logprobs(run, "evaluation", samples, policy_dir)
    if prev_dir and run.judge_prompts:  # the implicit reward: how often does it agree with the judge?
        add_logprobs(run, "evaluation", samples, prev_dir, "prev_logprob")
    report.keep_evaluation(run, name, samples)

@options.command("dice.py")  # what goes wrong becomes one line on stderr and an exit code
def main(argv=None):
    settings, dry_run = options.parse(Settings, __doc__, LOSSES, argv)
    run = Run(settings, dry_run)
    if dry_run:
        return plan.print_plan(run, new_model, generate, answer_logprobs, Sample, prompts_of_round)
    with run:  # locks the directory; Ctrl-C waits for the next safe point
        run_rounds(run, *first_models(run))
        print(report.write(run.out))

if __name__ == "__main__":
    raise SystemExit(main())
