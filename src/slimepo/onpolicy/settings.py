"""What is sampled while a model trains, and what becomes of it. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, field_validator

from slimepo.errors import InputError
from slimepo.settings import Settings, validate

if TYPE_CHECKING:
    from slimepo.losses import Objective

Estimator = Literal["group", "centered", "leave-one-out", "returns", "baseline-returns", "gae", "preference"]
Opponent = Literal["policy", "reference", "mixture"]
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

# The advantages that an objective was published with, by its name; presets that differ have a line of their own.
ESTIMATORS: Mapping[str, Estimator] = {
    "grpo": "group",
    "grpo/dr": "centered",
    "rloo": "leave-one-out",
    "reinforce_pp": "returns",
    "reinforce_pp/baseline": "baseline-returns",
    "ppo": "gae",
    "nash_md": "preference",
}

# Whose answers an objective was published to set the policy's against, where that is not the policy itself.
OPPONENTS: Mapping[str, Opponent] = {"xpo": "reference", "nash_md": "mixture"}

# Those that give each token an advantage of its own, whitened over all tokens of the step.
BY_TOKEN = ("returns", "baseline-returns", "gae")

# Objectives that take one advantage a response.
BY_RESPONSE = ("rloo", "nash_md")

# How often an objective was published to learn from one rollout, where that is more than once.
EPOCHS: Mapping[str, int] = {"ppo": 4}

# Settings of the weights that correct for another engine.
_WEIGHING = "vllm_importance_sampling"


class ValueModel(Settings):
    """A model of the reward to come at each token, trained beside the policy, for generalised advantage estimates.

    It starts from the policy's backbone and has an AdamW of its own. `discount` and `decay` are gamma and lambda;
    `clip` holds a value near what it was when the answers were sampled, as the policy's ratio is held near 1.
    """

    learning_rate: float = Field(1e-5, gt=0)
    discount: float = Field(1.0, gt=0, le=1)
    decay: float = Field(0.95, ge=0, le=1)
    clip: float = Field(0.2, gt=0)


class Admission(Settings):
    """From which difference of rewards on a pair is trained on, chosen among `thresholds` while it trains.

    `share`: so many pairs a prompt there should be at the least. `radius`: of the bounds of what is known of a
    threshold, in units of reward; `discount`: what a rollout counts when another one has been seen since.
    (`slimepo.onpolicy.thresholds`)
    """

    thresholds: list[float] = Field(min_length=2)
    share: float = Field(0.25, gt=0)
    radius: float = Field(0.1, ge=0)
    discount: float = Field(0.95, gt=0, le=1)

    @field_validator("thresholds")
    @classmethod
    def _rising(cls, given: list[float]) -> list[float]:
        if given[0] < 0 or any(one >= other for one, other in itertools.pairwise(given)):
            raise ValueError(f"give rising numbers of 0 or more, each once, not {given}")
        return given


class Cost(Settings):
    """What answers may cost, and a fixed penalty on the reward beyond that (`slimepo.onpolicy.costs`).

    `of` names what gives each answer its cost, as a stage's `reward` is named; in Python the trainer's `cost` is that.
    `limit` is in the units of the cost, and `weight` what a unit of it takes off the reward. `gate`: batch takes the
    whole cost off each answer while the mean cost of all answers of the last `window` rollouts is above the limit;
    answer takes off what an answer itself costs above it.
    """

    of: str | list[str] | dict[str, float] | None = None
    limit: float
    weight: float = Field(gt=0)
    gate: Literal["answer", "batch"] = "batch"
    window: int = Field(1, ge=1)


class Rollouts(Settings):
    """How the rows of a step come about: answers to its prompts, sampled from the model that is training.

    `samples` answers a prompt, of at most `max_new_tokens`, from softmax(logits / temperature) cut to `top_p`.
    `steps_per_rollout`: the mini-batches, of an optimizer step each, that are answered together; `epochs`: how often
    each of them is learnt from, one after the other in every epoch (None: as the loss was published).
    `pairs`, for an objective that reads pairs: best-worst sets the best answer to a prompt against the worst;
    right-wrong every answer of the highest reward against every one of the lowest.
    `admit`, for the same: pairs whose rewards differ less than a threshold are left out, the threshold found among
    several while it trains ({thresholds: [0, 0.5], share: 0.25}; see `Admission`).
    `advantages`, for an objective that reads samples (None: as it was published): group (reward minus the group's mean,
    over its standard deviation), centered (no division), leave-one-out (minus the mean of the others), returns (a
    token's rewards to come, whitened over the step), baseline-returns (centered, then whitened), gae (by a model of
    values, whitened) or preference (how likely an answer is to be preferred, less 1/2). `value`: settings of the model
    of values.
    `against`: whose answers the samples are compared with (None: as the loss was published): policy, which is each
    other; reference; or mixture, pi^(1 - m) pi_ref^m token by token with m = `mixture`. There are as many answers of an
    opponent as samples: a pair is a sample and the one of its number, `advantages: preference` go by all of them.
    `kl`: weight of the log-ratio to the reference in the reward. `skip_equal` leaves out groups of equal reward, and
    `skip_unfinished` answers that reached no end.
    `cost`: a cost of answers beside their reward, with a limit ({of: file.py:function, limit: 0.1, weight: 5}; see
    `Cost`).
    `on_error`: what a reward does that fails, is no number or takes longer than `timeout` seconds a prompt: stop the
    run, or skip the prompt. `batch_rows`: answers written side by side.
    `watch_kl`: hold a frozen copy of a model that trains whole, to measure how far the policy has gone from its start;
    a stage with adapters or with a reference measures that without.

    `engine` writes the answers: transformers; vllm, in this process; or http://host:port, a `vllm serve` there. Weights
    are handed over before each rollout. In this process vLLM takes `vllm_gpu_memory_utilization` of the device's
    memory (of a CPU's for its cache alone).
    vLLM rounds otherwise than training does: for objectives on samples `vllm_importance_sampling_correction` weighs
    each advantage by w = pi_trainer / pi_vllm, of a token or of a whole answer (`vllm_importance_sampling_mode`);
    where w is out of `vllm_importance_sampling_clip_min` to `_clip_max`, truncate takes the bound for it, and mask
    takes 0. All `vllm_` names are TRL's, and so are their defaults.
    """

    samples: int = Field(8, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(256, ge=1)
    steps_per_rollout: int = Field(1, ge=1)
    epochs: int | None = Field(None, ge=1)
    pairs: Literal["best-worst", "right-wrong"] = "best-worst"
    admit: Admission | None = None
    advantages: Estimator | None = None
    against: Opponent | None = None
    mixture: float = Field(0.5, gt=0, lt=1)
    value: ValueModel = ValueModel.model_validate({})
    kl: float = Field(0.0, ge=0)
    cost: Cost | None = None
    skip_equal: bool = False
    skip_unfinished: bool = False
    on_error: Literal["stop", "skip"] = "stop"
    timeout: float | None = Field(None, gt=0)
    batch_rows: int = Field(256, ge=1)
    watch_kl: bool = False
    engine: str = "transformers"
    vllm_gpu_memory_utilization: float = Field(0.3, gt=0, le=1)
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: Correction = "sequence_mask"
    vllm_importance_sampling_clip_min: float | None = Field(None, ge=0)
    vllm_importance_sampling_clip_max: float | None = Field(
        3.0,
        gt=0,
        # What TRL called it first.
        validation_alias=AliasChoices("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"),
    )

    @property
    def given(self) -> set[str]:
        """The settings that are not at their defaults: a run's own recipe.yaml, with all written out, is a recipe."""
        fields = type(self).model_fields
        return {key for key in self.model_fields_set if getattr(self, key) != fields[key].default}

    @property
    def passes(self) -> int:
        """How often each mini-batch is learnt from."""
        return self.epochs or 1

    @property
    def steps(self) -> int:
        """How many are taken on a rollout."""
        return self.steps_per_rollout * self.passes

    @property
    def opposed(self) -> bool:
        """Whether samples are compared with answers that the policy alone did not write."""
        return self.against in ("reference", "mixture")

    @property
    def reads_reference(self) -> bool:
        """Whether a reference model is read for the rows, whatever the loss reads."""
        return self.kl > 0 or self.opposed

    @property
    def corrected(self) -> bool:
        """Whether samples are weighed for having been written by another engine than the one that trains."""
        return self.engine != "transformers" and self.vllm_importance_sampling_correction


def rollout_settings(
    given: Mapping[str, Any] | Rollouts | None, loss: str, objective: Objective
) -> Rollouts | None:
    """The settings, with what the loss was published with where nothing else is asked for.

    Raises:
        InputError: a key or a value is wrong, or one that is of no use with this loss.
    """
    reads_samples = objective.positions is None
    if given is None:
        if reads_samples or "opponent" in objective.asks:
            raise InputError(
                f"loss {loss!r} learns from the policy's own samples: give rollouts, such as {{samples: 8}}"
            )
        return None
    settings = given if isinstance(given, Rollouts) else validate(Rollouts, given, "rollouts")
    _check_engine(settings)
    asked = settings.given
    estimator = settings.advantages or ESTIMATORS.get(loss) or ESTIMATORS.get(loss.partition("/")[0], "group")
    settings = settings.model_copy(
        update={
            "advantages": estimator if reads_samples else None,
            "epochs": settings.epochs or EPOCHS.get(loss),
            "against": settings.against or OPPONENTS.get(loss, "policy"),
        }
    )
    compared = not reads_samples or estimator not in ("returns", "gae")
    if settings.samples < 2 and compared and not settings.opposed:
        raise InputError(f"rollouts: samples = 1 gives loss {loss!r} nothing to compare: give 2 or more")
    # Whoever has an objective at hand has loaded these.
    from slimepo.losses.table import weighs_rows

    if weighs_rows(loss):
        raise InputError(
            f"rollouts: loss {loss!r} weighs pairs by their costs, and pairs of samples have none: use simpo"
        )
    _check_opponent(settings, asked, loss, objective)
    _check_cost(settings)
    if not reads_samples:
        weighing = [key for key in asked if key.startswith(_WEIGHING)]
        for key in ("advantages", "value", "kl", "skip_equal", *weighing):
            if key in asked:
                raise InputError(
                    f"rollouts: {key} is for objectives on samples; loss {loss!r} is given pairs"
                )
        return settings
    for key in ("pairs", "admit"):
        if key in asked:
            raise InputError(
                f"rollouts: {key} is for objectives on pairs; loss {loss!r} reads the samples themselves"
            )
    if settings.temperature != 1 or settings.top_p != 1:
        raise InputError(
            f"rollouts: loss {loss!r} weighs samples by the policy's own log-probs, which are those of "
            "temperature 1 and top_p 1: leave temperature and top_p out"
        )
    if "behaviour" not in objective.asks and settings.steps_per_rollout * settings.passes > 1:
        raise InputError(
            f"rollouts: loss {loss!r} reads no behaviour, the log-probs of the policy that sampled, and behind the "
            "first step that is another one: leave steps_per_rollout and epochs at 1"
        )
    if "value" in asked and estimator != "gae":
        raise InputError(f"rollouts: value is for advantages: gae, and these are {estimator!r}")
    if loss in BY_RESPONSE and estimator in BY_TOKEN:
        raise InputError(
            f"rollouts: advantages = {estimator!r} are by token; {loss} takes one advantage a response"
        )
    return settings


def _check_opponent(settings: Rollouts, asked: Collection[str], loss: str, objective: Objective) -> None:
    """Raises InputError where answers of an opponent are missing, or nothing is set against them."""
    against, reads_samples = settings.against, objective.positions is None
    if "mixture" in asked and against != "mixture":
        raise InputError(
            "rollouts: mixture is the reference's share in against: mixture, which is not asked for"
        )
    if "opponent" in objective.asks and not settings.opposed:
        raise InputError(
            f"rollouts: loss {loss!r} learns from an opponent's answers: give against: reference"
        )
    if reads_samples and settings.opposed and settings.advantages != "preference":
        raise InputError(
            f"rollouts: against = {against!r} is what advantages: preference compare with, and these are "
            f"{settings.advantages!r}"
        )
    if objective.judged and (settings.opposed or {"pairs", "admit"} & set(asked)):
        raise InputError(
            f"rollouts: loss {loss!r} judges each sample by the mean reward of its group: leave pairs, admit and "
            "against out"
        )
    for key in ("pairs", "skip_equal"):
        if key in asked and settings.opposed:
            raise InputError(
                f"rollouts: {key} is for samples that are compared with each other; against = {against!r} sets them "
                "against those of an opponent"
            )


def _check_cost(settings: Rollouts) -> None:
    """Raises InputError for what is of no use with the gate of a cost."""
    cost = settings.cost
    if cost and cost.gate == "answer" and cost.window > 1:
        raise InputError(
            "rollouts: cost.window is for gate: batch; gate: answer looks at each answer by itself: leave window out"
        )
    if cost and cost.gate == "batch" and settings.admit:
        raise InputError(
            "rollouts: admit goes by how the mean reward rises, and the batch gate of a cost moves that by itself: "
            "give cost.gate = answer"
        )


def _check_engine(settings: Rollouts) -> None:
    """Raises InputError for an engine that is not there to be had, and for settings that it makes no use of."""
    engine, given = settings.engine, settings.given
    if engine not in ("transformers", "vllm") and not engine.startswith(("http://", "https://")):
        raise InputError(
            f"rollouts: engine = {engine!r} is unknown: give transformers, vllm, or http://host:port of a vllm serve"
        )
    address = urlsplit(engine)
    if address.username or address.password or address.query:
        raise InputError(
            "rollouts: the engine's address holds a user, a password or a query: give http://host:port"
        )
    if engine == "vllm" and find_spec("vllm") is None:
        raise InputError("rollouts: engine = 'vllm', and vLLM is not installed: pip install vllm")
    of_no_use = {"transformers": ("vllm_",), "vllm": ()}.get(
        engine, ("batch_rows", "vllm_gpu_memory_utilization")
    )
    for key in sorted(given):
        if key.startswith(of_no_use):
            raise InputError(f"rollouts: {key} is of no use with engine = {engine!r}: leave it out")
    low, high = settings.vllm_importance_sampling_clip_min, settings.vllm_importance_sampling_clip_max
    if low is not None and high is not None and low >= high:
        raise InputError(
            f"rollouts: vllm_importance_sampling_clip_min = {low:g} must be less than clip_max = {high:g}"
        )
    if low is None and high is None and settings.vllm_importance_sampling_mode.endswith("truncate"):
        raise InputError(
            f"rollouts: {settings.vllm_importance_sampling_mode} needs vllm_importance_sampling_clip_min or _clip_max"
        )
