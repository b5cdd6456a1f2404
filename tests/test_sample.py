"""sample.py: what it prints, what it writes, and what it refuses before any work is done."""
import dataclasses
import io
import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import dice
import model as models
import sample
from data.tokenizer import Tokenizer

STORIES = Path(__file__).resolve().parent.parent.parent / "shared" / "real" / "stories260k"

@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A checkpoint of random weights in the tiny world's shape: it answers nonsense, of all kinds."""
    directory = tmp_path_factory.mktemp("sample") / "policy"
    config, tokenizer = models.tiny_model()
    models.write_checkpoint(directory, config, dice.new_model(config, 0).state_dict(), tokenizer)
    return str(directory)

def run(capsys, *argv):
    """(exit code, standard output, standard error)"""
    code = sample.main(["--device", "cpu", *map(str, argv)])
    return code, *capsys.readouterr()

# ---------------------------------------------------------------------------------------------- One prompt
@pytest.mark.skipif(not STORIES.exists(), reason="no real model here")
def test_a_real_model_goes_on_with_a_story(capsys):
    code, out, _ = run(capsys, "--model", STORIES, "--raw", "--prompt", "Once upon a time",
                       "--temperature", 0, "--max-new-tokens", 36)
    assert (code, out) == (0,  # what transformers says, too
        ", there was a little girl named Lily. She loved to play with her toys and her friends. "
        "One day, Lily's mommy told\n")

def test_a_system_message_comes_before_the_first_turn_and_the_preset_has_one(tiny_model):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for system, prompt in (("", "Hi"), ("Be brief.", turns)):
        net, tokenizer = sample.load(sample.parse(["--model", tiny_model, "--system", system])[1])
        assert sample.encode("Hi", False, net, tokenizer, "") == tokenizer.prompt(prompt)
        assert sample.encode("Hi", True, net, tokenizer, "") == tokenizer.raw("Hi")  # no chat
    argv = ["--model", "smollm2-135m-instruct"]
    assert sample.parse(argv)[1].system == models.LAPTOP["system"]
    assert sample.parse([*argv, "--system", ""])[1].system == ""

def test_options_are_those_of_dice_with_the_preset_between(tiny_model):
    s = sample.parse(["--model", "zephyr-7b", "--top-p", "0.5", "--device", "cpu"])[1]
    assert (s.sampling, s.chat, s.rows) == (dice.Sampling(temperature=0.7, top_p=0.5), "zephyr", 256)

def test_a_terminal_sees_the_same_text_in_pieces_and_another_seed_gives_another(
        capsys, monkeypatch, tiny_model):
    argv = "--model", tiny_model, "--prompt", "Hello", "--max-new-tokens", 60, "--seed", 1
    _, whole, _ = run(capsys, *argv)
    assert run(capsys, *argv, "--seed", 2)[1] != whole
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *text, end="\n", file=None, **_: (
        file or pieces.append("".join(text) + end)))
    assert sample.main(["--device", "cpu", *map(str, argv)]) == 0
    assert "".join(pieces) == whole and len(pieces) > 20

@pytest.mark.parametrize("text", ["Grüße", "漢字かな", "🙂👩‍👩‍👧", "a\ufffdb", "\ufffdx"])
def test_streaming_never_prints_half_a_character(capsys, text):
    _, tokenizer = models.tiny_model()
    ids = tokenizer.encode(text)  # a token is a byte here
    if text == "\ufffdx":  # broken: the first byte of two, then a letter
        ids = tokenizer.encode("é")[:1] + tokenizer.encode("x")
    stream, printed = sample.Stream(tokenizer), ""
    for token in ids:
        stream(token)
        printed += capsys.readouterr().out
        assert text.startswith(printed)
    assert printed == text

# ---------------------------------------------------------------------------------------------------- Chat
def test_chat_keeps_the_conversation_and_ends_with_the_input(capsys, monkeypatch, tiny_model):
    seen, prompt = [], Tokenizer.prompt  # the empty line is no turn
    def listen(self, turns):
        seen.append(list(turns))
        return prompt(self, turns)
    monkeypatch.setattr(Tokenizer, "prompt", listen)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAgain\n"))
    code, out, _ = run(capsys, "--model", tiny_model, "--max-new-tokens", 8)
    assert code == 0 and [turn["role"] for turn in seen[-1]] == ["user", "assistant", "user"]
    assert [turn["content"] for turn in seen[-1]][::2] == ["Hello", "Again"]
    assert out.startswith(seen[-1][1]["content"] + "\n")

