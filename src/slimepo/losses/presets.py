"""Named settings of an objective, chosen as `loss: slime/without-hard`; options given beside it come on top."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# What the authors' published code computes, for comparison with their paper: every term counted three times, a far
# smaller weight on the floor, and the floor averaged over one device's micro-batch. It clips gradients at 1.0 as
# well, which is a training argument (`args: {max_grad_norm: 1.0}`) and not the objective's.
_AUTHORS_CODE = {
    "chosen_weight": 3 * 0.1,
    "rejected_weight": 3 * 0.0005,
    "distance_weight": 3 * 1.0,
    "threshold": 1.25,
    "rejected_mean": "micro_batch",
}

# "paper" is the defaults; the ablations are those of Table 4 of arXiv 2602.02383.
_SLIME: dict[str, dict[str, Any]] = {
    "paper": {},
    "authors-code": _AUTHORS_CODE,
    "without-chosen": {"chosen_weight": 0.0},
    "without-rejected": {"rejected_weight": 0.0},
    "without-soft": {"soft_gate": "one"},
    "without-hard": {"hard_gate": "one"},
    "exponent-1": {"exponent": 1.0},
    "exponent-1.5": {"exponent": 1.5},
    "exponent-2": {"exponent": 2.0},
    "exponent-2.5": {"exponent": 2.5},
    "exponent-3": {"exponent": 3.0},
}

# GSPO's bounds are of its paper's section 5.1, DAPO's of its section 4.1. Dr.GRPO's `length` is to be the most tokens
# of a response, max_new_tokens; it scales the loss and no more, so one that differs is a learning rate that does.
_GRPO: dict[str, dict[str, Any]] = {
    "gspo": {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "dapo": {"aggregation": "token", "clip_high": 0.28},
    "dr": {"aggregation": "constant", "length": 256},
}

# The form with a baseline differs in its advantages, which slimepo.onpolicy makes.
_REINFORCE_PP: dict[str, dict[str, Any]] = {"baseline": {}}

# TPO-L of its paper, as TRL has it.
_TPO: dict[str, dict[str, Any]] = {"l": {"length_normalized": True, "gamma": 0.5}}

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {"slime": _SLIME, "tpo": _TPO, "grpo": _GRPO, "reinforce_pp": _REINFORCE_PP}
)
