"""Every objective and labeller of the family: worked numbers, closed forms, loops, transformers."""

import inspect
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from test_dice import LLAMA, Bench, checkpoint, network, random_ids, random_pairs, refused, small_world

import dice
import model as models
from data import jsonl, tiny

assert checkpoint and small_world  # fixtures
examples.register_profile("quick", max_examples=30, deadline=None)
examples.load_profile("quick")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# The three worked pairs: p_w, p_l, r_w, r_l, n_w, n_l, score_w, score_l, kl_w, kl_l
NAMES = ("p_w", "p_l", "r_w", "r_l", "n_w", "n_l", "score_w", "score_l", "kl_w", "kl_l")
WORKED = dict(
    zip(
        NAMES,
        tensor(
            (-12.0, -15.5, -13.0, -14.0, 10, 14, 2.0, 0.5, 0.8, 1.4),
            (-30.25, -20.0, -28.0, -21.5, 25, 18, 1.1, 0.9, 2.5, 0.9),
            (-5.0, -9.0, -5.0, -9.0, 4, 9, 7.0, 3.0, 0.3, 0.6),
        ).T,
    )
)
DEFAULTS = {
    "beta": 0.1,
    "label_smoothing": 0.1,
    "length_margin": 0.02,
    "offset": 1.0,
    "kl_weight": 0.5,
    "target_margin": 1.0,
}


def loss_of(name, terms, **changes):
    return dice.LOSSES[name](
        **{key: {**terms, **DEFAULTS, **changes}[key] for key in dice.loss_inputs(name)}
    )


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        ("dpo", {}, (0.5759394199, 0.8981232641, 0.6931471806)),
        ("cdpo", {}, (0.6009394199, 0.8606232641, 0.6931471806)),
        ("lr-dpo", {}, (0.6117553389, 0.8175344794, 0.7443966601)),
        ("odpo", {}, (0.7738978720, 0.2554157818, 1.6094379124)),
        ("tdpo1", {}, (0.6026529093, 0.8064142108, 0.7082596763)),
        ("tdpo2", {}, (0.5891850190, 0.8514860884, 0.7006753053)),
        # by pencil: (0.1 + 1.5 / 14 - 5)^2, (-2.25 / 25 - 1.5 / 18 - 5)^2, 25
        ("ipo", {}, ((0.1 + 1.5 / 14 - 5) ** 2, (-0.09 - 1.5 / 18 - 5) ** 2, 25)),
        # by pencil: log(1 + exp(-z)), z = 2 (p_w / n_w - p_l / n_l) - 1
        (
            "simpo",
            {"beta": 2.0},
            [math.log1p(math.exp(-z)) for z in (31 / 14 - 3.4, 20 / 9 - 3.42, 2 - 3.5)],
        ),
    ],
)
def test_losses_on_the_worked_pairs(name, changes, expected):
    torch.testing.assert_close(loss_of(name, WORKED, **changes), tensor(*expected), atol=1e-9, rtol=0)


def test_offset_and_mean_of_odpo():
    assert float(loss_of("odpo", WORKED).mean()) == pytest.approx(0.8795838554, abs=1e-9)
    assert float(loss_of("odpo", WORKED, offset=0.5).mean()) == pytest.approx(0.7565331852, abs=1e-9)


def gradients(name, terms, **changes):
    """d loss / d term of the terms that are not constants, by autograd."""
    terms = {key: value.clone().requires_grad_() for key, value in terms.items()}
    wanted = [key for key in ("p_w", "p_l", "kl_w", "kl_l") if key in dice.loss_inputs(name)]
    found = torch.autograd.grad(
        loss_of(name, terms, **changes).sum(), [terms[k] for k in wanted], allow_unused=True
    )
    return dict(zip(wanted, found))


