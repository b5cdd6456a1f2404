"""data/jsonl.py: any bytes are read or refused by their line."""
import json
import math

import pytest
import torch
from fuzz import damaged, dumped, fuzz, lines, loaded, mutated
from hypothesis import given
from hypothesis import strategies as st

from data import jsonl, tiny
from data.files import InputError
from data.tokenizer import read_tokenizer

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
ROWS = [
    {"prompt": "Hello", "chosen": "Good day.", "rejected": "Go.", "score_chosen": 2.5, "score_rejected": 1},
    {"instruction": "Hi", "output": ["Yes", "No"], "dataset": "x"},
    {"prompt": TURNS, "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
    {"chosen": [*TURNS, {"role": "assistant", "content": "a"}],
     "rejected": [*TURNS, {"role": "assistant", "content": "b"}]},
    {"prompt": "2 + 2?", "initial_reason_steps": "First", "chosen": " 4", "rejected": " 5"}]

@pytest.mark.parametrize("score", [10 ** 400, math.nan, -math.inf, True, "1", None])
def test_scores_that_are_no_numbers_are_refused(score, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines([ROWS[0] | {"score_chosen": score}]))
    with pytest.raises(InputError, match='line 1: "score_chosen" and "score_rejected" must both be numbers'):
        jsonl.read_preferences(tmp_path / "rows.jsonl")

ALPACA = {"instruction": "Translate.", "output": ["Hallo", "Hello"]}
TEXT, USER = "Translate.\n\nHi", {"role": "user", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}

@pytest.mark.parametrize("row, expected", [
    (ALPACA | {"input": "", "system": None, "history": []}, "Translate."), (ALPACA | {"input": "Hi"}, TEXT),
    (ALPACA | {"input": "Hi", "system": "Be brief."}, [SYSTEM, {"role": "user", "content": TEXT}]),
    (ROWS[0] | {"system": "Be brief."}, TURNS), (ROWS[2] | {"prompt": [USER], "system": "Be brief."}, TURNS),
    (ROWS[3] | {"prompt": "Hello", "system": "Be brief."}, TURNS),
    ({"instruction": "Hi", "dataset": "koala", "generator": "x", "output": "Yes"}, "Hi"),  # AlpacaEval
    (ROWS[0] | {"prompt_id": "0f", "messages": [USER], "source": "x"}, "Hello"),  # UltraFeedback
    (ROWS[2] | {"system": "Be kind."}, None), (ROWS[2] | {"input": "Hi"}, None),
    (ROWS[0] | {"input": "Hi"}, None), (ALPACA | {"input": ["Hi"]}, None),
    (ALPACA | {"system": 1}, None),
    *[(ALPACA | {name: value}, None) for name in ("history", "context", "tools", "images", "system_prompt")
      for value in ("a", ["a"])]])
def test_all_fields_of_a_prompt_are_read_or_refused(row, expected, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines([ROWS[0], row]))
    if expected is None:
        with pytest.raises(InputError, match=f"line 2: {list(row)[-1]} would be left out of the prompt"):
            jsonl.read_prompts(tmp_path / "rows.jsonl")
    else:
        assert jsonl.read_prompts(tmp_path / "rows.jsonl")[-1][1] == expected

def test_any_json_lines_are_read_or_refused(tmp_path):
    path, changed = tmp_path / "rows.jsonl", mutated(ROWS, 2).filter(bool)
    tiny.write_tokenizer(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    ends = st.sampled_from([b"\r\n", b"\r", b"\n\n", b" \n", b"\x0b\n", "\u2028".encode()])
    starts = st.sampled_from([b"", b"\xef\xbb\xbf", b"\0", b"[", b"\xff\xfe"])
    @fuzz(150)
    @given(changed.map(lines) | changed.map(dumped) | damaged(lines(ROWS)) | st.binary(max_size=40)
           | st.builds(lambda rows, end, start: start + lines(rows, end), changed, ends, starts))
    def check(content):
        path.write_bytes(content)
        prompts = loaded(lambda: jsonl.read_prompts(path), str(path))
        pairs = loaded(lambda: jsonl.read_preferences(path), str(path))
        prompts = [prompt for _, prompt in prompts or []]
        assert len({json.dumps(prompt) for prompt in prompts}) == len(prompts)
        for pair in pairs or []:
            assert isinstance(pair.chosen, str) and isinstance(pair.rejected, str)
            torch.tensor(pair.scores or (), dtype=torch.float32)
            prompts.append(pair.prompt)
        for prompt in prompts:
            tokenizer.decode(tokenizer.prompt(prompt))
            assert json.loads(json.dumps(prompt)) == prompt
    check()

@pytest.mark.parametrize("start, end, told", [
    (b"", b"\r\n", None), (b"", b"\n\n  \n", None), (b"", b"\r", None),
    (b"\xef\xbb\xbf", b"\n", "line 1: .*: Unexpected UTF-8 BOM"), (b"\xff\xfe", b"\n", "not UTF-8"),
    (b"\0", b"\n", "line 1: not valid JSON"), (b"", b"", "line 1: not valid JSON"),
    (b'{"prompt": %s}\n' % (b"[" * 200 + b"]" * 200), b"\n", "too deep"),
    (b'{"prompt": 1%s}\n' % (b"0" * 9999), b"\n", "line 1: not valid JSON"),
    (b'{"prompt": "a", "x": {"y": 1, "y": 1}}\n', b"\n", "line 1: .*: a key is there twice .* 'y'")])
def test_line_ends_marks_and_depth(start, end, told, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(start + lines(ROWS, end))
    if told:
        with pytest.raises(InputError, match=told):
            jsonl.read_preferences(path)
    else:
        assert len(jsonl.read_preferences(path)) == len(ROWS)
