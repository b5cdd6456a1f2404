"""Every loss and reward of the family: worked numbers, closed forms, loops, transformers."""
import inspect
import math
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings as examples, strategies as st
from safetensors.torch import load_file, save_file
from test_dice import (GOOD, LLAMA, OFFLINE, Bench, checkpoint, network, parsed, random_ids, random_pairs,
                       refused, rows_of, same, settings, small_world, spoil, train_dpo, world)

import dice
import model as models
from data import files, jsonl, options, report, reward_model, tiny
from data.options import option

assert checkpoint and small_world and world  # fixtures
examples.register_profile("quick", max_examples=30, deadline=None)
examples.load_profile("quick")

def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)

# Three worked pairs, and the values of each loss on them by its own defaults. A new loss needs a row here.
NAMES = ("pi_w", "pi_l", "ref_w", "ref_l", "n_w", "n_l", "score_w", "score_l", "kl_w", "kl_l")
WORKED = dict(zip(NAMES, tensor((-12.0, -15.5, -13.0, -14.0, 10, 14, 2.0, 0.5, 0.8, 1.4),
                                (-30.25, -20.0, -28.0, -21.5, 25, 18, 1.1, 0.9, 2.5, 0.9),
                                (-5.0, -9.0, -5.0, -9.0, 4, 9, 7.0, 3.0, 0.3, 0.6)).T))
ROWS = {
    "dpo": (0.5759394199, 0.8981232641, 0.6931471806), "cdpo": (0.6009394199, 0.8606232641, 0.6931471806),
    "lr-dpo": (0.6117553389, 0.8175344794, 0.7443966601), "odpo": (0.7738978720, 0.2554157818, 1.6094379124),
    "tdpo1": (0.6026529093, 0.8064142108, 0.7082596763), "tdpo2": (0.5891850190, 0.8514860884, 0.7006753053),
    "ipo": ((0.1 + 1.5 / 14 - 5) ** 2, (-0.09 - 1.5 / 18 - 5) ** 2, 25),
    "simpo": [math.log1p(math.exp(-z)) for z in (31 / 14 - 3.4, 20 / 9 - 3.42, 2 - 3.5)]}

def loss_of(name, terms, **changes):
    """The loss with its own defaults, and beta 0.1 if it has none."""
    loss = dice.LOSSES[name]
    own = {key: changes.get(key, f.default) for key, f in loss.options.items()}
    return loss({**terms, "beta": changes.get("beta", loss.defaults.get("beta", 0.1))}, own)[0]

def test_each_loss_has_a_row_in_this_file_and_says_what_it_is():
    assert ROWS.keys() == dice.LOSSES.keys(), "add a row to ROWS: the loss on the worked pairs"
    assert all(inspect.getdoc(loss.fn) for loss in dice.LOSSES.values())

@pytest.mark.parametrize("name", ROWS)
def test_losses_on_the_worked_pairs(name):
    same(loss_of(name, WORKED), tensor(*ROWS[name]), atol=1e-9, rtol=0)

@pytest.mark.parametrize("name", dice.LOSSES)
def test_gradients_equal_finite_differences(name):
    wanted = [key for key in ("pi_w", "pi_l", "kl_w", "kl_l") if key in dice.LOSSES[name].parameters]
    terms = {key: value.clone().requires_grad_() for key, value in WORKED.items()}
    loss_of(name, terms).sum().backward()
    for key in wanted:
        up, down = (loss_of(name, {**WORKED, key: WORKED[key] + sign * 1e-6}) for sign in (1, -1))
        if (name, key) == ("tdpo2", "kl_w"):
            assert terms[key].grad is None  # a constant there, says the paper
        else:
            same(terms[key].grad, (up - down) / 2e-6, atol=1e-6, rtol=1e-6)
    # A higher log-prob of the chosen answer is never worse, one of the rejected never better, on these pairs.
    chosen, rejected = terms["pi_w"].grad, terms["pi_l"].grad
    assert (chosen <= 0).all() and (rejected >= 0).all() and chosen.any()

