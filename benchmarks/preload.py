"""Imported by the fork server, so that no worker has to: the libraries that contenders stand on."""

import warnings

warnings.simplefilter("ignore")

import datasets  # noqa: E402, F401
import torch  # noqa: E402, F401
import transformers  # noqa: E402, F401
import trl.experimental.cpo  # noqa: E402
import trl.trainer.dpo_trainer  # noqa: E402, F401

import slimepo.training.trainer  # noqa: E402, F401
