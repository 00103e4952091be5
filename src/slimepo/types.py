"""The plain data that passes between the parts of slimepo. Imports no torch at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, get_args

if TYPE_CHECKING:
    from torch import Tensor

# The objectives of slimepo.losses.LOSSES, for who has to name them without torch.
OBJECTIVES = (
    "sft",
    "slime",
    "dpo",
    "sigmoid_norm",
    "robust",
    "exo_pair",
    "hinge",
    "discopop",
    "ipo",
    "chi_po",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "kto",
    "rpo",
    "dpop",
    "cal_dpo",
    "dpo_shift",
    "lpo",
    "simpo",
    "alpha_po",
    "simper",
    "cpo",
    "slic",
    "orpo",
    "tpo",
    "bopo",
    "reward_aware_rpo",
    "aot",
    "aot_unpaired",
    "xpo",
    "grpo",
    "rloo",
    "reinforce_pp",
    "ppo",
    "nash_md",
)

# Where reference log-probs come from.
REFERENCE_SOURCES = ("auto", "adapters-off", "copy", "cache")

# How several devices share a run (slimepo.parallel.engines).
Engine = Literal["ddp", "fsdp2", "fsdp2-offload", "zero2", "zero2-offload", "zero3", "zero3-offload"]
ENGINES: tuple[str, ...] = get_args(Engine)


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user, assistant or tool.

    What it has beside its text is there only where it has it, and goes to the chat template as it is: reasoning, tool
    calls (`{"type": "function", "function": {"name", "arguments"}}`), and in a tool's turn whose call it answers.
    """

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True)
class Preference:
    """One comparison: after `prompt`, `chosen` is preferred to `rejected`.

    All three are lists of messages. A demonstration (supervised data) is a Preference whose `rejected`
    is empty. `source` says where the row came from (`file:line`) and is no part of its identity.
    `weight` is how much the row counts in the mean loss of a step, 0 or more. `scores` are what the row says the chosen
    and the rejected answer are worth, for objectives that ask for `rewards`. `template_options` are what the chat
    template is given for this row beside its messages: `tools`, and options such as `enable_thinking`.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    source: str = field(default="", compare=False)
    weight: float = 1.0
    template_options: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[float, float] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Unpaired:
    """One judged answer: `label` is True when the response is desirable (KTO-style data)."""

    prompt: list[Message]
    response: list[Message]
    label: bool
    source: str = field(default="", compare=False)
    weight: float = 1.0
    template_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a checker says of an answer. `valid`: its form is right. `correct`: its meaning is too (and so its form)."""

    correct: bool
    valid: bool


@dataclass(frozen=True)
class PairLogps:
    """Per-token log-probabilities of the responses of some pairs, in nats.

    Each tensor is `[pairs, tokens]`. The masks are boolean: True where there is a response token; what
    stands in `chosen` and `rejected` elsewhere is never read. The two sides may differ in width, and a
    side that an objective does not ask for has width 0.
    """

    chosen: Tensor
    chosen_mask: Tensor
    rejected: Tensor
    rejected_mask: Tensor


@dataclass(frozen=True)
class SampleLogps:
    """Per-token log-probabilities of sampled responses, in nats: `[responses, tokens]`, and a mask as in PairLogps."""

    logps: Tensor
    mask: Tensor


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns: nothing in it is reduced over rows, which are pairs, or sampled responses.

    `loss` is `[rows]`; a step's loss is its mean over the rows of the global batch, by their weights. `token_loss`
    holds parts that are averaged over tokens instead: `[rows]` sums under the key "chosen", "rejected" or "sampled",
    divided by the number of such tokens in the global batch. `metrics` are `[rows]`, detached; NaN where a row
    has no such figure, which means leave out.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    token_loss: Mapping[str, Tensor] = field(default_factory=dict)
