"""Objectives: pure functions from per-token log-probs to one loss a pair, or a sampled response.

`LOSSES` is the one list of them. To add one, write a function
`(policy, *, hyperparameters) -> LossOutput`, put it in the table, and add a worked test and a
row in docs/objectives.md; recipes, the command line and the contract test read the table and the signature. Every
further parameter without a default asks for something by its name, such as `reference` for a reference model.

Of each of them: `policy` and `reference` are log-probs under the model in training and under a reference model, each
side `[pairs, tokens]`, in nats (a `reference` with the default None is not read); the loss is `[pairs]`, unreduced; a
hyperparameter out of its range raises InputError.
"""

from slimepo.losses.anchored import lpo, rpo
from slimepo.losses.common import Counts, count, step_loss
from slimepo.losses.dpo import chi_po, dpo, ipo
from slimepo.losses.informed import xpo
from slimepo.losses.kto import kto
from slimepo.losses.policy_gradient import grpo, nash_md, ppo, reinforce_pp, rloo
from slimepo.losses.presets import PRESETS
from slimepo.losses.sft import sft
from slimepo.losses.simpo import cpo, orpo, simpo
from slimepo.losses.slime import slime
from slimepo.losses.table import LOSSES, Objective, bind, find_objective, hyperparameters

__all__ = [
    "LOSSES",
    "PRESETS",
    "Counts",
    "Objective",
    "bind",
    "chi_po",
    "count",
    "cpo",
    "dpo",
    "find_objective",
    "grpo",
    "hyperparameters",
    "ipo",
    "kto",
    "lpo",
    "nash_md",
    "orpo",
    "ppo",
    "reinforce_pp",
    "rloo",
    "rpo",
    "sft",
    "simpo",
    "slime",
    "step_loss",
    "xpo",
]