@pytest.mark.parametrize("most, drawn, code, told", [
    (3, 3, 0, ["[cut: --max-new-tokens]"]),
    (2048, 120, 2, ["[cut: the context of 128 tokens is full]", "leave no room for an answer"])])
def test_it_says_what_has_cut_an_answer(most, drawn, code, told, capsys, monkeypatch, tiny_model):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAgain\n" if code else "Hello\n"))
    monkeypatch.setattr(dice, "generate", lambda *_, **__: iter([(0, 0, [65] * drawn, "length")]))
    found, _, err = run(capsys, "--model", tiny_model, "--max-new-tokens", most)
    assert found == code and len(err.splitlines()) == len(told)
    assert all(text in line for text, line in zip(told, err.splitlines()))
    argv = "--model", tiny_model, "--max-new-tokens", most, "--prompt", "Hello"
    assert run(capsys, *argv)[2] == told[0] + "\n"

def test_control_c_ends_a_chat_without_a_traceback(capsys, monkeypatch, tiny_model):
    def interrupted(_):
        raise KeyboardInterrupt
    monkeypatch.setattr("builtins.input", interrupted)
    assert run(capsys, "--model", tiny_model)[:2] == (0, "")

# --------------------------------------------------------------------------------------- A file of prompts
def write_prompts(path, *rows, array=False):
    """Rows as a JSON array, or as JSON lines."""
    path.write_text(json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows))
    return path

@pytest.mark.parametrize("array", [True, False])
def test_alpacaeval_form_in_the_order_of_the_file(capsys, tmp_path, tiny_model, array):
    rows = [{"instruction": " Name three\ncolours. ", "dataset": "helpful", "output": "x", "generator": "y"},
            *[{"instruction": "Grüße?"}] * 2, {"prompt": [{"role": "user", "content": "Hi"}]}]
    prompts, output = write_prompts(tmp_path / "p.json", *rows, array=array), tmp_path / "answers.json"
    code, out, told = run(capsys, "--model", tiny_model, "--prompts", prompts, "--output", output,
                          "--max-new-tokens", 12, "--rows", 2)
    answers = json.loads(output.read_text())
    assert (code, out) == (0, "") and told.endswith(": 4 answers, 4 of them cut by the length limit\n")
    assert [a["instruction"] for a in answers] == [" Name three\ncolours. ", "Grüße?", "Grüße?", "Hi"]
    assert {a["generator"] for a in answers} == {tiny_model}
    assert [a.get("dataset") for a in answers] == ["helpful", None, None, None]
    assert answers[1] == answers[2] and all(isinstance(a["output"], str) for a in answers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.json", "p.json"]
    one = run(capsys, "--model", tiny_model, "--prompt", "Grüße?", "--max-new-tokens", 12)[1]
    assert one == answers[1]["output"] + "\n"  # alone or in a batch: the same answer

def test_what_is_drawn_is_kept_and_continued_to_the_same_bytes(capsys, monkeypatch, tmp_path, tiny_model):
    prompts = write_prompts(tmp_path / "p.jsonl", *[{"instruction": f"Tell me {i}."} for i in range(9)])
    def argv(output, seed=3):
        return ("--model", tiny_model, "--prompts", prompts, "--output", tmp_path / output, "--seed", seed,
                "--max-new-tokens", 30, "--rows", 4)
    assert run(capsys, *argv("whole.json"))[0] == 0
    generate, rounds = dice.generate, []
    def interrupted(*args, rows, **others):
        rounds.append((len(args[1]), rows))
        for count, answer in enumerate(generate(*args, rows=rows, **others)):
            if (len(rounds), count) in ((1, 3), (2, 2)):
                raise KeyboardInterrupt
            if len(rounds) > 2 and rows > 2 and count == 1:
                raise torch.OutOfMemoryError("out of memory")
            yield answer
    monkeypatch.setattr(dice, "generate", interrupted)
    part = tmp_path / "cut.json.part"
    assert run(capsys, *argv("cut.json"))[0] == 130
    kept = part.read_bytes()
    assert not (tmp_path / "cut.json").exists()
    part.write_bytes(kept + b'{"index": 8, "i')  # cut short by a kill
    assert run(capsys, *argv("cut.json"))[0] == 130
    assert run(capsys, *argv("cut.json"))[0] == 0
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert rounds == [(9, 4), (6, 4), (4, 4), (3, 3), (2, 2)] and not part.exists()
    part.write_bytes(kept)
    (tmp_path / "cut.json").unlink()
    assert f"{part}: keeps answers of another model" in refused(capsys, *argv("cut.json", seed=4))
    weights = Path(tiny_model) / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-2] + b"\0\0")
    assert f"{part}: keeps answers of another model" in refused(capsys, *argv("cut.json"))
    weights.write_bytes(before)
    part.write_text("mine")
    assert f"{part}: keeps" in refused(capsys, *argv("cut.json")) and part.read_text() == "mine"