# ------------------------------------------------------------------------------------- properties
logprob, count, kl = st.floats(-80, -0.1), st.integers(1, 60), st.floats(0, 10)
PAIR = st.fixed_dictionaries({
    "pi_w": logprob, "pi_l": logprob, "ref_w": logprob, "ref_l": logprob, "n_w": count, "n_l": count,
    "score_w": st.floats(0.1, 5), "score_l": st.floats(-5, 0), "kl_w": kl, "kl_l": kl})

def softplus(x):
    return max(x, 0) + math.log1p(math.exp(-abs(x)))

OTHERS = dict(label_smoothing=0.2, length_margin=0.03, offset=0.7, kl_weight=0.3, target_margin=0.6)

def formulas(pi_w, pi_l, ref_w, ref_l, n_w, n_l, score_w, score_l, kl_w, kl_l, beta):
    """The losses of one pair with these options in plain numbers: -log sigmoid(x) is softplus(-x)."""
    z, offset = beta * ((pi_w - ref_w) - (pi_l - ref_l)), 0.7 * math.log(score_w - score_l)
    return {"dpo": softplus(-z), "cdpo": 0.8 * softplus(-z) + 0.2 * softplus(z),
            "lr-dpo": softplus(-z - 0.03 * (n_w - n_l)), "odpo": softplus(offset - z),
            "tdpo1": softplus(beta * (kl_l - kl_w) - z), "tdpo2": softplus(beta * 0.3 * (kl_l - kl_w) - z),
            "ipo": ((pi_w - ref_w) / n_w - (pi_l - ref_l) / n_l - 1 / (2 * beta)) ** 2,
            "simpo": softplus(0.6 - beta * (pi_w / n_w - pi_l / n_l))}

@given(PAIR, st.floats(0.01, 2))
def test_losses_equal_their_formulas_on_any_pair(pair, beta):
    terms = {key: tensor(float(value)) for key, value in pair.items()}
    for name, value in formulas(**pair, beta=beta).items():
        found = float(loss_of(name, terms, beta=beta, **OTHERS))
        assert found == pytest.approx(value, rel=1e-9, abs=1e-12)

# ------------------------------------------------------------------------------------- how a loss is declared
def table():
    return options.Losses(dice.Settings, inputs=("pi", "ref", "n", "score", "kl"), settings=("beta",))

@pytest.mark.parametrize("declared, my_loss, name", [
    ({"alpha": option(1.0, "")}, lambda pi_w, alpha: 0, "alpha"),  # a setting of the run
    ({"top_p": option(1.0, "")}, lambda pi_w, top_p: 0, "top_p"),  # one of the sampling settings
    ({"kl_w": option(1.0, "")}, lambda pi_w, kl_w: 0, "kl_w"),  # a term
    ({}, lambda pi_w, weight: 0, "weight"),
    ({}, lambda pi_w, gamma: 0, "gamma"),  # a setting, but not one that losses may read
    ({"weight": 2.0}, lambda pi_w: 0, "weight"),  # a default for what is no setting
    ({"weight": option(1.0, "")}, lambda pi_w: 0, "weight")])  # declared, and read by nobody
def test_a_loss_whose_option_clashes_or_is_not_declared_is_an_error_at_import(declared, my_loss, name):
    my_loss.__name__ = "my_loss"
    with pytest.raises(TypeError, match=f"loss my: .*{name}"):
        table().add(**declared)(my_loss)

def test_a_losss_own_options_reach_it_and_its_columns_are_logged(tmp_path, monkeypatch, capsys):
    losses = table()
    @losses.add(beta=0.7, weight=option(2.0, "how much", 0, 9))
    def my_loss(pi_w, pi_l, beta, weight):
        seen.append((beta, weight))
        return -weight * (pi_w - pi_l), {"my_column": pi_w * 0 + weight}
    for name, loss in losses.items():
        monkeypatch.setitem(dice.LOSSES, name, loss)
    seen, run = [], Bench(tmp_path / "run", batch=4, epochs=2, train_tokens=50, loss="my", weight=3.0)
    train_dpo(run, random_pairs(run.net, 4), steps=2)
    assert {*seen} == {(0.7, 3.0)}
    assert [row["my_column"] for row in rows_of(run.out / "metrics.jsonl")] == [3, 3]
    capsys.readouterr()
    s = parsed("--loss", "my", "--weight", 4)
    assert s.loss_options == {"weight": 4.0} and s.beta == 0.7 and options.as_dict(s)["weight"] == 4.0
    for argv, told in (("--weight 4", "--weight 4.0: --loss dpo does not read it; it belongs to --loss my"),
                       ("--loss my --weight 10", "--weight 10.0: must be at least 0 and at most 9")):
        assert told in refused(capsys, tmp_path, *argv.split())

