"""What slimepo is measured against: TRL's trainers and Liger's loss as they are, and the SLIME authors' computation.

Every peer gets the same model, the same token ids and the same pairs in each micro-batch. TRL's own collator,
`compute_loss` and metrics run; only its tokenisation is left out, because the ids are there already.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimepo.data.rows import Row

Pairs = Sequence[Row]
Step = Callable[[], float]

# Of the SLIME authors' training script; what else it computes is in the project's design notes.
AUTHORS = {"chosen_weight": 0.1, "rejected_weight": 0.0005, "threshold": 1.25}
SIMPO_BETA, SIMPO_GAMMA = 2.0, 0.5
IGNORED = -100


class PeerAbsentError(Exception):
    """A peer that is not installed here; the message says how to get it."""


@dataclass(frozen=True)
class Setup:
    """What a contender is built from: pairs by micro-batch, a scratch folder, precision and adapter."""

    micro_batches: Sequence[Pairs]
    folder: Path
    bf16: bool = False
    adapter: Any = None

    @property
    def rows(self) -> list[Row]:
        return [pair for batch in self.micro_batches for pair in batch]


def trl_dpo(model: nn.Module, setup: Setup, *, best: bool = False, checkpointing: bool = False) -> Step:
    """TRL's DPOTrainer: a reference model beside the policy, or `best`: its log-probs known beforehand.

    `best` also projects nothing but response tokens onto the vocabulary. TRL does so on CUDA and XPU and scores
    every position elsewhere; here its switch is set to what it is there.
    """
    from datasets import Dataset
    from trl.trainer import utils
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    # What scores the response tokens alone, wherever it is asked during a step.
    switched = patch.object(utils, "_use_triton", lambda device: True) if best else nullcontext()
    rows = [
        {
            "prompt_ids": pair.prompt_ids.tolist(),
            "chosen_ids": pair.responses[0].tolist(),
            "rejected_ids": pair.responses[1].tolist(),
        }
        for pair in setup.rows
    ]
    trainer = Tokenised(
        model=model,
        ref_model=None if best or setup.adapter is not None else copy.deepcopy(model),
        args=DPOConfig(max_length=None, precompute_ref_log_probs=best, **_arguments(setup, checkpointing)),
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(),
        peft_config=setup.adapter,
    )
    step = _trl_step(trainer, setup, list(trainer.train_dataset), checkpointing)

    def switched_step() -> float:
        with switched:
            return step()

    return switched_step


def trl_simpo(model: nn.Module, setup: Setup, *, checkpointing: bool = False) -> Step:
    """TRL's CPOTrainer with the SimPO loss alone: reference-free, full logits."""
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Tokenised(CPOTrainer):
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return {}

    text = {"prompt": "", "chosen": "", "rejected": ""}
    trainer = Tokenised(
        model=model,
        args=CPOConfig(
            max_length=1_000_000,
            loss_type="simpo",
            cpo_alpha=0.0,
            beta=SIMPO_BETA,
            simpo_gamma=SIMPO_GAMMA,
            remove_unused_columns=False,
            **_arguments(setup, checkpointing),
        ),
        train_dataset=Dataset.from_list([text | _cpo_columns(pair) for pair in setup.rows]),
        processing_class=_tokenizer(),
        peft_config=setup.adapter,
    )
    return _trl_step(trainer, setup, list(trainer.train_dataset), checkpointing)


def trl_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The fused head of TRL's trainers, log-probs alone."""
    from trl.trainer import utils

    options = (1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
    logps: Tensor = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, *options)[0]
    return logps


