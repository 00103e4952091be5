"""Which attention path trains: refused where it cannot be, measured where there is a choice."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slimepo.errors import InputError
from slimepo.model.attention.choose import AttentionShape, attention_shape, choose_attention, fastest
from slimepo.model.attention.path import AttentionCall, AttentionPath
from slimepo.model.attention.sdpa import one_by_one, side_by_side
from slimepo.model.attention.table import PATHS
from slimepo.model.logps import install_logps
from slimepo.model.tryout import choose_layout
from slimepo.training.config import PreferenceConfig
from tests.tiny import tiny_model

SHAPE = AttentionShape(4, 2, 8, ((None, 1), (16, 2)), None, 0.0, torch.float32, torch.device("cpu"))
PAIRS = [(20, 30, 40), (5, 60, 9)]


def test_on_a_cpu_auto_goes_by_length_and_says_so() -> None:
    model = tiny_model()
    install_logps(model)
    assert choose_attention(model)[0] == "by_length"
    layout, reason = choose_layout(model, "auto")
    assert layout == "shared"
    assert reason.endswith("attention by_length: side by side where sequences are short, else one by one")
    assert "attention one_by_one: as asked" in choose_layout(model, "auto", attention="one_by_one")[1]
    assert model.config._attn_implementation == "slimepo_one_by_one"


@pytest.mark.parametrize(
    ("path", "reason"),
    [("flex", "no backward pass on a CPU"), ("varlen", "needs a CUDA device"), ("dense", "is unknown")],
)
def test_a_path_that_cannot_be_is_refused(path: str, reason: str) -> None:
    model = tiny_model()
    install_logps(model)
    with pytest.raises(InputError, match=reason):
        choose_layout(model, "auto", attention=path)


def test_a_config_that_cannot_be_is_refused_before_a_model_is_there() -> None:
    with pytest.raises(InputError, match="attention = 'dense' is unknown: give one of auto, side_by_side"):
        PreferenceConfig(attention="dense")
    with pytest.raises(InputError, match="attention = 'flex' is for packed rows"):
        PreferenceConfig(attention="flex", layout="padded")


@pytest.mark.parametrize(
    ("architecture", "sizes", "windows"),
    [
        ("llama", {}, ((None, 2),)),
        ("mistral", {"sliding_window": 7}, ((7, 2),)),
        ("qwen3", {}, ((None, 2),)),
        (
            "gemma3_text",
            {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
            ((7, 1), (None, 1)),
        ),
    ],
)
def test_the_shape_is_read_from_the_model(architecture: str, sizes: dict[str, Any], windows: Any) -> None:
    shape = attention_shape(tiny_model(architecture, attention_dropout=0.1, **sizes), torch.bfloat16)
    assert shape == AttentionShape(4, 2, 8, windows, None, 0.1, torch.bfloat16, torch.device("cpu"))
    assert attention_shape(tiny_model("gemma2", attn_logit_softcapping=30.0)).softcap == 30.0


def test_the_faster_of_two_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(call: AttentionCall) -> Tensor:
        time.sleep(0.05)
        return side_by_side(call)

    monkeypatch.setitem(PATHS, "slow", AttentionPath(slow))
    path, words = fastest(SHAPE, ("slow", "one_by_one"), PAIRS)
    assert path == "one_by_one"
    assert words.startswith("for 164 tokens slow ")
    # 3 layers, of which 2 have a window.
    assert float(words.split("slow ")[1].split(" ms")[0]) > 150
    assert fastest(SHAPE, ("one_by_one", "slow"), PAIRS)[0] == "one_by_one"


def without_the_window(call: AttentionCall) -> Tensor:
    return one_by_one(call._replace(window=None))


def window_off_by_one(call: AttentionCall) -> Tensor:
    return one_by_one(call._replace(window=call.window and call.window + 1))


def sees_the_chosen_answer(call: AttentionCall) -> Tensor:
    prompt, responses = call.packing["groups"][0]
    whole = (prompt, [(responses[0][0], sum(length for _, length in responses))])
    return one_by_one(call._replace(packing={**call.packing, "groups": [whole, *call.packing["groups"][1:]]}))


@pytest.mark.parametrize("wrong", [without_the_window, window_off_by_one, sees_the_chosen_answer])
def test_one_that_computes_something_else_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    def dawdling(call: AttentionCall) -> Tensor:
        time.sleep(0.02)
        return side_by_side(call)

    monkeypatch.setitem(PATHS, "dawdling", AttentionPath(dawdling))
    monkeypatch.setitem(PATHS, "wrong", AttentionPath(wrong))
    for dtype in (torch.float32, torch.bfloat16):
        path, words = fastest(replace(SHAPE, dtype=dtype), ("dawdling", "wrong"), PAIRS)
        assert path == "dawdling"
        assert "not wrong: differs by " in words


def failing(call: AttentionCall) -> Tensor:
    raise RuntimeError("no kernel image\nand a long trace")


def test_one_that_fails_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATHS, "failing", AttentionPath(failing))
    path, words = fastest(SHAPE, ("side_by_side", "failing", "varlen"), PAIRS)
    assert path == "side_by_side"
    assert words.endswith(
        "; not failing: fails: no kernel image; not varlen: variable-length flash attention needs a CUDA device"
    )


def test_one_that_fails_on_long_rows_alone_is_left_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def short_alone(call: AttentionCall) -> Tensor:
        if call.query.shape[2] == sum(map(sum, PAIRS)):
            raise torch.OutOfMemoryError("no memory left")
        return side_by_side(call)

    monkeypatch.setitem(PATHS, "short_alone", AttentionPath(short_alone))
    path, words = fastest(SHAPE, ("side_by_side", "short_alone"), PAIRS)
    assert path == "side_by_side"
    assert words.endswith("; not short_alone: fails: no memory left")


def test_a_path_asked_for_that_fails_or_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(sliding_window=7, architecture="mistral")
    for path, words in ((without_the_window, "differs by"), (failing, "fails: no kernel image;")):
        monkeypatch.setitem(PATHS, "varlen", AttentionPath(path, obstacle=lambda _: None))
        with pytest.raises(InputError, match=f"attention = 'varlen' cannot be used here: {words}"):
            choose_attention(model, "varlen")
    monkeypatch.setitem(PATHS, "varlen", AttentionPath(one_by_one, obstacle=lambda _: None))
    assert choose_attention(model, "varlen") == ("varlen", "as asked")
