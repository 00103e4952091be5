"""`slimepo relabel`: from answers to pairs with labels, and what is refused."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimepo.data.chat import chat_format
from slimepo.data.render import encode_prompt
from slimepo.onpolicy.dual import solve_dual
from slimepo.pipeline.pairs.relabel import Answered, labelled, log_probs, log_ratios, read_answers
from tests.command import Done, slimepo
from tests.tiny import letter_tokenizer, tiny_model

# Two answers with r = (1, 0) and g = (-1, 1); beta = 1 and the bound 1/2 give them the odds 1 to 3.
ROW = {"prompt": "q", "answers": ["a", "b"], "good": [1, 0], "short": [-1, 1]}


def relabelled(
    folder: Path, rows: list[dict[str, Any]], *options: object
) -> tuple[Done, list[dict[str, Any]]]:
    file, out = folder / "answers.jsonl", folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = slimepo("relabel", file, "--out", out, "--beta", 1, *options)
    return done, [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []


OPTIONS = ("--reward", "good", "--constraint", "short", "--bound", 0.5)


def test_worked_numbers_as_weights(tmp_path: Path) -> None:
    done, pairs = relabelled(tmp_path, [ROW], *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "short: 0 before, 0.5 expected, bound 0.5: multiplier 1.049" in done.stdout
    assert "loss_options: {beta: 1}" in done.stdout
    # sigmoid(s_b - s_a) with s = r + lambda g: s_b - s_a = 2 lambda - 1 = ln 3.
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs] == [
        ("b", "a"),
        ("a", "b"),
    ]
    np.testing.assert_allclose([row["weight"] for row in pairs], [0.75, 0.25], atol=1e-6)
    # The policy that is optimal for these labels is the constrained one: its log-ratio over beta has the same odds.
    assert math.log(0.75 / 0.25) == pytest.approx(2 * 1.0493061 - 1, abs=1e-6)


def test_drawn_labels_come_as_often_as_the_weights_say(tmp_path: Path) -> None:
    options = (*OPTIONS, "--labels", "drawn", "--seed", 3)
    done, pairs = relabelled(tmp_path, [ROW] * 400, *options)
    assert done.returncode == 0, done.stderr
    assert len(pairs) == 400
    assert "weight" not in pairs[0]
    share = np.mean([row["chosen"][0]["content"] == "b" for row in pairs])
    assert share == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 400))
    assert relabelled(tmp_path, [ROW] * 400, *options)[1] == pairs


def test_rewards_of_ones_own_and_what_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def good(prompt, completions, row):\n    return [len(c) for c in completions]\n"
        "def short(prompt, completions, row):\n    return [-len(c) for c in completions]\n"
    )
    row = {"prompt": "q", "answers": ["abc", "", "ab", "a", "abc", "x"], "finished": [True] * 5 + [False]}
    done, pairs = relabelled(
        tmp_path, [row], "--reward", f"{tmp_path}/own.py:good", "--constraint", f"{tmp_path}/own.py:short",
        "--bound", -1.5, "--pairs", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 answers left out" in done.stdout
    assert "as few as 4 answers a prompt" in done.stdout
    assert {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs} == {
        ("abc", "ab"), ("ab", "abc"),
    }  # fmt: skip


def test_pecan_scores_are_log_ratios_of_whole_answers(tmp_path: Path) -> None:
    tokenizer, models = letter_tokenizer(), []
    for seed in (0, 1):
        models.append(tiny_model(seed=seed).eval())
        models[-1].save_pretrained(tmp_path / f"model-{seed}")
        tokenizer.save_pretrained(tmp_path / f"model-{seed}")
    row = {"prompt": "q", "answers": ["ab", "c", "a"]}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
    answered, _, _ = read_answers(tmp_path / "answers.jsonl")
    names = [str(tmp_path / f"model-{seed}") for seed in (0, 1)]
    (found,) = log_ratios(names[1], log_probs(names[0], answered), answered, 0.5)
    start = encode_prompt(chat_format(tokenizer), answered[0].prompt)
    for text, score in zip(row["answers"], found, strict=True):
        said = tokenizer.convert_tokens_to_ids([*text, "<end>"])
        ids = torch.tensor([[*start, *said]])
        now, then = (
            model(ids)
            .logits[0, len(start) - 1 : -1]
            .log_softmax(-1)
            .gather(1, torch.tensor(said)[:, None])
            .sum()
            for model in (models[1], models[0])
        )
        assert score == pytest.approx(0.5 * (now - then).item(), abs=1e-5)
    done = slimepo(
        "relabel", tmp_path / "answers.jsonl", "--out", tmp_path / "pairs.jsonl", "--method", "pecan",
        "--reward", names[1], "--constraint", names[1], "--bound", 0.001, "--reference", names[0],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Of what is known but for a number a prompt, a bound is on what is gained over the reference.
    before = re.search(rf"{re.escape(names[1])}: (\S+) before, ", " ".join(done.stdout.split()))
    assert before is not None
    assert float(before[1]) == pytest.approx(0, abs=1e-6)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "answers": ["a", "b", "", "c"], "finished": [True, True, True, False]},
        {"prompt": "q", "answers": ["a", "b"], "finished": [True, False]},
        {"prompt": "r", "answers": []},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answered, cut, alone = read_answers(file)
    assert ([each.answers for each in answered], cut, alone) == ([["a", "b"]], 3, 2)


def test_labels_keep_the_constraint_that_the_dual_promises() -> None:
    """The optimum of the weighted labels is the constrained policy, whichever pairs they are of."""
    random = np.random.default_rng(0)
    r, g = random.normal(size=6), random.normal(size=(1, 6))
    dual = solve_dual([r], [g], [0.3], beta=0.5)
    answered = [Answered("1", [{"role": "user", "content": "q"}], list("abcdef"), list(range(6)), {})]
    rows = labelled(answered, [r], [g], dual, pairs=3)
    policy = np.exp((r + dual.multipliers @ g) / 0.5)
    odds = dict(zip("abcdef", policy, strict=True))
    for row in rows:
        one, other = (odds[row[side][0]["content"]] ** 0.5 for side in ("chosen", "rejected"))
        assert row["weight"] == pytest.approx(one / (one + other))


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, ("--reward", "good", "--constraint", "short", "--bound", 1.0), "the bound 1 of 'short' is out of reach"),
        ({}, (*OPTIONS, "--bound", 0.1), "1 of --constraint and 2 of --bound"),
        ({}, ("--reward", "good", "--constraint", "short", "--bound", "nan"), "--bound: give a finite number"),
        ({}, (*OPTIONS, "--beta", 0), "--beta = 0"),
        ({}, (*OPTIONS, "--pairs", 0), "--pairs"),
        ({}, (*OPTIONS, "--method", "can"), "--method"),
        ({}, (*OPTIONS, "--labels", "hard"), "--labels"),
        ({}, (*OPTIONS, "--seed", 0), "--seed is of drawn labels"),
        ({"system": "Be kind."}, OPTIONS, "'system' is not read beside a prompt"),
        ({}, (*OPTIONS, "--method", "pecan"), "needs --reference"),
        ({}, (*OPTIONS, "--reference", "m"), "--reference is PeCAN's"),
        ({}, ("--reward", "checker", "--constraint", "short", "--bound", 0.5), "'checker'"),
        ({}, ("--reward", "none.py:f", "--constraint", "short", "--bound", 0.5), "none.py"),
        ({"good": [1]}, OPTIONS, "'good' must be a list of numbers, one an answer"),
        ({"good": [1, "x"]}, OPTIONS, "'good' must be a list of numbers, one an answer"),
        ({"answers": "a"}, OPTIONS, "'answers' must be a list of texts"),
        ({"answers": ["a"]}, OPTIONS, "no prompt has two answers"),
        ({"answers": ["a", "a"]}, OPTIONS, "there is no pair"),
        ({"finished": [True]}, OPTIONS, "'finished' says something of 1 answers of 2"),
        ({"prompt": None}, OPTIONS, "answers.jsonl:1"),
    ],
)  # fmt: skip
def test_what_is_refused(
    changes: dict[str, Any], options: tuple[object, ...], words: str, tmp_path: Path
) -> None:
    done, pairs = relabelled(tmp_path, [ROW | changes], *options)
    assert (done.returncode, len(done.stderr.strip().splitlines()), pairs) == (2, 1, []), done
    assert words in done.stderr


def test_a_file_that_is_not_there_says_what_writes_it(tmp_path: Path) -> None:
    done = slimepo("relabel", tmp_path / "none.jsonl", "--out", tmp_path / "a", *OPTIONS)
    assert done.returncode == 2
    assert "slimepo generate --samples" in done.stderr
