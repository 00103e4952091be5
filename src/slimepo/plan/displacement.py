"""Which pairs will displace likelihood, told before any training, from the model that training starts from.

Two measures of a pair, with a bar for means over an answer's tokens:

- CHES, length-normalised (arXiv 2410.08847, Definition 2): <H_w, H_l> - |H_w|^2, with H the mean of the last hidden
  states that predict an answer's tokens. The higher, the more the chosen answer falls; above 0 the rejected answer's
  gradient outweighs the chosen one's own, if all that trains were the hidden states themselves.
- Entanglement (arXiv 2410.13828): the ratio <g_w, g_l> / |g_w|^2 of the gradients of both answers' mean log-probs. A
  small step on that pair alone raises the chosen answer where the ratio is below 1 (SimPO), below |w| / |l| (DPO, which
  sums over tokens), below 1 + lambda_w / D (SLIME, the floor left out), D the separation's pull at the pair's margin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slimepo.data.batch import StepCollator, collate, to_device
from slimepo.data.rows import PAIR, Row
from slimepo.errors import InputError
from slimepo.losses import hyperparameters, slime
from slimepo.model.logps import causal_lm, head_logps, install_logps
from slimepo.model.modes import scoring
from slimepo.model.score import scoring_batches
from slimepo.monitor.probe import gradient_products
from slimepo.plan.calibrate import separation_pulls

if TYPE_CHECKING:
    from rich.console import Console

FloatArray = NDArray[np.float64]
_SHOWN = 5


@dataclass(frozen=True)
class Forecast:
    """Of pairs in their order, `[pairs]`: CHES, the margin in nats per token, the entanglement ratio (NaN where it was
    not measured), and the ratio above which the chosen answer falls, by objective."""

    ids: list[str]
    ches: FloatArray
    margin: FloatArray
    ratio: FloatArray
    bounds: Mapping[str, FloatArray]

    def fall(self, objective: str) -> FloatArray:
        """1 where a small step of that objective on the pair alone lowers its chosen answer, else 0; NaN as `ratio`."""
        return np.where(np.isnan(self.ratio), np.nan, self.ratio >= self.bounds[objective])


def forecast(
    model: nn.Module,
    rows: Sequence[Row],
    measured: int | None = None,
    batch_size: int = 8,
    report: Callable[[int, int], None] | None = None,
) -> Forecast:
    """Both measures of pairs, with a model as training starts from it.

    Args:
        rows: pairs; those that lack an answer are left out.
        measured: the ratio is that of so many pairs, spread evenly over them; None: of all. It takes two backward
            passes through the whole model a pair.
        report: is told how many passes are done, and of how many.

    Raises:
        InputError: no row has both answers.
    """
    pairs = [row for row in rows if all(len(row.response(i)) for i in PAIR)]
    if not pairs:
        raise InputError("displacement: no row has a chosen and a rejected answer")
    install_logps(model)
    count = len(pairs) if measured is None else min(measured, len(pairs))
    index = np.linspace(0, len(pairs) - 1, count).round().astype(int)
    ches, margin = _hidden_figures(model, pairs, batch_size)
    ratio = np.full(len(pairs), np.nan)
    for done, i in enumerate(index):
        ((ww, wl, _),) = gradient_products(model, [pairs[i]])
        ratio[i] = wl / max(ww, 1e-30)
        if report is not None:
            report(done + 1, count)
    lengths = np.array([[len(row.response(i)) for i in PAIR] for row in pairs], dtype=float)
    bounds = {
        "dpo": lengths[:, 0] / lengths[:, 1],
        "simpo": np.ones(len(pairs)),
        "slime": slime_bound(margin),
    }
    return Forecast([row.id for row in pairs], ches, margin, ratio, bounds)


def slime_bound(margin: FloatArray) -> FloatArray:
    """1 + lambda_w / D at margins `[pairs]`, in nats per token, of SLIME's defaults; past the hard margin none."""
    options: dict[str, Any] = hyperparameters(slime)
    pull = separation_pulls(margin, options)
    return np.where(pull > 0, 1 + options["chosen_weight"] / np.where(pull > 0, pull, 1), np.inf)


def _hidden_figures(model: nn.Module, pairs: Sequence[Row], batch_size: int) -> tuple[FloatArray, FloatArray]:
    """CHES and the margin of pairs, `[pairs]`, from one forward pass."""
    collator, inner = StepCollator(batch_size), causal_lm(model)
    device = next(model.parameters()).device
    figures = np.zeros((2, len(pairs)))
    with scoring(model):
        for index in scoring_batches(pairs, collator):
            batch = to_device(collate([pairs[i] for i in index]), device)
            # Attention is causal and padding stands behind every real token: no mask is needed.
            hidden = inner.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
            selected_NH = hidden.reshape(-1, hidden.shape[-1])[batch["predict_at"]]
            logps_N = head_logps(inner, selected_NH, batch["targets"])
            lengths = [count for of_position in batch["response_tokens"] for count in of_position]
            # Of each response, `[2, rows, H]` and `[2, rows, 1]`.
            (chosen, rejected), bars = (
                torch.stack([part.double().mean(dim=0) for part in values.split(lengths)]).view(
                    2, len(index), -1
                )
                for values in (selected_NH, logps_N)
            )
            figures[0, index] = ((chosen * rejected).sum(-1) - chosen.square().sum(-1)).cpu().numpy()
            figures[1, index] = (bars[0] - bars[1])[:, 0].cpu().numpy()
    return figures[0], figures[1]


def lowest(found: Forecast, share: float) -> set[str]:
    """The ids of that share of the pairs, those whose CHES is lowest; at least one."""
    order = np.argsort(found.ches, kind="stable")
    return {found.ids[i] for i in order[: max(1, round(share * len(order)))]}


def print_forecast(found: Forecast, console: Console, describe: Callable[[str], str]) -> None:
    """CHES over the pairs, the shares that are expected to displace, and the worst pairs with what `describe` says."""
    low, middle, high = np.quantile(found.ches, [0.05, 0.5, 0.95])
    console.print(
        f"CHES of {len(found.ids)} pairs, per token: {low:.3g} to {high:.3g} for nine of ten, {middle:.3g} in the "
        f"middle; above 0 in {np.mean(found.ches > 0):.1%}",
        highlight=False,
    )
    measured = int((~np.isnan(found.ratio)).sum())
    for objective in found.bounds if measured else ():
        console.print(
            f"{objective}: a small step on the pair alone lowers the chosen answer of "
            f"{np.nanmean(found.fall(objective)):.1%} of {measured} pairs",
            highlight=False,
        )
    for i in np.argsort(-found.ches, kind="stable")[:_SHOWN]:
        ratio = "" if np.isnan(found.ratio[i]) else f", entanglement {found.ratio[i]:.2f}"
        console.print(
            f"CHES {found.ches[i]:.3g}{ratio}: {describe(found.ids[i])}", highlight=False, markup=False
        )
