"""Objectives: pure functions from per-token log-probs to one loss a pair, or a sampled response.

`LOSSES` is the one list of them. To add one, write a function
`(policy, *, hyperparameters) -> LossOutput`, put it in the table, and add a worked test and a
row in docs/objectives.md; recipes, the command line and the contract test read the table and the signature. Every
further parameter without a default asks for something by its name, such as `reference` for a reference model.

Of each of them: `policy` and `reference` are log-probs under the model in training and under a reference model, each
side `[pairs, tokens]`, in nats (a `reference` with the default None is not read); the loss is `[pairs]`, unreduced; a
hyperparameter out of its range raises InputError.
"""

from slimepo.losses.anchored import cal_dpo, dpo_shift, dpop, lpo, rpo
from slimepo.losses.common import Counts, count, step_loss
from slimepo.losses.dpo import chi_po, discopop, dpo, exo_pair, hinge, ipo, robust
from slimepo.losses.informed import aot, aot_unpaired, reward_aware_rpo, xpo
from slimepo.losses.kto import kto
from slimepo.losses.pointwise import apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from slimepo.losses.policy_gradient import grpo, nash_md, ppo, reinforce_pp, rloo
from slimepo.losses.presets import PRESETS
from slimepo.losses.sft import sft
from slimepo.losses.simpo import alpha_po, bopo, cpo, orpo, simper, simpo, slic, tpo
from slimepo.losses.slime import slime
from slimepo.losses.table import LOSSES, Objective, bind, find_objective, hyperparameters

__all__ = [
    "LOSSES",
    "PRESETS",
    "Counts",
    "Objective",
    "alpha_po",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "bind",
    "bopo",
    "cal_dpo",
    "chi_po",
    "count",
    "cpo",
    "discopop",
    "dpo",
    "dpo_shift",
    "dpop",
    "exo_pair",
    "find_objective",
    "grpo",
    "hinge",
    "hyperparameters",
    "ipo",
    "kto",
    "lpo",
    "nash_md",
    "nca_pair",
    "orpo",
    "ppo",
    "reinforce_pp",
    "reward_aware_rpo",
    "rloo",
    "robust",
    "rpo",
    "sft",
    "simper",
    "simpo",
    "slic",
    "slime",
    "sppo_hard",
    "step_loss",
    "tpo",
    "xpo",
]