def test_odpo_reads_the_score_of_an_offline_answer_and_the_shaped_reward_of_a_generated_one():
    net = network(LLAMA)
    old, new = random_pairs(net, 2)
    old.chosen.score, old.rejected.score = 2.0, 0.5
    new.chosen.shaped, new.rejected.shaped = 7.0, 3.0
    losses, _ = dice.preference_loss(net, [old, new], settings(loss="odpo"))
    expected = [softplus(math.log(1.5)), softplus(math.log(4))]  # policy and reference are the same
    assert losses.tolist() == pytest.approx(expected, abs=1e-4) and math.isnan(old.chosen.shaped)

# ------------------------------------------------------------------------------------- sequence KL
class Fixed:
    """A "model" whose hidden states are its logits, given by place."""
    def __init__(self, logits):
        self.table, self.device, self.dtype = tensor(*logits), torch.device("cpu"), torch.float64
        self.config, self.head_weight = replace(LLAMA, vocab_size=3), torch.eye(3, dtype=torch.float64)
    def __call__(self, tokens, layout):
        return self.table[None, :tokens.shape[1]]

def test_sequence_kl_on_the_worked_example():
    model, ref_model = Fixed([[1, 0, -1], [0.5, 0.5, 0]]), Fixed([[0, 0, 0], [1, 0, 0]])
    logprob, kl = dice.sequence_logprobs_and_kl(model, ref_model, [[1]], [[0, 2]])
    ref = dice.sequence_logprobs(ref_model, [[1]], [[0, 2]])
    same(torch.cat((logprob - ref, kl)), tensor(0.7844309502, 0.3976567134), atol=1e-9, rtol=0)

def test_sequence_kl_equals_a_float64_loop_in_value_and_gradient_and_makes_few_logits_at_once(monkeypatch):
    model, ref_model, rng = network(LLAMA).double(), network(LLAMA, 1).double(), np.random.default_rng(0)
    prompts, answers = random_ids(rng, 4, 1, 7), random_ids(rng, 5, 9, 1)
    seen, real = [], dice.Logits.forward  # seen: of how many places logits are made at once
    def forward(ctx, hidden, weight):
        seen.append(len(hidden))
        return real(ctx, hidden, weight)
    with monkeypatch.context() as patch:
        patch.setattr(dice, "CHUNK_OF_LOGITS", 3 * 90)  # chunks of three places
        patch.setattr(dice.Logits, "forward", forward)
        logprobs, kl = dice.sequence_logprobs_and_kl(model, ref_model, prompts, answers)
        kl.sum().backward()
    same(logprobs, dice.sequence_logprobs(model, prompts, answers))
    assert max(seen) == 3 and sum(seen) == 4 * 15  # of both models, forward and backward
    slopes, loop = [p.grad.clone() for p in model.parameters()], []
    model.zero_grad()
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            q = ref_model.logits(ref_model(ids)).softmax(-1)[0]
        p = model.logits(model(ids)).softmax(-1)[0]
        answer_only = slice(len(prompt) - 1, ids.shape[1] - 1)
        loop.append((q * (q.log() - p.log()))[answer_only].sum())
    same(kl, torch.stack(loop))
    torch.stack(loop).sum().backward()
    for ours, p in zip(slopes, model.parameters()):
        same(ours, p.grad, atol=1e-9, rtol=1e-6)

