"""Mean loss and metrics of a model on rows: what `PreferenceTrainer.evaluate` logs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from slimepo.data.batch import StepCollator, to_device
from slimepo.data.rows import MISMATCHED
from slimepo.losses import Objective
from slimepo.losses.table import LossFunction
from slimepo.model.modes import scoring
from slimepo.model.score import scoring_batches
from slimepo.training.dataset import RowDataset
from slimepo.training.metrics import MetricSums
from slimepo.training.reference import Reference, reference_logps
from slimepo.training.step import mean_log_ratio, output_of, policy_tokens
from slimepo.training.steps import shares


def score_dataset(
    model: nn.Module,
    rows: RowDataset,
    collator: StepCollator,
    objective: Objective,
    loss: LossFunction,
    reference: Reference | None,
    accelerator: Any,
) -> dict[str, float]:
    """Means over the rows by their weights, over all ranks; every rank must call this.

    In the precision of `slimepo.model.modes.scoring`, so that figures compare before and after training; no batch is
    larger than the collator's limits.
    """
    sums, device = MetricSums(), accelerator.device
    rank, ranks = accelerator.process_index, accelerator.num_processes
    with scoring(model) as forward:
        divergence = None
        if reference and "divergence" in objective.asks:
            beside = replace(collator, positions=(MISMATCHED,))
            mine = [i for i, times in shares(scoring_batches(rows.rows, beside), rank, ranks) if times]
            others = [to_device(beside.batch([rows[i] for i in index]), device) for index in mine]
            divergence = mean_log_ratio(forward, reference, others, accelerator)
        for index, times in shares(scoring_batches(rows.rows, collator), rank, ranks):
            batch = to_device(collator.batch([rows[i] for i in index]), device)
            known = reference_logps(reference, [batch])[0] if reference else None
            logps = policy_tokens(forward, batch, objective)
            sums.add(batch, output_of(objective, loss, logps, batch, known, divergence), objective, times)
    return sums.reduced(accelerator).means()
