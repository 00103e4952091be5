"""slimepo: align language models on preference pairs with SLIME (arXiv 2602.02383).

Everything here is loaded when it is first used, so that importing the package (and asking the command line
for help) does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "InputError": "slimepo.errors",
    "LOSSES": "slimepo.losses",
    "LossOutput": "slimepo.types",
    "NonFiniteLossError": "slimepo.errors",
    "PairLogps": "slimepo.types",
    "Preference": "slimepo.types",
    "PreferenceConfig": "slimepo.training.config",
    "PreferenceTrainer": "slimepo.training.trainer",
    "SLIMEConfig": "slimepo.training.config",
    "SLIMETrainer": "slimepo.training.trainer",
    "Verdict": "slimepo.types",
    "export_model": "slimepo.pipeline.export",
    "generate": "slimepo.model.generate",
    "linear_logps": "slimepo.kernels",
    "lora_config": "slimepo.model.adapters",
    "read_rows": "slimepo.data.read",
    "run_recipe": "slimepo.pipeline.run",
    "score_pairs": "slimepo.model.score",
}

if TYPE_CHECKING:
    from slimepo.data.read import read_rows
    from slimepo.errors import InputError, NonFiniteLossError
    from slimepo.kernels import linear_logps
    from slimepo.losses import LOSSES
    from slimepo.model.adapters import lora_config
    from slimepo.model.generate import generate
    from slimepo.model.score import score_pairs
    from slimepo.pipeline.export import export_model
    from slimepo.pipeline.run import run_recipe
    from slimepo.training.config import PreferenceConfig, SLIMEConfig
    from slimepo.training.trainer import PreferenceTrainer, SLIMETrainer
    from slimepo.types import LossOutput, PairLogps, Preference, Verdict

__all__ = [
    "LOSSES",
    "InputError",
    "LossOutput",
    "NonFiniteLossError",
    "PairLogps",
    "Preference",
    "PreferenceConfig",
    "PreferenceTrainer",
    "SLIMEConfig",
    "SLIMETrainer",
    "Verdict",
    "export_model",
    "generate",
    "linear_logps",
    "lora_config",
    "read_rows",
    "run_recipe",
    "score_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slimepo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