def test_tdpo_starts_as_dpo_and_sequence_kl_starts_at_zero():
    net, pairs = network(LLAMA), random_pairs(network(LLAMA), 4)
    dpo, _ = dice.preference_loss(net, pairs, settings(loss="dpo"))
    for name in ("tdpo1", "tdpo2"):
        losses, stats = dice.preference_loss(net, pairs, settings(loss=name), network(LLAMA))
        same(losses, dpo, atol=1e-5, rtol=0)
        assert abs(float(stats["chosen_kl"].sum().detach())) < 1e-4

# ------------------------------------------------------------------------------------- data
STEPS = [{"prompt": "2 + 2 + 2?", "initial_reason_steps": "First 2 + 2 = 4.", "chosen": " Then 4 + 2 = 6.",
          "rejected": " Then 4 + 2 = 8.", "score_chosen": 1, "score_rejected": 0.5}, GOOD]

def test_scores_and_steps_are_read_and_pairs_come_back_as_they_went_out(tmp_path, checkpoint):
    files.write_rows(tmp_path / "pairs.jsonl", STEPS)
    step, plain = jsonl.read_preferences(tmp_path / "pairs.jsonl")
    assert (step.scores, step.steps, plain.scores, plain.steps) == ((1, 0.5), "First 2 + 2 = 4.", None, None)
    argv = ["--model", checkpoint, "--preferences", tmp_path / "pairs.jsonl", "--out", tmp_path / "out"]
    run = dice.Run(parsed(*argv))
    (one, other), tokenizer, encode = run.offline, run.tokenizer, partial(run.tokenizer.encode, start=False)
    assert one.prompt.ids == tokenizer.prompt("2 + 2 + 2?") + encode("First 2 + 2 = 4.")
    assert one.chosen.tokens == encode(" Then 4 + 2 = 6.")  # no end token
    assert other.chosen.tokens[-1] == tokenizer.end and other.prompt.steps is None
    assert (one.chosen.score, one.rejected.score) == (1, 0.5) and math.isnan(one.chosen.shaped)
    assert run.prompts[0].ids == tokenizer.prompt("2 + 2 + 2?")  # sampled for from its beginning
    for x in dice.answers_of(run.offline):
        x.logprob = 0.0
    with run:
        run.stage_name = "round-1"
        report.log_round(run, run.settings, 0.0, [one.chosen], run.offline, Counter(), [], None)
    again = jsonl.read_preferences(tmp_path / "out" / "round-1" / "pairs.jsonl")
    assert [p[1:4] + p[5:] for p in again] == [p[1:4] + p[5:] for p in (step, plain)]
    assert rows_of(tmp_path / "out" / "round-1" / "samples.jsonl")[0]["shaped_reward"] is None

@pytest.mark.parametrize("changes, told", [
    ({}, "line 2: --loss odpo needs"),
    ({"score_chosen": 1.0}, 'line 2: "score_chosen" and "score_rejected" must both be numbers'),
    ({"score_chosen": 1.0, "score_rejected": 2.0}, "line 2: --loss odpo needs"),
    ({"score_chosen": 1.0 + 1e-9, "score_rejected": 1}, "line 2: --loss odpo needs"),  # log(0) in float32
    ({"initial_reason_steps": 5, "score_chosen": 2, "score_rejected": 1}, 'line 2: "initial_reason_steps"')])
