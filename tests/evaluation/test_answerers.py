"""Models that answer: limits and stops, seeds, vLLM's calls, endpoints, names and identities."""

import importlib.metadata
import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from slimepo.errors import InputError
from slimepo.evaluation import answerers
from slimepo.evaluation.answerers import (
    Ask,
    EndpointModel,
    HFModel,
    Turn,
    model_name,
    open_answerer,
    open_hf,
    room,
    weights_hash,
)
from slimepo.evaluation.judge.client import Retries
from slimepo.model.chat import load_chat_model
from tests.evaluation.mock_judge import Fail, MockJudge, Say

GREEDY = [
    Ask([{"role": "user", "content": text}], 0.0, 12)
    for text in ("Tell me a story.", "Tell me a tale!!", "Who is Lily?")
]
SAMPLED = [Ask(ask.messages, 0.7, 12, seed) for seed, ask in enumerate(GREEDY)]


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> HFModel:
    """The tiny real Llama that writes stories."""
    return open_hf(str(llama_folder), batch_rows=8)


def said(model: Any, asks: list[Ask]) -> list[Turn]:
    return list(model.answer(asks))


def test_answers_stop_at_the_limit_and_count_their_tokens(llama: HFModel) -> None:
    turns = said(llama, GREEDY)
    assert [(turn.tokens, turn.stop) for turn in turns] == [(12, "length")] * 3
    assert all(turn.text for turn in turns)
    assert turns[0].prompt_tokens == len(answerers.prompt_ids(llama.loaded.chat, GREEDY[0].messages))


def test_greedy_answers_do_not_depend_on_their_company(llama: HFModel) -> None:
    assert said(llama, GREEDY) == [said(llama, [ask])[0] for ask in GREEDY]


def test_sampled_answers_depend_on_their_own_seed_only(llama: HFModel) -> None:
    together = said(llama, SAMPLED)
    assert together[1:] == said(llama, SAMPLED[1:])
    assert said(llama, [Ask(SAMPLED[0].messages, 0.7, 12, 77)])[0].text != together[0].text


def test_a_full_context_is_said(llama: HFModel) -> None:
    # The context is 256 tokens, one a character.
    long = Ask([{"role": "user", "content": "a" * 225}], 0.0, 100)
    longer = Ask([{"role": "user", "content": "a" * 400}], 0.0, 100)
    cut, none = said(llama, [long, longer])
    assert cut.stop == "context"
    assert 0 < (cut.tokens or 0) < 30
    assert (none.text, none.tokens, none.stop) == ("", 0, "context")


def test_room_behind_a_prompt() -> None:
    ask = Ask([], 0.0, 100)
    assert [room(None, [1] * 9, ask), room(150, [1] * 9, ask), room(50, [1] * 9, ask)] == [100, 100, 41]


def test_a_conversation_the_template_refuses_is_an_input_error(llama: HFModel) -> None:
    chat = replace(llama.loaded.chat, template="{{ raise_exception('no system, please') }}")
    with pytest.raises(InputError, match=r"cannot be asked.*no system, please"):
        answerers.prompt_ids(chat, GREEDY[0].messages)


def test_the_hash_of_a_folder_changes_with_its_weights(llama_folder: Path, tmp_path: Path) -> None:
    source = llama_folder
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    assert weights_hash(str(source)) == weights_hash(str(copy))
    weights = copy / "model.safetensors"
    weights.chmod(0o644)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_hash(str(source)) != weights_hash(str(copy))


def test_names_that_answers_are_filed_under(tmp_path: Path) -> None:
    stage = tmp_path / "my-run" / "slime"
    (stage / "model").mkdir(parents=True)
    (stage / "stage.json").write_text("{}")
    assert model_name(str(stage)) == "my-run-slime"
    assert model_name(str(stage / "model")) == "my-run-slime"
    assert model_name("org/Model-1B") == "Model-1B"
    assert model_name("org/big@http://h/v1") == "org--big"


