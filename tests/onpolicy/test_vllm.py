"""vLLM itself as the engine that samples: it says what the policy says, before a step and after it."""

import copy
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slimepo.data.batch import StepCollator
from slimepo.data.chat import load_tokenizer
from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.model.adapters import add_adapter, lora_config
from slimepo.model.generate import Completion, generate
from slimepo.model.logps import install_logps
from slimepo.model.modes import scoring
from slimepo.model.score import score_rows
from slimepo.onpolicy.rewards import Prompt
from slimepo.onpolicy.settings import Rollouts
from slimepo.onpolicy.vllm import VLLM
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
    # What vLLM itself calls is not ours to mend.
    pytest.mark.filterwarnings("default"),
]

NEW, SAMPLES, CLOSE = 12, 3, 1e-4
ENDS = frozenset({1})
PROMPTS = [
    Prompt(str(i), [], {}, np.random.default_rng(i).integers(2, 400, 3 + 5 * i).tolist()) for i in range(5)
]
# vLLM's attention on a CPU knows no heads of less than 32.
SETTINGS = Rollouts(
    engine="vllm", samples=SAMPLES, max_new_tokens=NEW, batch_rows=8, vllm_gpu_memory_utilization=0.01
)


@pytest.fixture(scope="module")
def policy() -> Any:
    model = tiny_model(vocab_size=410, head_dim=32, tied=True, initializer_range=0.3)
    install_logps(model)
    return model


@pytest.fixture(scope="module")
def engine(policy: Any) -> VLLM:
    made = VLLM(SETTINGS, context=64, dtype=torch.float32, seed=0)
    made.load(policy)
    return made


def logps(model: nn.Module, completions: Sequence[Sequence[Completion]]) -> list[np.ndarray]:
    """What training finds of each token."""
    rows = [
        Row(np.array(prompt.ids, np.int32), tuple(np.array(c.token_ids, np.int32) for c in of_prompt))
        for prompt, of_prompt in zip(PROMPTS, completions, strict=True)
    ]
    collator = StepCollator(8, tuple(range(len(completions[0]))))
    with scoring(model) as forward:
        return [
            numbers[0]
            for of_row in score_rows(forward, rows, collator, torch.device("cpu"))
            for numbers in of_row
        ]


def apart(model: nn.Module, completions: Sequence[Sequence[Completion]]) -> float:
    """The largest difference of a token's log-prob between vLLM and the model."""
    said = [np.array(c.logps) for of_prompt in completions for c in of_prompt]
    return max(np.abs(a - b).max() for a, b in zip(said, logps(model, completions), strict=True))


def test_greedy_answers_are_those_of_the_model(policy: Any, engine: VLLM) -> None:
    engine.load(policy)
    greedy = VLLM(SETTINGS.model_copy(update={"temperature": 0.0, "samples": 1}), 64, torch.float32, 0)
    greedy._llm = engine._llm
    said = greedy.sample(ENDS, PROMPTS, [0] * len(PROMPTS))
    expected = generate(policy, [p.ids for p in PROMPTS], end_token_ids=ENDS, max_new_tokens=NEW)
    assert [[c.token_ids for c in each] for each in said] == [
        [c.token_ids for c in each] for each in expected
    ]
    assert [[c.finished for c in each] for each in said] == [[c.finished for c in each] for each in expected]


def test_samples_come_with_the_log_probs_of_the_model_and_repeat_by_their_seed(
    policy: Any, engine: VLLM
) -> None:
    engine.load(policy)
    before = torch.random.get_rng_state()
    first, again, other = (engine.sample(ENDS, PROMPTS, [seed] * len(PROMPTS)) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == again != other
    assert [len(each) for each in first] == [SAMPLES] * len(PROMPTS)
    assert len({tuple(c.token_ids) for each in first for c in each}) == SAMPLES * len(PROMPTS)
    assert apart(policy, first) < CLOSE


def test_a_weight_that_head_and_embedding_share_reaches_both(policy: Any, engine: VLLM) -> None:
    changed = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    engine.load(changed)
    said = engine.sample(ENDS, PROMPTS, [0] * len(PROMPTS))
    assert apart(changed, said) < CLOSE < apart(policy, said)


@pytest.mark.parametrize("train_head", [False, True])
def test_an_adapter_and_a_trained_head_reach_the_engine_and_the_policy_stays_as_it_is(
    policy: Any, engine: VLLM, train_head: bool
) -> None:
    wrapped = add_adapter(copy.deepcopy(policy), lora_config(r=4, alpha=8, train_head=train_head))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    state = {name: value.clone() for name, value in wrapped.state_dict().items()}
    # Made anew where the head is not the embedding any more: that is in the config.
    fitting = VLLM(SETTINGS, 64, torch.float32, 0) if train_head else engine
    fitting.load(wrapped)
    said = fitting.sample(ENDS, PROMPTS, [0] * len(PROMPTS))
    assert apart(wrapped, said) < CLOSE < apart(policy, said)
    assert all(torch.equal(value, state[name]) for name, value in wrapped.state_dict().items())


def long(prompt: Any, completions: Sequence[str], row: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def trainer(folder: Path, llama_folder: Path, reward: Any = long) -> PreferenceTrainer:
    tokenizer = load_tokenizer(str(llama_folder))
    args = PreferenceConfig(
        output_dir=str(folder), loss="grpo", rollouts=SETTINGS.model_dump(exclude_unset=True), max_steps=3,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], per_device_train_batch_size=2,
    )  # fmt: skip
    model = tiny_model(vocab_size=len(tokenizer), head_dim=32, eos_token_id=tokenizer.eos_token_id)
    rows = [{"prompt": text} for text in ("Once upon a time", "Who is Lily?", "Tell me a story")]
    return PreferenceTrainer(model, args, rows, processing_class=tokenizer, reward=reward)


def test_training_samples_from_the_policy_of_each_step(tmp_path: Path, llama_folder: Path) -> None:
    made = trainer(tmp_path, llama_folder)
    before = copy.deepcopy(made.model.state_dict())
    made.train()
    logs = [log for log in made.state.log_history if "loss" in log]
    assert len(logs) == 3
    assert all(log["sampler/mismatch"] <= log["sampler/mismatch/max"] < CLOSE for log in logs)
    assert all(
        log["sampler/weight"] == pytest.approx(1, abs=1e-3) and log["sampler/masked"] == 0 for log in logs
    )
    assert any(not torch.equal(value, before[name]) for name, value in made.model.state_dict().items())


def test_one_stage_after_another_has_an_engine_of_its_own_also_after_an_error(
    tmp_path: Path, llama_folder: Path
) -> None:
    def broken(*_: Any) -> list[float]:
        raise KeyError("gold")

    grouped = torch.distributed.is_initialized()
    failing = trainer(tmp_path / "failing", llama_folder, broken)
    with pytest.raises(InputError, match="KeyError: 'gold'"):
        failing.train()
    logs = []
    for name in ("first", "second"):
        made = trainer(tmp_path / name, llama_folder)
        made.train()
        logs.append([log["reward"] for log in made.state.log_history if "reward" in log])
        assert made.rollouts is not None
        assert made.rollouts.engine._llm is None  # type: ignore[union-attr]
        assert torch.distributed.is_initialized() == grouped
    assert logs[0] == logs[1]