def test_what_odpo_and_step_dpo_cannot_use_is_refused_by_line(changes, told, checkpoint, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    files.write_rows(path, [GOOD | {"score_chosen": 2, "score_rejected": 1}, GOOD | changes])
    assert told in refused(capsys, tmp_path, "--model", checkpoint, "--preferences", path, "--loss", "odpo")

# ------------------------------------------------------------------------------------- reward models
def write_reward_model(directory, seed=0, more_ids=0, **changes):
    """A Llama sequence classifier of the tiny world's vocabulary, as transformers would save it."""
    config, tokenizer = models.tiny_model()
    config = replace(config, vocab_size=config.vocab_size + more_ids)
    models.write_checkpoint(directory, config, dice.new_model(config, seed).state_dict(), tokenizer)
    raw, weights = files.read_json(directory / "config.json"), load_file(directory / "model.safetensors")
    raw |= {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": tokenizer.end,
            "id2label": {"0": "LABEL_0"}}
    files.write_json(directory / "config.json", raw | changes)
    weights["score.weight"] = torch.randn(1, config.width, generator=torch.Generator().manual_seed(seed))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory

@pytest.mark.parametrize("changes", [{}, {"pad_token_id": None}], ids=["padding", "none"])
def test_the_reward_is_the_head_on_the_last_token_that_is_not_padding(changes, tmp_path, monkeypatch):
    """The end token may be the padding, and then what stands before it is read."""
    monkeypatch.setattr(tiny, "SFT_EXAMPLES", 6)
    directory = write_reward_model(tmp_path / "rm", **changes)
    net, (_, tokenizer) = dice.load_model(directory, "cpu"), models.find_reward_model(directory)
    samples = [dice.Sample(dice.Prompt(x["prompt"], []), [], x["chosen"]) for x in tiny.sft_examples(0)]
    samples[1].prompt.steps = "One moment. "
    samples[2].text *= 40
    rewards = dict(reward_model.score(net, samples, 200, tokenizer))
    assert math.isnan(rewards.pop(2)) and len(rewards) == 5  # longer than the context
    for i, reward in rewards.items():
        ids = tokenizer.prompt(samples[i].prompt.content, (samples[i].prompt.steps or "") + samples[i].text)
        with torch.no_grad():
            outputs = net.head(net(torch.tensor([ids])))[0, :, 0]
        assert reward == pytest.approx(float(outputs[-1 if changes else -2]), abs=1e-5)

def test_reward_models_that_do_not_fit_are_refused(checkpoint, tmp_path, capsys):
    say = partial(refused, capsys, tmp_path)
    assert "not a reward model" in say("--reward", checkpoint)
    files.write_rows(tmp_path / "pairs.jsonl", [GOOD])
    told = say("--model", write_reward_model(tmp_path / "one"), "--preferences", tmp_path / "pairs.jsonl")
    assert "give it to --reward" in told

def test_a_reward_model_has_a_name_and_gives_no_text(monkeypatch, tmp_path):
    """A stand-in with Llama-3's special tokens and no chat template, where the preset's download would be."""
    monkeypatch.setenv("DICE_WEIGHTS", str(tmp_path))
    directory = write_reward_model(tmp_path / models.PRESETS["skywork-8b"].repository, more_ids=3)
    text = files.read_json(directory / "tokenizer.json")
    [end] = text["added_tokens"]
    for i, name in enumerate(("start_header_id", "end_header_id", "eot_id"), 1):
        text["added_tokens"].append(end | {"content": f"<|{name}|>", "id": end["id"] + i})
    files.write_json(directory / "tokenizer.json", text)
    found, tokenizer = models.find_reward_model("skywork-8b")
    assert (found, tokenizer.chat) == (directory, "llama3")
    fetched = lambda *_: pytest.fail("16 GB are fetched for nothing")
    monkeypatch.setattr(models, "download_repository", fetched)
    monkeypatch.setenv("DICE_WEIGHTS", str(tmp_path / "empty"))
    for argv in (["--model", "skywork-8b"], ["--model", "gpt2", "--reference", "skywork-8b"],
                 ["--model", "skywork-8b", "--weights", "dummy"]):
        with pytest.raises(files.InputError, match="^skywork-8b: is a reward model; give it to --reward"):
            parsed(*argv)
    with pytest.raises(files.InputError, match="stands in for .*smollm2-360m-instruct, not for skywork-8b"):
        models.stand_in("skywork-8b")

# ------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("argv", [
    "--loss odpo --rejected random --length-unit tokens --alpha 2x --rounds 1",
    "--loss tdpo2 --reward-reference first",
    "--loss simpo --data-filter fdpo --epochs 2 --reward gold",
    "--loss lr-dpo --reward RM --gamma 0 --dpo-steps 0 --alpha 0 --rounds 1"])