def test_an_adapter_answers_as_it_was_trained(llama_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    source = str(llama_folder)
    plain = load_chat_model(source)
    trained = get_peft_model(
        load_chat_model(source).model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    trained.save_pretrained(tmp_path)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = trained.eval()(input_ids=ids).logits
        loaded = load_chat_model(str(tmp_path))
        torch.testing.assert_close(loaded.model.eval()(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
        assert (plain.model(input_ids=ids).logits - expected).abs().max() > 0.1
    assert not hasattr(loaded.model, "peft_config") or not loaded.model.peft_config


class FakeVLLM(ModuleType):
    """vLLM's offline interface, as far as it is used: LLM(...).generate(prompts, parameters)."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.made: list[dict[str, Any]] = []
        self.asked: list[tuple[Any, Any]] = []
        self.SamplingParams = lambda **values: SimpleNamespace(**values)

    def LLM(self, **values: Any) -> Any:
        self.made.append(values)
        return self

    def generate(self, prompts: Any, parameters: Any, use_tqdm: bool) -> Any:
        self.asked += list(zip(prompts, parameters, strict=True))
        ids = [[5, 6, 7][: p.max_tokens] for p in parameters]
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=i, finish_reason="stop" if len(i) == 3 else "length")]
            )
            for i in ids
        ]


def test_vllm_gets_ids_limits_ends_and_a_seed_each(llama: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    model = open_answerer(llama.name, backend="vllm")
    asks = [
        SAMPLED[1],
        Ask(GREEDY[0].messages, 0.0, 2),
        Ask([{"role": "user", "content": "a" * 400}], 0.0, 9),
    ]
    turns = said(model, asks)
    assert model.identity["backend"] == "vllm 0.0"
    assert [turn.stop for turn in turns] == ["stop", "length", "context"]
    assert [turn.tokens for turn in turns] == [3, 2, 0]
    (first, sampling), (_, greedy) = vllm.asked
    assert first == {"prompt_token_ids": answerers.prompt_ids(llama.loaded.chat, asks[0].messages)}
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.7, 1, 12)
    assert (greedy.temperature, greedy.max_tokens) == (0.0, 2)
    assert sampling.stop_token_ids == [llama.loaded.chat.end_id]
    said(model, asks[:1])
    assert len(vllm.made) == 1


def test_the_dtype_is_what_was_asked_for(llama: HFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    half = open_answerer(llama.name, dtype="bfloat16")
    assert isinstance(half, HFModel)
    assert {parameter.dtype for parameter in half.loaded.model.parameters()} == {torch.bfloat16}
    assert (half.identity["dtype"], llama.identity["dtype"]) == ("bfloat16", "float32")
    vllm = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    model = open_answerer(llama.name, backend="vllm", dtype="bfloat16")
    said(model, GREEDY[:1])
    assert (vllm.made[0]["dtype"], model.identity["dtype"]) == ("bfloat16", "bfloat16")


def test_backends_that_do_not_fit_are_refused(llama: HFModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown backend 'tgi'"):
        open_answerer(llama.name, backend="tgi")
    with pytest.raises(InputError, match="--model-key-variable KEY is for endpoints"):
        open_answerer(llama.name, key_variable="KEY")
    with pytest.raises(InputError, match="is an endpoint"):
        open_answerer("m@http://h/v1", backend="hf")
    with pytest.raises(InputError, match="--dtype bfloat16 is for local models"):
        open_answerer("m@http://h/v1", dtype="bfloat16")
    with pytest.raises(InputError, match="NAME@URL"):
        open_answerer("http://h/v1")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter"):
        open_answerer(str(tmp_path), backend="vllm")
    with pytest.raises(InputError, match="vLLM is not installed"):
        open_answerer(llama.name, backend="vllm")


def test_an_endpoint_answers_in_order_with_its_seeds(mock: MockJudge) -> None:
    model = open_answerer(mock.judge, concurrency=1)
    mock.script += [Say("one"), Say("two", "length"), Say("three")]
    turns = said(model, SAMPLED)
    assert [(turn.text, turn.stop, turn.tokens) for turn in turns] == [
        ("one", "stop", 3), ("two", "length", 3), ("three", "stop", 5),
    ]  # fmt: skip
    assert [(call["seed"], call["temperature"], call["max_tokens"]) for call in mock.calls] == [
        (0, 0.7, 12), (1, 0.7, 12), (2, 0.7, 12),
    ]  # fmt: skip


def test_an_endpoints_failure_is_no_answer(mock: MockJudge) -> None:
    mock.script += [Fail(400, "too long"), Say("fine")]
    model = EndpointModel(answerers.parse_endpoint(mock.judge), Retries(attempts=1), 1)
    turns = said(model, GREEDY[:2])
    assert (turns[0].failed, turns[1].failed) == (True, False)
    mock.script.append(Fail(401, "who are you"))
    with pytest.raises(InputError, match=r"the model refuses: .*who are you"):
        said(model, GREEDY[:1])


def test_what_an_endpoint_has_answered_before_it_refuses_is_kept(mock: MockJudge, tmp_path: Path) -> None:
    journal = tmp_path / "calls.jsonl"
    mock.script += [Say("one"), Fail(402, "no credit")]
    with pytest.raises(InputError, match="no credit"):
        said(open_answerer(mock.judge, concurrency=1, journal=journal), GREEDY[:3])
    mock.script += [Say("two"), Say("three")]
    turns = said(open_answerer(mock.judge, concurrency=1, journal=journal), GREEDY[:3])
    assert [turn.text for turn in turns] == ["one", "two", "three"]
    assert len(mock.calls) == 4


def test_an_endpoints_thoughts_and_refusals_of_settings_are_told(mock: MockJudge) -> None:
    mock.refuses = {"temperature": "temperature is deprecated for this model"}
    # The refused call takes the first of the script with it.
    mock.script += [Say(""), Say("<think>hm</think>\n\n4")]
    turn = said(open_answerer(mock.judge, concurrency=1), GREEDY[:1])[0]
    assert (turn.text, turn.thoughts, turn.without) == ("4", "hm", ("temperature",))


@pytest.mark.parametrize(
    ("reply", "failed"),
    [
        (Say(None, "length"), True),
        (Say("<think>and on", "length"), True),
        (Say("half", "content_filter"), True),
        (Say("half", "length"), False),
        (Say("", "stop"), False),
    ],
    ids=str,
)
def test_what_was_cut_off_before_the_answer_is_none(mock: MockJudge, reply: Say, failed: bool) -> None:
    mock.script.append(reply)
    assert said(open_answerer(mock.judge, concurrency=1), GREEDY[:1])[0].failed == failed