def apple_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """cut-cross-entropy's kernel, at its defaults."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise PeerAbsentError("cut-cross-entropy is not installed: pip install cut-cross-entropy") from error
    if hidden.device.type == "cpu":
        raise PeerAbsentError("cut-cross-entropy's kernel needs a GPU")
    return -linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, reduction="none")


def liger_simpo(model: nn.Module, setup: Setup, *, compiled: bool = True) -> Step:
    """Liger's chunked SimPO loss (head and loss in one, a pair at a time) behind the padded backbone."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss
    except ImportError as error:
        raise PeerAbsentError(f"liger-kernel is not installed ({error}): pip install liger-kernel") from error
    if setup.adapter is not None:
        raise PeerAbsentError(
            "Liger's loss takes the head's weight alone, so it runs without an adapter here"
        )
    fused = LigerFusedLinearSimPOLoss(
        beta=SIMPO_BETA, gamma=SIMPO_GAMMA, compute_nll_loss=False, compiled=compiled
    )
    inner: Any = model
    share = 1 / len(setup.micro_batches)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        total = 0.0
        for pairs in setup.micro_batches:
            batch = _concatenated(pairs, inner.device)
            hidden = inner.base_model(batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
            loss = fused(inner.lm_head.weight, hidden[:, :-1], batch.labels[:, 1:])[0] * share
            loss.backward()
            total += loss.item()
        return total

    return step


def authors(model: nn.Module, setup: Setup) -> Step:
    """What the SLIME authors' trainer computes, written anew.

    Chosen and rejected rows concatenated and padded, the log-softmax of every position, a reference model's too
    (whose result is not used), the rejected term over the micro-batch's tokens, and the loss three times.
    """
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    share = 1 / len(setup.micro_batches)
    policy: Any = model

    def step() -> float:
        policy.zero_grad(set_to_none=True)
        total = 0.0
        for pairs in setup.micro_batches:
            batch = _concatenated(pairs, policy.device)
            logps = _all_logps(policy, batch)
            with torch.no_grad():
                _all_logps(reference, batch)
            loss = share * torch.stack([_authors_loss(*logps) for _ in range(3)]).sum()
            loss.backward()
            total += loss.item()
        return total

    return step


def _authors_loss(logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    _, rejected_BT = logps_BT.chunk(2)
    means = (logps_BT * mask_BT).sum(dim=1) / mask_BT.sum(dim=1)
    chosen, rejected = means.chunk(2)
    delta = chosen - rejected
    anchor = -AUTHORS["chosen_weight"] * chosen
    read = rejected_BT != 0
    floor = AUTHORS["rejected_weight"] * F.softplus(-rejected_BT[read] - AUTHORS["threshold"]).pow(2.5).mean()
    distance = F.relu(1.5 - delta) * torch.sigmoid(-2.5 * (delta - 1.0))
    return (anchor + distance).mean() + floor


def _all_logps(model: Any, batch: _Concatenated) -> tuple[Tensor, Tensor]:
    logits = model(batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
    labels = batch.labels[:, 1:]
    mask = labels != IGNORED
    logps = logits.float().log_softmax(dim=-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return logps * mask, mask


@dataclass(frozen=True)
class _Concatenated:
    """Chosen rows, then rejected rows, padded on the right: `[2 * pairs, longest]` each."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def _concatenated(pairs: Pairs, device: torch.device) -> _Concatenated:
    rows = [(pair.prompt_ids, pair.responses[side]) for side in (0, 1) for pair in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for index, (prompt, response) in enumerate(rows):
        start, stop = len(prompt), len(prompt) + len(response)
        ids[index, :start], ids[index, start:stop] = torch.from_numpy(prompt), torch.from_numpy(response)
        mask[index, :stop] = 1
        labels[index, start:stop] = ids[index, start:stop]
    return _Concatenated(ids.to(device), mask.to(device), labels.to(device))


def _trl_step(trainer: Any, setup: Setup, features: list[dict[str, Any]], checkpointing: bool) -> Step:
    """Forward and backward of all micro-batches through the trainer's own `training_step`."""
    if checkpointing:
        # Trainer.train would do this first.
        trainer.model.gradient_checkpointing_enable()
    trainer.current_gradient_accumulation_steps = len(setup.micro_batches)
    bounds = _bounds(setup.micro_batches)

    def step() -> float:
        trainer.model.zero_grad(set_to_none=True)
        total = 0.0
        for start, stop in bounds:
            batch = trainer.data_collator(features[start:stop])
            total += trainer.training_step(trainer.model, batch).item()
        return total

    return step


def _bounds(micro_batches: Sequence[Pairs]) -> list[tuple[int, int]]:
    stops = [sum(map(len, micro_batches[: i + 1])) for i in range(len(micro_batches))]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _arguments(setup: Setup, checkpointing: bool) -> dict[str, Any]:
    return {
        "output_dir": str(setup.folder),
        "per_device_train_batch_size": len(setup.micro_batches[0]),
        "gradient_accumulation_steps": len(setup.micro_batches),
        "gradient_checkpointing": checkpointing,
        "bf16": setup.bf16,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }


def _cpo_columns(pair: Row) -> dict[str, list[int]]:
    prompt = pair.prompt_ids.tolist()
    columns = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side, response in (("chosen", pair.responses[0].tolist()), ("rejected", pair.responses[1].tolist())):
        columns[f"{side}_input_ids"] = prompt + response
        columns[f"{side}_attention_mask"] = [1] * (len(prompt) + len(response))
        columns[f"{side}_labels"] = [IGNORED] * len(prompt) + response
    return columns


@functools.cache
def _tokenizer() -> Any:
    """TRL asks for a tokenizer; with the ids at hand it reads nothing but the padding token from it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
