"""Objectives: pure functions from per-token log-probs to one loss a pair.

`LOSSES` is the one list of them. To add one, write a function
`(policy, reference, *, hyperparameters) -> LossOutput`, put it in the table, and add a worked test and a
row in docs/objectives.md; recipes, the command line and the contract test read the table and the signature.
"""

from slimepo.losses.common import Counts, count, step_loss
from slimepo.losses.sft import sft
from slimepo.losses.slime import slime
from slimepo.losses.table import LOSSES, Objective, bind, find_objective, hyperparameters

__all__ = [
    "LOSSES",
    "Counts",
    "Objective",
    "bind",
    "count",
    "find_objective",
    "hyperparameters",
    "sft",
    "slime",
    "step_loss",
]