def test_the_output_is_opened_before_anything_is_drawn(capsys, monkeypatch, tmp_path, tiny_model):
    monkeypatch.setattr(dice, "generate", lambda *_, **__: pytest.fail("it has begun to draw"))
    prompts = write_prompts(tmp_path / "p.jsonl", {"instruction": "Hi"})
    with suppress(OSError):
        run(capsys, "--model", tiny_model, "--prompts", prompts, "--output", tmp_path / ("x" * 300))
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]

# ----------------------------------------------------------- Refusals: exit code 2, one line, nothing done
def refused(capsys, *argv):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and err.startswith("sample.py: ")
    return err

def test_an_existing_output_is_refused_before_the_model_is_looked_at(capsys, tmp_path):
    output = tmp_path / "answers.json"
    output.write_text("mine")
    err = refused(capsys, "--model", "no/such/model", "--prompts", "none", "--output", output)
    assert str(output) in err and output.read_text() == "mine"

def test_a_prompt_longer_than_the_context_is_named_by_file_and_line(capsys, tmp_path, tiny_model):
    prompts = write_prompts(tmp_path / "p.jsonl", {"instruction": "Hi"}, {"instruction": "long " * 100})
    err = refused(capsys, "--model", tiny_model, "--prompts", prompts, "--output", tmp_path / "a.json")
    assert f"{prompts} line 2" in err and "128" in err and not (tmp_path / "a.json").exists()

@pytest.mark.parametrize("argv, words", [
    ("--prompt a --prompts b", "--prompt and --prompts"), ("--prompts b", "--output"), ("--raw", "--raw"),
    ("--output b", "--prompts"), ("--prompt= --raw", "empty"), (f"--prompt={'long' * 100}", "context of 128"),
    ("--prompt a --temperature -1", "--temperature"), ("--prompt a --top-p 0", "--top-p"),
    ("--prompt a --max-new-tokens 0", "--max-new-tokens"), ("--prompt a --chat other", "chat"),
    ("--prompts no/such/file --output answers.json", "no/such/file"),
    ("--prompts b --output no/such/directory/answers.json", "no/such/directory"),
    ("--prompt a --model=", "--model NAME"), ("--prompt a --model no/such/model", "no/such/model"),
    ("--prompt a --device abacus", "abacus"),
    ("--prompt a --temprature=2", "--temprature=2: no such option; did you mean --temperature?")])
def test_bad_input_is_one_line(capsys, tiny_model, argv, words):
    assert words in refused(capsys, "--model", tiny_model, *argv.split())

@pytest.mark.parametrize("change, told", [
    ({}, "is a reward model"), ({"id2label": {"0": "good"}}, "is a reward model"),
    ({"architectures": ["LlamaForCausalLM"]}, "no place for: score.weight")])
def test_a_reward_model_gives_no_text(capsys, tmp_path, change, told):
    config, tokenizer = models.tiny_model()
    config = dataclasses.replace(config, num_labels=1 if change else 2)
    models.write_checkpoint(tmp_path / "m", config, dice.new_model(config, 0).state_dict(), tokenizer)
    path = tmp_path / "m" / "config.json"
    names = {"architectures": ["LlamaForSequenceClassification"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names | change))
    assert told in refused(capsys, "--model", tmp_path / "m", "--prompt", "a")