def test_gradients_on_the_worked_pairs():
    slope = gradients("dpo", WORKED)
    expected = tensor(-0.0437823499, -0.0592666600, -0.05)
    torch.testing.assert_close(slope["p_w"], expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(slope["p_l"], -expected, atol=1e-9, rtol=0)
    slope = gradients("lr-dpo", WORKED)["p_w"]
    torch.testing.assert_close(
        slope, tensor(-0.0457602059, -0.0558481112, -0.0524979187), atol=1e-9, rtol=0
    )
    assert gradients("tdpo2", WORKED)["kl_w"] is None  # stopgrad
    one = gradients("tdpo1", WORKED)
    torch.testing.assert_close(one["kl_w"], one["p_w"], atol=1e-12, rtol=0)
    torch.testing.assert_close(one["kl_l"], -one["p_w"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", dice.LOSSES)
def test_gradients_equal_finite_differences(name):
    for key, slope in gradients(name, WORKED).items():
        up, down = ({**WORKED, key: WORKED[key] + sign * 1e-6} for sign in (1, -1))
        numeric = (loss_of(name, up) - loss_of(name, down)) / 2e-6
        if slope is not None:
            torch.testing.assert_close(slope, numeric, atol=1e-6, rtol=1e-6)
    # a higher log-prob of the chosen answer is never worse, one of the rejected never better, up to the margin
    assert (gradients(name, WORKED)["p_w"] < 0).all() and (gradients(name, WORKED)["p_l"] > 0).all()


# ------------------------------------------------------------------------------------- properties

logprob, count = st.floats(-80, -0.1), st.integers(1, 60)
PAIR = st.fixed_dictionaries(
    {
        **{key: logprob for key in ("p_w", "p_l", "r_w", "r_l")},
        **{key: count for key in ("n_w", "n_l")},
        "score_w": st.floats(0.1, 5),
        "score_l": st.floats(-5, 0),
        **{key: st.floats(0, 10) for key in ("kl_w", "kl_l")},
    }
)
BETA = st.floats(0.01, 2)


def as_terms(pair):
    return {key: tensor(float(value)) for key, value in pair.items()}


def softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


@given(PAIR, BETA)
def test_equal_policy_and_reference_have_closed_forms(pair, beta):
    pair = {**pair, "r_w": pair["p_w"], "r_l": pair["p_l"], "kl_w": 0.0, "kl_l": 0.0}
    expected = {
        "dpo": math.log(2),
        "cdpo": math.log(2),
        "tdpo1": math.log(2),
        "tdpo2": math.log(2),
        "lr-dpo": softplus(-0.02 * (pair["n_w"] - pair["n_l"])),
        "odpo": softplus(math.log(pair["score_w"] - pair["score_l"])),
        "ipo": 1 / (2 * beta) ** 2,
        "simpo": softplus(1.0 - beta * (pair["p_w"] / pair["n_w"] - pair["p_l"] / pair["n_l"])),
    }
    assert expected.keys() == dice.LOSSES.keys()
    for name, value in expected.items():
        assert float(loss_of(name, as_terms(pair), beta=beta)) == pytest.approx(
            value, rel=1e-9, abs=1e-12
        )


def swapped(terms):
    return {key: terms[key[:-1] + {"w": "l", "l": "w"}[key[-1]]] for key in terms}


@given(PAIR, BETA)
def test_swapping_chosen_and_rejected_mirrors(pair, beta):
    """-log sigmoid(x) and -log sigmoid(-x) differ by x: the losses of a pair and of its mirror image tell
    beta * D; smoothed by one half, cDPO cannot tell them apart."""
    terms = as_terms(pair)
    d = (pair["p_w"] - pair["r_w"]) - (pair["p_l"] - pair["r_l"])
    for name in ("dpo", "lr-dpo", "tdpo1"):
        extra = {
            "dpo": 0,
            "lr-dpo": 0.02 * (pair["n_w"] - pair["n_l"]),
            "tdpo1": -beta * (pair["kl_l"] - pair["kl_w"]),
        }[name]
        difference = loss_of(name, swapped(terms), beta=beta) - loss_of(name, terms, beta=beta)
        assert float(difference) == pytest.approx(beta * d + extra, rel=1e-6, abs=1e-9)
    even = [loss_of("cdpo", x, beta=beta, label_smoothing=0.5) for x in (terms, swapped(terms))]
    torch.testing.assert_close(*even)
    torch.testing.assert_close(
        loss_of("cdpo", terms, beta=beta, label_smoothing=0), loss_of("dpo", terms, beta=beta)
    )


@given(PAIR, BETA, st.floats(-20, 20))
def test_shifts_that_should_not_count_do_not(pair, beta, shift):
    """The same constant on both answers' log-probs, or on policy and reference of one answer, cancels. What is
    a mean over tokens takes a constant per token."""
    terms = as_terms(pair)
    for name in dice.LOSSES:
        both = {"p_w", "p_l"} if name not in ("ipo", "simpo") else set()
        for moved in (both, {"p_w", "r_w"} if name != "simpo" else set()):
            other = {key: value + shift if key in moved else value for key, value in terms.items()}
            torch.testing.assert_close(
                loss_of(name, other, beta=beta), loss_of(name, terms, beta=beta), rtol=1e-6, atol=1e-9
            )
    per_token = {
        **terms,
        "p_w": terms["p_w"] + shift * terms["n_w"],
        "p_l": terms["p_l"] + shift * terms["n_l"],
    }
    for name in ("ipo", "simpo"):
        torch.testing.assert_close(
            loss_of(name, per_token, beta=beta), loss_of(name, terms, beta=beta), rtol=1e-6, atol=1e-6
        )


@given(PAIR)
def test_a_longer_winner_is_learned_less_from(pair):
    longer = {**pair, "n_w": pair["n_l"] + 5}
    shorter = {**pair, "n_w": 1, "n_l": 6}
    plain = gradients("dpo", as_terms(pair))["p_w"].abs()
    assert gradients("lr-dpo", as_terms(longer))["p_w"].abs() < plain
    assert gradients("lr-dpo", as_terms(shorter))["p_w"].abs() > plain


@given(st.lists(PAIR, min_size=2, max_size=6), st.randoms())
def test_each_pair_is_for_itself(pairs, random):
    """Neither the order of a batch nor its split matters."""
    order = random.sample(range(len(pairs)), len(pairs))
    stacked = {key: tensor(*(float(p[key]) for p in pairs)) for key in NAMES}
    for name in dice.LOSSES:
        alone = torch.cat([loss_of(name, as_terms(p)) for p in pairs])
        torch.testing.assert_close(loss_of(name, stacked), alone)
        shuffled = {key: value[order] for key, value in stacked.items()}
        torch.testing.assert_close(loss_of(name, shuffled), alone[order])


def test_every_setting_of_a_loss_is_a_setting_and_every_term_is_known():
    names = {f for f in dice.Settings.__dataclass_fields__}
    for name in dice.LOSSES:
        assert set(dice.loss_inputs(name)) <= names | set(NAMES)
        assert inspect.getdoc(dice.LOSSES[name])


def test_fdpo_keeps_what_the_policy_does_not_reach():
    rows = [(0.3, 0.5, True), (0.5, 0.5, False), (0.9, 0.2, False), (-1, -0.5, True)]
    assert [dice.fdpo_keeps(sample, chosen) for sample, chosen, _ in rows] == [keep for *_, keep in rows]


def test_step_dpo_on_the_worked_steps():
    """One step is scored: the sums of its tokens' log-probs."""
    rows = [
        ([-0.2, -0.5, -0.1], [-0.3, -0.6, -0.2], [-1, -0.4], [-0.8, -0.4], 0.5981388694),
        ([-0.7, -0.7], [-0.5, -0.5], [-0.9], [-1.2], 0.8429153336),
    ]
    for p_w, r_w, p_l, r_l, expected in rows:
        terms = (tensor(sum(x)) for x in (p_w, p_l, r_w, r_l))
        assert float(dice.dpo_loss(*terms, 0.4)) == pytest.approx(expected, abs=1e-9)


# ------------------------------------------------------------------------------------- sequence KL


class Fixed:
    """A "model" whose hidden states are its logits, given by place."""

    def __init__(self, logits):
        self.table, self.device = torch.tensor(logits, dtype=torch.float64), torch.device("cpu")
        self.config, self.head_weight = replace(LLAMA, vocab_size=3), torch.eye(3, dtype=torch.float64)

    def __call__(self, tokens):
        return self.table[None, : tokens.shape[1]]

    def logits(self, hidden):
        return hidden


def test_sequence_kl_on_the_worked_example():
    policy, reference = Fixed([[1, 0, -1], [0.5, 0.5, 0]]), Fixed([[0, 0, 0], [1, 0, 0]])
    p, kl = dice.sequence_logprobs_and_kl(policy, reference, [[1]], [[0, 2]])
    r = dice.sequence_logprobs(reference, [[1]], [[0, 2]])
    assert float(p - r) == pytest.approx(0.7844309502, abs=1e-9)
    assert float(kl) == pytest.approx(0.3976567134, abs=1e-9)


def test_sequence_kl_equals_a_float64_loop_in_value_and_gradient(monkeypatch):
    monkeypatch.setattr(dice, "LOGITS", 3 * 90)  # chunks of three places
    policy, reference = (network(LLAMA, seed).double() for seed in (0, 1))
    rng = np.random.default_rng(0)
    prompts, answers = random_ids(rng, 4, 1, 7), random_ids(rng, 5, 9, 1)
    rows = [[], []]  # of the logits that each model makes at once
    for net, seen in zip((policy, reference), rows):
        real = net.logits
        monkeypatch.setattr(net, "logits", lambda x, real=real, seen=seen: seen.append(len(x)) or real(x))
    kl = dice.sequence_logprobs_and_kl(policy, reference, prompts, answers)[1]
    kl.sum().backward()
    assert max(rows[0]) == max(rows[1]) == 3 and sum(rows[0]) == 2 * 15  # forward and backward
    monkeypatch.undo()
    slopes = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    loop = []
    for prompt, answer in zip(prompts, answers):
        ids, total = torch.tensor([prompt + answer]), 0
        with torch.no_grad():
            q = reference.logits(reference(ids)).softmax(-1)[0]
        p = policy.logits(policy(ids)).softmax(-1)[0]
        for t in range(len(prompt) - 1, ids.shape[1] - 1):
            total = total + (q[t] * (q[t].log() - p[t].log())).sum()
        loop.append(total)
    torch.testing.assert_close(kl, torch.stack(loop))
    torch.stack(loop).sum().backward()
    for ours, p in zip(slopes, policy.parameters()):
        torch.testing.assert_close(ours, p.grad, atol=1e-9, rtol=1e-6)


def test_tdpo_starts_as_dpo_and_sequence_kl_starts_at_zero():
    net, pairs = network(LLAMA), random_pairs(network(LLAMA), 4)
    of = {}
    for name in ("dpo", "tdpo1", "tdpo2"):
        reference = None if name == "dpo" else network(LLAMA)
        losses, stats = dice.preference_losses(net, pairs, dice.Settings(loss=name), reference)
        of[name] = losses
        net.zero_grad()
        losses.sum().backward()
        of[name, "slope"] = torch.cat([p.grad.flatten() for p in net.parameters()])
    for name in ("tdpo1", "tdpo2"):  # with equal models the KL is 0, its least, and so is its slope
        torch.testing.assert_close(of[name], of["dpo"], atol=1e-5, rtol=0)
        torch.testing.assert_close(of[name, "slope"], of["dpo", "slope"], atol=1e-5, rtol=0)
    assert abs(float(stats["chosen_kl"].sum().detach())) < 1e-4


@pytest.mark.parametrize("name", dice.LOSSES)
def test_training_by_each_loss_lowers_it(name):
    net, run = network(LLAMA), Bench(batch=6, epochs=6, loss=name, **dice.LOSS_SETTINGS.get(name, {}))
    pairs = random_pairs(net, 6)
    for p in pairs:
        p.chosen.shaped, p.rejected.shaped = 2.0, 0.5
    reference = network(LLAMA) if "kl_w" in dice.loss_inputs(name) else None
    losses = dice.partial(dice.preference_losses, reference=reference)
    dice.train(run, "dpo", net, losses, pairs, lr=1e-3, steps=6, epochs=6, batch=6)
    assert run.rows[-1]["loss"] < run.rows[0]["loss"] and run.rows[-1]["margin"] > 0


# ------------------------------------------------------------------------------------- pairs and shaping


def test_random_rejected_answers_are_any_but_the_best():
    rng = np.random.default_rng(0)
    reward, length = rng.normal(size=(4000, 4)), rng.integers(1, 90, (4000, 4)).astype(float)
    valid = rng.random((4000, 4)) < 0.8
    valid[:, :2] = True
    best, other = dice.best_and_worst(reward, length, valid, 0.01, rng.random((4000, 4)))
    row = np.arange(4000)
    assert (best == dice.best_and_worst(reward, length, valid, 0.01)[0]).all()
    assert (best != other).all() and valid[row, other].all()
    free = valid.all(1) & (best == 0)
    assert np.allclose(np.bincount(other[free], minlength=4)[1:] / free.sum(), 1 / 3, atol=0.08)
    lots = rng.random((4000, 4))
    reward += 0.02 * length
    alpha = dice.search_alpha(reward, length, valid, lots)
    assert dice.length_gap(reward, length, valid, 0, lots) > 5
    assert abs(dice.length_gap(reward, length, valid, alpha, lots)) < 0.5


def samples_of_lengths(seed=0):
    rng, samples = np.random.default_rng(seed), []
    for i in range(60):
        prompt = dice.Prompt(str(i), [5])
        for k in range(4):
            n = int(rng.integers(5, 90))
            # a token of this answer has k + 1 characters: the two units disagree
            samples.append(dice.Sample(prompt, [5] * n, f"{k}" * n * (k + 1), k))
            samples[-1].reward = 0.05 * n + rng.normal()
    return samples


def test_the_unit_of_length_and_multiples_of_alpha():
    s = dice.Settings(samples=4, length="tokens")
    samples = samples_of_lengths()
    alpha, pairs = dice.shape_and_pair(samples, s)
    assert abs(np.mean([len(p.chosen.tokens) - len(p.rejected.tokens) for p in pairs])) < 2
    assert abs(np.mean([len(p.chosen.text) - len(p.rejected.text) for p in pairs])) > 5
    assert samples[0].shaped == pytest.approx(samples[0].reward - alpha * len(samples[0].tokens))
    assert dice.shape_and_pair(samples, replace(s, alpha="2x"))[0] == pytest.approx(2 * alpha)
    assert dice.shape_and_pair(samples, replace(s, alpha="0.25"))[0] == 0.25


# ------------------------------------------------------------------------------------- data


def test_scores_and_steps_are_read_and_pairs_come_back_as_they_went_out(tmp_path, checkpoint):
    rows = [
        {"prompt": "2 + 2 + 2?", "initial_reason_steps": "First 2 + 2 = 4.", "chosen": " Then 4 + 2 = 6.",
         "rejected": " Then 4 + 2 = 8.", "score_chosen": 1, "score_rejected": 0.5},
        {"prompt": "Hello", "chosen": "Good day.", "rejected": "Go."},
    ]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    step, plain = jsonl.read_preferences(path)
    assert step.scores == (1, 0.5) and step.steps == "First 2 + 2 = 4."
    assert plain.scores is None and plain.steps is None
    run = dice.Run(
        dice.parse_settings(
            ["--model", str(checkpoint), "--preferences", str(path), "--out", str(tmp_path / "out")]
        )[0]
    )
    run.open()
    one, other = run.offline
    tokenizer = run.tokenizer
    assert one.prompt.ids == tokenizer.prompt("2 + 2 + 2?") + tokenizer.encode(
        "First 2 + 2 = 4.", start=False
    )
    assert one.chosen.tokens == tokenizer.encode(" Then 4 + 2 = 6.", start=False)  # no end token
    assert other.chosen.tokens[-1] == tokenizer.end and other.prompt.steps is None
    assert (one.chosen.shaped, one.rejected.shaped) == (1, 0.5)
    assert run.prompts[0].ids == tokenizer.prompt("2 + 2 + 2?")  # sampled for from its beginning
    for x in (one.chosen, one.rejected, other.chosen, other.rejected):
        x.logprob = 0.0
    dice.record_round(run, "round-1", 0.0, [one.chosen], run.offline, None)
    again = jsonl.read_preferences(tmp_path / "out" / "round-1" / "pairs.jsonl")
    assert [(p.prompt, p.chosen, p.rejected, p.steps) for p in again] == [
        (p.prompt, p.chosen, p.rejected, p.steps) for p in (step, plain)
    ]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({}, 'line 2: --loss odpo needs a "score_chosen" above'),
        ({"score_chosen": 1.0}, 'line 2: "score_chosen" and "score_rejected" must both be numbers'),
        ({"score_chosen": 1.0, "score_rejected": 1.0}, "line 2: --loss odpo needs"),
        ({"score_chosen": 1.0, "score_rejected": 2.0}, "line 2: --loss odpo needs"),
        ({"score_chosen": "good", "score_rejected": 2.0}, "line 2: "),
        (
            {"initial_reason_steps": 5, "score_chosen": 2, "score_rejected": 1},
            'line 2: "initial_reason_steps"',
        ),
    ],
)
def test_what_odpo_and_step_dpo_cannot_use_is_refused_by_line(
    changes, told, checkpoint, tmp_path, capsys
):
    row = {"prompt": "Hello", "chosen": "Good day.", "rejected": "Go."}
    path = tmp_path / "pairs.jsonl"
    good = {**row, "score_chosen": 2, "score_rejected": 1}
    path.write_text(json.dumps(good) + "\n" + json.dumps({**row, **changes}) + "\n")
    assert told in refused(
        capsys, tmp_path, "--model", checkpoint, "--preferences", path, "--loss", "odpo"
    )


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--loss", "kto"], "--loss kto: choose one of dpo, cdpo"),
        (
            ["--label-smoothing", "0.2"],
            "--label-smoothing 0.2: --loss dpo does not read it; it belongs to --loss cdpo",
        ),
        (["--loss", "tdpo1", "--kl-weight", "1"], "--kl-weight 1.0: --loss tdpo1 does not read it"),
        (["--alpha", "x"], "--alpha x"),
        (["--labeller", "nobody"], "nobody: not a model directory"),
        (["--dpo-steps", "0"], "--dpo-steps 0: the implicit reward needs"),
        (["--weights", "dummy"], "--weights dummy: stands in for a --model NAME"),
        (["--rejected", "best"], "--rejected best: choose one of worst, random"),
        (["--labeller", "gold", "--reward-reference", "first"], "--reward-reference first"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(argv, told, tmp_path, capsys):
    assert told in refused(capsys, tmp_path, *argv)


def test_nothing_to_replay_is_told_before_anything_is_sampled(checkpoint, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n')
    told = refused(
        capsys, tmp_path, "--model", checkpoint, "--reference", checkpoint, "--prompts", prompts
    )
    assert "--gamma 0.5: there are no offline pairs to replay" in told


# ------------------------------------------------------------------------------------- reward models


def write_reward_model(directory, labels=1, seed=0, **changes):
    """A Llama sequence classifier of the tiny world's vocabulary, as transformers would save it."""
    config, tokenizer = dice.tiny_model()
    models.write_checkpoint(directory, config, dice.new_model(config, seed).state_dict(), tokenizer)
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {str(i): f"LABEL_{i}" for i in range(labels)},
        "pad_token_id": tokenizer.end,
    }
    path.write_text(json.dumps(raw | changes))
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    weights["score.weight"] = torch.randn(
        labels, config.width, generator=torch.Generator().manual_seed(seed)
    )
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def tiny_samples(count=6):
    _, tokenizer = dice.tiny_model()
    rows = tiny.sft_examples(0)[:count]
    return [
        dice.Sample(dice.Prompt(r["prompt"], []), tokenizer.answer(r["chosen"]), r["chosen"])
        for r in rows
    ]


def test_the_reward_is_the_head_on_the_last_token_that_is_not_padding(tmp_path):
    directory = write_reward_model(tmp_path / "rm")
    labeller, budget = dice.RewardModel(directory), dice.Budget(200, "scoring")
    samples, tokenizer = tiny_samples(), labeller.tokenizer
    net = dice.load_model(directory, "cpu")
    for x, reward in zip(samples, labeller.score(dice.load_model(directory, "cpu"), samples, budget)):
        ids = tokenizer.prompt(x.prompt.content) + tokenizer.encode(x.text, start=False)
        with torch.no_grad():  # the end token is this model's padding, so what stands before it is read
            assert reward == pytest.approx(float(net.head(net(torch.tensor([ids])))[0, -1, 0]), abs=1e-5)
    long = tiny_samples(1)[0]
    long.text *= 40
    assert math.isnan(labeller.score(net, [long], budget)[0])


def test_the_reward_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    for pad in (None, "end"):
        directory = write_reward_model(tmp_path / f"rm-{pad}", **({} if pad else {"pad_token_id": None}))
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
            directory, num_labels=1
        ).eval()
        labeller, budget = dice.RewardModel(directory), dice.Budget(10**4, "scoring")
        samples = tiny_samples()
        for x, reward in zip(samples, labeller.score(dice.load_model(directory, "cpu"), samples, budget)):
            ids = torch.tensor([labeller.tokenizer.prompt(x.prompt.content, x.text)])
            with torch.no_grad():
                assert reward == pytest.approx(float(theirs(ids).logits), abs=1e-4)


def test_labellers_that_do_not_fit_are_refused(checkpoint, tmp_path, capsys):
    assert "not a reward model" in refused(capsys, tmp_path, "--labeller", checkpoint)
    two = write_reward_model(tmp_path / "two", labels=2)
    assert "two: not a reward model" in refused(capsys, tmp_path, "--labeller", two)
    bad = write_reward_model(tmp_path / "bad", labels=2, id2label={"0": "LABEL_0"})
    assert "score.weight has shape (2, 64)" in refused(capsys, tmp_path, "--labeller", bad)
    one = write_reward_model(tmp_path / "one")
    assert "give it to --labeller" in refused(capsys, tmp_path, "--model", one, "--preferences", "x")
    small = replace(dice.tiny_model()[0], vocab_size=90)
    models.write_checkpoint(
        tmp_path / "small", small, dice.new_model(small, 0).state_dict(), dice.tiny_model()[1]
    )
    path = tmp_path / "small" / "config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "x"}}
        )
    )
    assert "fewer embeddings" in refused(capsys, tmp_path, "--labeller", tmp_path / "small")


