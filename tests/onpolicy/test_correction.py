"""Weights for samples of another engine: TRL's truncated importance sampling, as read from its GRPOTrainer."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.losses import find_objective, grpo, reinforce_pp, rloo
from slimepo.model.generate import Completion, generate
from slimepo.onpolicy.correction import corrected, importance_weights
from slimepo.onpolicy.rewards import Prompt
from slimepo.onpolicy.settings import Rollouts, rollout_settings
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from slimepo.types import SampleLogps

# Token by token pi_trainer / pi_sampler = 4, 1/2, 2; all together 4.
TRAINER = np.log([0.8, 0.2, 0.4])
SAMPLER = np.log([0.2, 0.4, 0.2])


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("token_truncate", None, 3.0, [3, 0.5, 2]),
        ("token_truncate", 1.0, None, [4, 1, 2]),
        ("token_mask", None, 3.0, [0, 0.5, 2]),
        ("token_mask", 1.0, 3.0, [0, 0, 2]),
        ("sequence_truncate", None, 3.0, [3]),
        ("sequence_mask", None, 3.0, [0]),
        ("sequence_mask", None, 5.0, [4]),
        ("sequence_mask", None, None, [4]),
    ],
)
def test_a_ratio_out_of_bounds_is_cut_to_them_or_does_not_count(
    mode: str, low: float | None, high: float | None, expected: list[float]
) -> None:
    weights = importance_weights(TRAINER, SAMPLER, mode, low=low, high=high)  # type: ignore[arg-type]
    np.testing.assert_allclose(weights, expected, rtol=1e-12)


def test_a_token_without_a_log_prob_of_the_sampler_counts_as_it_is() -> None:
    sampler = np.array([SAMPLER[0], math.nan, SAMPLER[2]])
    np.testing.assert_allclose(importance_weights(TRAINER, sampler, "token_truncate"), [4, 1, 2])
    np.testing.assert_allclose(importance_weights(TRAINER, sampler, "sequence_truncate"), [8])


def ids(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def test_rows_get_weighed_advantages_and_say_how_far_the_engines_are_apart() -> None:
    known = {"behaviour": (TRAINER, TRAINER[:0]), "sampler": (SAMPLER, SAMPLER[:0])}
    row = Row(ids(2), (ids(3), ids(0)), {"advantages": np.array([0.5, -1.0], np.float32), **known}, "a")
    by_answer = Rollouts(engine="vllm", vllm_importance_sampling_clip_max=5.0)
    rows, apart = corrected([row], by_answer)
    np.testing.assert_allclose(rows[0].values["advantages"], [4 * 0.5, -1.0])
    assert set(rows[0].values) == {"advantages", "behaviour"}
    logs = [math.log(4), math.log(2), math.log(2)]
    assert apart["sampler/mismatch"] == pytest.approx(sum(logs) / 3)
    assert apart["sampler/mismatch/max"] == pytest.approx(logs[0])
    # The answer that is not there is not counted.
    assert (apart["sampler/weight"], apart["sampler/masked"]) == (pytest.approx(4), 0)

    by_token = Rollouts(engine="vllm", vllm_importance_sampling_mode="token_mask")
    rows, apart = corrected([row], by_token)
    np.testing.assert_allclose(rows[0].values["advantages"][0], [0, 0.25, 1])
    assert apart["sampler/masked"] == pytest.approx(1 / 3)
    whitened = Row(
        ids(2),
        (ids(3),),
        {"advantages": (np.ones(3, np.float32),), "behaviour": (TRAINER,), "sampler": (SAMPLER,)},
    )
    rows, apart = corrected(
        [whitened], Rollouts(engine="vllm", vllm_importance_sampling_mode="sequence_truncate")
    )
    np.testing.assert_allclose(rows[0].values["advantages"][0], [3, 3, 3])
    assert apart["sampler/truncated"] == 1


def surrogates(
    policy: SampleLogps, behaviour: SampleLogps, advantages: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {
        "grpo": grpo(policy, behaviour, advantages, aggregation="constant", length=1).loss,
        "reinforce_pp": reinforce_pp(policy, behaviour, advantages).token_loss["sampled"],
    } | ({"rloo": rloo(policy, behaviour, advantages).loss} if advantages.dim() == 1 else {})


@pytest.mark.parametrize("by_token", [False, True])
def test_weighing_advantages_is_weighing_the_loss(by_token: bool) -> None:
    """TRL multiplies the loss of each token; one response of one token shows both, value and gradient."""
    make = torch.Generator().manual_seed(0)
    sampled = -torch.rand(64, 1, generator=make, dtype=torch.float64) * 3
    behaviour = SampleLogps(sampled, torch.ones(64, 1, dtype=torch.bool))
    advantages = torch.randn(64, generator=make, dtype=torch.float64)
    weights = torch.rand(64, generator=make, dtype=torch.float64) * 3
    weights[:8] = 0
    shape = (64, 1) if by_token else (64,)

    def loss_and_slope(
        inside: torch.Tensor, outside: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        found = {}
        for name in surrogates(behaviour, behaviour, inside):
            logps = (sampled + torch.linspace(-1, 1, 64, dtype=torch.float64)[:, None]).requires_grad_()
            policy = SampleLogps(logps, behaviour.mask)
            loss = surrogates(policy, behaviour, inside)[name] * outside
            found[name] = (loss.detach(), torch.autograd.grad(loss.sum(), logps)[0])
        return found

    one = torch.ones(64, dtype=torch.float64)
    ours = loss_and_slope((advantages * weights).reshape(shape), one)
    theirs = loss_and_slope(advantages.reshape(shape), weights)
    for name, pair in ours.items():
        torch.testing.assert_close(pair, theirs[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "vlm"}, "engine = 'vlm' is unknown"),
        ({"vllm_importance_sampling_mode": "token_mask"}, "of no use with engine = 'transformers'"),
        ({"engine": "http://a:1", "batch_rows": 8}, "batch_rows is of no use"),
        ({"engine": "http://a:1", "vllm_importance_sampling_clip_min": 4}, "must be less than"),
        (
            {
                "engine": "http://a:1",
                "vllm_importance_sampling_mode": "token_truncate",
                "vllm_importance_sampling_clip_max": None,
            },
            "token_truncate needs",
        ),
    ],
)
def test_settings_of_no_use_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rollout_settings(given, "grpo", find_objective("grpo"))


def test_where_vllm_is_not_installed_the_run_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimepo.onpolicy.settings.find_spec", lambda name: None)
    with pytest.raises(InputError, match="vLLM is not installed: pip install vllm"):
        PreferenceTrainer("no/such-model", PreferenceConfig(loss="grpo", rollouts={"engine": "vllm"}))


def test_pairs_are_not_weighed() -> None:
    given = {"engine": "http://a:1", "vllm_importance_sampling_correction": False}
    with pytest.raises(InputError, match="vllm_importance_sampling_correction is for objectives on samples"):
        rollout_settings(given, "slime", find_objective("slime"))


def test_the_first_name_of_the_upper_bound_is_taken_too() -> None:
    given = {"engine": "http://a:1", "vllm_importance_sampling_cap": 2.0}
    settings = rollout_settings(given, "grpo", find_objective("grpo"))
    assert settings is not None
    assert settings.vllm_importance_sampling_clip_max == 2.0


@pytest.mark.parametrize(
    ("loss", "options"), [("rloo", {}), ("nash_md", {}), ("grpo/gspo", {}), ("grpo", {"level": "sequence"})]
)
def test_what_weighs_answers_as_a_whole_takes_no_weights_of_tokens(
    loss: str, options: dict[str, object]
) -> None:
    rollouts = {"engine": "http://a:1", "vllm_importance_sampling_mode": "token_truncate"}
    with pytest.raises(InputError, match="weighs a response as a whole"):
        PreferenceConfig(loss=loss, loss_options=options, rollouts=rollouts)


class Elsewhere:
    """Samples of the model itself, with log-probs that are 0.1 nats too low."""

    words = "elsewhere"

    def load(self, model: Any) -> None:
        self.model = model

    def close(self) -> None:
        """Nothing is held."""

    def sample(
        self, ends: frozenset[int], prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> list[list[Completion]]:
        ids = [prompt.ids for prompt in prompts]
        given = dict(max_new_tokens=4, temperature=1.0, samples=2, seed=seeds)
        found = generate(self.model, ids, end_token_ids=ends, **given)  # type: ignore[arg-type]
        return [
            [replace(c, logps=self.logps(of, c.token_ids)) for c in each]
            for of, each in zip(ids, found, strict=True)
        ]

    def logps(self, prompt: list[int], answer: list[int]) -> list[float]:
        with torch.no_grad():
            logits = self.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        return (chosen[:, 0] - 0.1).tolist()


@pytest.mark.parametrize(
    ("loss", "mode"), [("grpo", "token_truncate"), ("grpo/gspo", "sequence_mask"), ("slime", None)]
)
def test_steps_are_weighed_by_what_the_sampler_says(
    loss: str, mode: str | None, tmp_path: Path, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimepo.training.rollouts.open_engine", lambda *_, **__: Elsewhere())
    monkeypatch.setattr("slimepo.training.rollouts.check_server", lambda _: None)
    weighing = {"vllm_importance_sampling_mode": mode} if mode else {}
    args = PreferenceConfig(
        output_dir=str(tmp_path), loss=loss, max_steps=2, logging_steps=1, save_strategy="no", report_to=[],
        rollouts={"engine": "http://a:1", "samples": 2, "max_new_tokens": 4, **weighing}, monitor=False,
        per_device_train_batch_size=2, learning_rate=1e-3,
    )  # fmt: skip
    rows = [{"prompt": text} for text in ("Once upon a time", "Who is Lily?", "Tell me a story")]
    made = PreferenceTrainer(
        str(llama_folder), args, rows, reward=lambda prompt, texts, row: [float(len(text)) for text in texts]
    )
    made.train()
    logs = [log for log in made.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        if mode is None:
            assert not any(name.startswith("sampler/") for name in log)
            continue
        assert log["sampler/mismatch"] == pytest.approx(0.1, abs=1e-4)
        tokens = 1 if mode.startswith("token") else log["sampled/tokens"]
        # Where all answers are of one length, as they mostly are here, the mean weight is that of each.
        assert log["sampler/weight"] == pytest.approx(math.exp(0.1 * tokens), rel=0.01)
