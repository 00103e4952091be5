"""Measures without a judge, by hand and on the tiny real Llama."""

import json
import math
from itertools import chain
from pathlib import Path
from statistics import fmean

import pytest
import torch
from rich.console import Console

from slimepo.errors import InputError
from slimepo.evaluation.answerers import prompt_ids
from slimepo.evaluation.basics import generation_measures, measure_basics, show_basics
from slimepo.model.chat import ChatModel, load_chat_model
from tests.data.conftest import encode_response
from tests.evaluation.conftest import printed


def test_generation_measures_by_hand() -> None:
    texts = ["a b a b", "c", "x y z x y z x y z"]
    figures = generation_measures(texts, [[1] * 4, [1], [1] * 10], [True, True, False])
    # 14 words, 6 of them different; 11 pairs: ab, ba, xy, yz, zx; 9 triples: aba, bab, xyz, yzx, zxy.
    assert figures["distinct_1"] == pytest.approx(6 / 14)
    assert figures["distinct_2"] == pytest.approx(5 / 11)
    assert figures["distinct_3"] == pytest.approx(5 / 9)
    # 4-grams: "a b a b" has one; the third text has six, of which xyzx, yzxy and zxyz are different.
    assert figures["repetition"] == pytest.approx((0 + 0.5) / 2)
    assert figures["end_rate"] == pytest.approx(2 / 3)
    assert (figures["mean_tokens"], figures["median_tokens"]) == (5, 4)


def test_texts_too_short_for_a_measure_give_none() -> None:
    figures = generation_measures(["one", ""], [[1], [2]], [True, True])
    assert math.isnan(figures["distinct_2"])
    assert math.isnan(figures["repetition"])


SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    story = "Once upon a time, there was a little girl named Lily."
    rows = [
        {"prompt": "Tell me a story.", "chosen": story, "rejected": "Zq xv jk qqq zzz xxkq."},
        {"prompt": "Tell me more.", "chosen": "Zq xv jk qqq zzz.", "rejected": story},
        {"prompt": "And then?", "chosen": "She was happy.", "rejected": "kkjq zx"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def logps(loaded: ChatModel, prompt: str, answer: str) -> list[float]:
    """Of each token of the answer and its end, from the model's own logits."""
    asked, said = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
    start = prompt_ids(loaded.chat, asked)  # type: ignore[arg-type]
    ids = encode_response(loaded.chat, asked, said)  # type: ignore[arg-type]
    with torch.no_grad():
        found = loaded.model(torch.tensor([start + ids])).logits[0].double().log_softmax(-1)
    return [float(found[len(start) - 1 + i, token]) for i, token in enumerate(ids)]


def test_figures_are_those_of_the_models_own_logits(
    llama_folder: Path, pairs: Path, console: Console
) -> None:
    name = str(llama_folder)
    loaded = load_chat_model(name)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    chosen, rejected = ([logps(loaded, row["prompt"], row[side]) for row in rows] for side in SIDES)
    figures = measure_basics(name, str(pairs), console, samples=2, max_new_tokens=8)
    assert (figures["pairs"], figures["generations"], figures["mean_tokens"]) == (3, 2, 8)
    preferred = [fmean(a) > fmean(b) for a, b in zip(chosen, rejected, strict=True)]
    assert figures["accuracy"] == pytest.approx(fmean(preferred))
    # Every token counts alike, whatever the length of its answer.
    assert figures["chosen_perplexity"] == pytest.approx(math.exp(-fmean(chain(*chosen))), rel=1e-5)
    show_basics(figures, console)
    assert "chosen_perplexity" in printed(console)
    assert "end_rate" not in measure_basics(name, str(pairs), console, samples=0)


def test_rows_that_are_not_measured_are_told(llama_folder: Path, tmp_path: Path, console: Console) -> None:
    rows = [
        {"prompt": "a", "response_a": "b", "response_b": "c", "preferred": verdict}
        for verdict in ("a", "tie")
    ]
    rows.append({"prompt": "a " * 200, "chosen": "b", "rejected": "c"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measure_basics(
        str(llama_folder), str(tmp_path / "pairs.jsonl"), console, samples=0, max_length=64
    )
    assert found["pairs"] == 1
    told = printed(console)
    assert "note: 1 tie left out" in told
    assert "note: 1 of 2 rows dropped" in told


def test_pairs_that_are_all_too_long_are_an_error(llama_folder: Path, pairs: Path, console: Console) -> None:
    model = str(llama_folder)
    with pytest.raises(InputError, match="no pair is left to score"):
        measure_basics(model, str(pairs), console, max_length=10)