# ------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "argv",
    [
        ["--loss", "odpo", "--rejected", "random"],
        ["--loss", "tdpo2", "--reward-reference", "first", "--dtype", "bfloat16"],
        ["--loss", "simpo", "--filter", "fdpo", "--epochs", "2", "--labeller", "gold"],
        ["--loss", "lr-dpo", "--labeller", "RM", "--gamma", "0", "--dpo-steps", "0", "--alpha", "0"],
        ["--filter", "fdpo", "--epochs", "2", "--length", "tokens", "--alpha", "2x"],
    ],
)
def test_siblings_run_from_beginning_to_end(argv, small_world, tmp_path):
    if "RM" in argv:
        argv = [str(write_reward_model(tmp_path / "rm")) if word == "RM" else word for word in argv]
    out = tmp_path / "out"
    assert (
        dice.main(
            [
                *small_world,
                "--sft-steps",
                "40",
                *argv,
                "--rounds",
                "2",
                "--min-valid",
                "0",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    assert (out / "round-2" / "policy" / "model.safetensors").exists()
    assert "round-2" in (out / "report.md").read_text()


def test_fdpo_says_when_nothing_is_left(monkeypatch, small_world, tmp_path, capsys):
    monkeypatch.setattr(dice, "fdpo_keeps", lambda sample, chosen: False)
    argv = [*small_world, "--sft-steps", "20", "--filter", "fdpo", "--labeller", "gold", "--out", str(tmp_path / "out")]
    assert dice.main(argv) == 2
    assert "--filter fdpo: leaves no pair" in capsys.readouterr().err


def test_fdpo_drops_for_good_and_trains_on_the_rest(monkeypatch):
    net, run = network(LLAMA), Bench(batch=2, epochs=3)
    pairs, seen, asked = random_pairs(net, 6), [], []

    def keep(model, epoch, kept):
        asked.append((epoch, list(kept)))
        return [i for i in kept if i != epoch]

    def losses(model, items, settings):
        seen.append([pairs.index(p) for p in items])
        return dice.preference_losses(model, items, settings)

    run.train_budget.tokens = 10**6
    dice.train(run, "dpo", net, losses, pairs, lr=1e-4, steps=99, epochs=3, batch=1, keep=keep)
    everything = [i for group in seen for i in group]
    assert asked == [(0, [0, 1, 2, 3, 4, 5]), (1, [1, 2, 3, 4, 5]), (2, [2, 3, 4, 5])]
    assert sorted(everything[:5]) == [1, 2, 3, 4, 5] and sorted(everything[5:9]) == [2, 3, 4, 5]
    assert sorted(everything[9:]) == [3, 4, 5] and len(run.rows) == 12