def test_siblings_run_from_beginning_to_end(argv, small_world, tmp_path):
    if "RM" in argv:
        argv = argv.replace("RM", str(write_reward_model(tmp_path / "rm")))
    assert dice.main([*small_world, "--min-valid", "0", *argv.split(), "--out", str(tmp_path / "out")]) == 0
    last = "round-1" if "--rounds 1" in argv else "round-2"
    assert (tmp_path / "out" / last / "policy" / "model.safetensors").exists()
    assert last in (tmp_path / "out" / "report.md").read_text()

def test_a_reward_model_with_weights_that_are_no_numbers_is_one_clear_error(world, tmp_path):
    directory = write_reward_model(tmp_path / "rm")
    spoil(directory, "score.weight", math.nan)
    code, told, _ = world(["P"], OFFLINE, lambda i, k: f"word {k}", "--reward", str(directory))
    assert code == 2 and told.err.splitlines()[-1].startswith("dice.py: no prompt has")

# ------------------------------------------------------------------------------------- fDPO
def filtered(monkeypatch, directory, pairs, own):
    """(numbers of the pairs that fDPO keeps, prompts it asks); own: the reward of the policy's own answers"""
    asked, run = [], Bench(directory)
    def sample_answers(run, s, label, policy, prompts, count, stream):
        asked.extend(prompts)
        return [dice.Sample(prompt, [5], "") for prompt in prompts]
    def add_rewards(run, s, label, samples, policy_dir, prev_dir):
        for x in samples:
            x.reward = own[tuple(x.prompt.ids)]
    monkeypatch.setattr(dice, "sample_answers", sample_answers)
    monkeypatch.setattr(dice, "add_rewards", add_rewards)
    kept = dice.fdpo_filter(run, run.settings, 1, "", "", run.net, 0, pairs)
    return [pairs.index(p) for p in kept], asked

@pytest.mark.parametrize("ids, own, chosen, kept", [
    ((6, 7, 8, 9), {(6,): 0.3, (7,): 0.5, (8,): 0.9, (9,): -1}, [0.5, 0.5, 0.2, -0.5], [0, 3]),
    ((6, 7), {(6,): 1, (7,): 1}, [1, 0], None),
    ((6, 7, 6), {(6,): 0.5, (7,): 1.5}, [1, 1, 1], [0, 2])])
def test_fdpo_keeps_a_pair_whose_chosen_answer_is_better_than_the_policys_own(
        ids, own, chosen, kept, monkeypatch, tmp_path):
    """A tie is dropped. If no pair is left, a line says so. In Step-DPO one question with other steps before
    the answer is another prompt: each has an answer of its own."""
    pairs = random_pairs(network(LLAMA), len(ids))
    for p, i, reward in zip(pairs, ids, chosen):
        p.chosen.prompt = p.rejected.prompt = dice.Prompt("The question", [i])
        p.chosen.reward = reward
    if kept is None:
        with pytest.raises(files.InputError, match="--data-filter fdpo: leaves no pair"):
            filtered(monkeypatch, tmp_path, pairs, own)
    else:
        found, asked = filtered(monkeypatch, tmp_path, pairs, own)
        assert found == kept and [tuple(prompt.ids) for prompt in asked] == list(own)

def test_fdpo_drops_for_good_and_trains_on_the_rest(tmp_path):
    run = Bench(tmp_path, batch=1, epochs=3, train_tokens=10**6)
    pairs, seen, asked = random_pairs(run.net, 6), [], []
    def number(items):
        return [pairs.index(p) for p in items]
    def keep(model, epoch, items):
        asked.append((epoch, number(items)))
        return [p for p in items if p is not pairs[epoch]]
    def loss_fn(model, items, s):
        seen.extend(number(items))
        return dice.preference_loss(model, items, s)
    train_dpo(run, pairs, steps=99, lr=1e-4, loss_fn=loss_fn, keep=keep)
    assert asked == [(0, [0, 1, 2, 3, 4, 5]), (1, [1, 2, 3, 4, 5]), (2, [2, 3, 4, 5])]
    assert sorted(seen[:5]) == [1, 2, 3, 4, 5] and sorted(seen[5:9]) == [2, 3, 4, 5]
    assert sorted(seen[9:]) == [3, 4, 5] and len(run.metrics) == 12
