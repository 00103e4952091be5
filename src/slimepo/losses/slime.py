"""SLIME, the objective of arXiv 2602.02383."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slimepo.losses.common import (
    check_choice,
    check_number,
    masked,
    mean_logps,
    pair_metrics,
    sum_logps,
    token_counts,
)
from slimepo.types import LossOutput, PairLogps


def slime(
    policy: PairLogps,
    reference: PairLogps | None = None,
    *,
    chosen_weight: float = 0.1,
    rejected_weight: float = 0.1,
    distance_weight: float = 1.0,
    threshold: float = 1.25,
    hard_margin: float = 1.5,
    soft_margin: float = 1.0,
    sharpness: float = 2.5,
    exponent: float = 2.5,
    max_slope: float | None = None,
    length_normalized: bool = True,
    rejected_mean: Literal["sequence", "token", "micro_batch"] = "sequence",
    hard_gate: Literal["relu", "one", "softplus", "linear"] = "relu",
    soft_gate: Literal["sigmoid", "one"] = "sigmoid",
) -> LossOutput:
    """Anchor the chosen answer, keep a floor under the rejected one's tokens, separate the two.

    With l_t the log-probability of a response token, a bar for the mean over a response's tokens and
    Delta = bar_l(w) - bar_l(l) (arXiv 2602.02383, Eq. 5-10)::

        L      = L_w + L_l + L_dist
        L_w    = -chosen_weight * bar_l(w)
        L_l    =  rejected_weight * mean over t in l of softplus(-l_t - threshold) ** exponent
        L_dist =  distance_weight * relu(hard_margin - Delta) * sigmoid(-sharpness * (Delta - soft_margin))

    Args:
        chosen_weight: lambda_w >= 0, weight of the anchor on the chosen answer.
        rejected_weight: lambda_l >= 0, weight of the floor under the rejected tokens.
        distance_weight: lambda_d >= 0, weight of the separation.
        threshold: delta >= 0; rejected tokens below -delta nats are pushed back up.
        hard_margin: m_h >= 0, in nats per token; pairs past it are not separated further.
        soft_margin: m_s, in nats per token; the middle of the sigmoid.
        sharpness: kappa > 0, slope of the sigmoid.
        exponent: p >= 1, how steeply the floor rises.
        max_slope: > 0, the most that the floor pulls at a token, |dL_l/dl_t| times the answer's tokens: from the point
            where it pulls so hard the floor goes on as a line. None: no bound; at -30 nats it is 38.5.
        length_normalized: False takes sums over tokens instead of means in L_w and Delta (Eq. 6 and 8 as
            printed; Appendix A says means).
        rejected_mean: "sequence" averages the floor over each rejected response, then over pairs; "token"
            weighs every rejected token of the global batch alike; "micro_batch" averages over the rejected tokens of
            the pairs given here whose log-prob is not exactly 0, as the authors' code does, so that the result
            depends on how a step is cut.
        hard_gate: "relu" as above; "one" drops the hard margin (ablation 'w/o hard margin'); "softplus" and
            "linear" are its other readings, softplus(m_h - Delta) and the unclamped m_h - Delta.
        soft_gate: "sigmoid" as above; "one" drops the soft margin.

    Returns:
        loss `[pairs]`; metrics: the three terms (`loss/rejected` as its mean per response also with "token"), log-probs
        per token, margin (their difference), accuracy (margin > 0), past_hard_margin and past_soft_margin (of Delta),
        rejected_below_floor (share of a response's rejected tokens below -threshold).

    Example:
        >>> import torch
        >>> from slimepo.losses import slime
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> output = slime(pairs, threshold=4.0, exponent=1.0)
        >>> output.metrics["loss/chosen"]  # 0.1 * 2
        tensor([0.2000])
        >>> output.metrics["loss/rejected"]  # 0.1 * softplus(4 - 4)
        tensor([0.0693])
        >>> output.loss  # Delta = -2 + 4 is past the hard margin of 1.5: nothing is separated further
        tensor([0.2693])
    """
    check_number("chosen_weight", chosen_weight, at_least=0)
    check_number("rejected_weight", rejected_weight, at_least=0)
    check_number("distance_weight", distance_weight, at_least=0)
    check_number("threshold", threshold, at_least=0)
    check_number("hard_margin", hard_margin, at_least=0)
    check_number("soft_margin", soft_margin)
    check_number("sharpness", sharpness, above=0)
    check_number("exponent", exponent, at_least=1)
    if max_slope is not None:
        check_number("max_slope", max_slope, above=0)
    check_choice("rejected_mean", rejected_mean, ("sequence", "token", "micro_batch"))
    check_choice("hard_gate", hard_gate, ("relu", "one", "softplus", "linear"))
    check_choice("soft_gate", soft_gate, ("sigmoid", "one"))

    of_response = mean_logps if length_normalized else sum_logps
    chosen = of_response(policy.chosen, policy.chosen_mask)
    delta = chosen - of_response(policy.rejected, policy.rejected_mask)

    anchor = -chosen_weight * chosen
    line = math.inf if max_slope is None or not rejected_weight else max_slope / rejected_weight
    floor_BT = rejected_weight * _floor(policy, threshold, exponent, line)
    if rejected_mean == "micro_batch":
        # The authors' code tells tokens from padding by a log-prob that is not exactly 0.
        counted_BT = policy.rejected_mask & (policy.rejected != 0)
        floor = masked(floor_BT, counted_BT).sum() / counted_BT.sum().clamp(min=1)
        floor = floor.expand_as(chosen)
    else:
        floor = floor_BT.sum(dim=-1) / token_counts(policy.rejected_mask, floor_BT)
    distance = distance_weight * _hard_gate(hard_margin - delta, hard_gate)
    if soft_gate == "sigmoid":
        distance = distance * torch.sigmoid(-sharpness * (delta - soft_margin))

    delta = delta.detach()
    below_BT = (policy.rejected.detach() < -threshold) & policy.rejected_mask
    metrics = pair_metrics(policy) | {
        "loss/chosen": anchor.detach(),
        "loss/rejected": floor.detach(),
        "loss/distance": distance.detach(),
        "past_hard_margin": (delta >= hard_margin).to(delta.dtype),
        "past_soft_margin": (delta >= soft_margin).to(delta.dtype),
        "rejected_below_floor": below_BT.sum(dim=-1) / token_counts(policy.rejected_mask, delta),
    }
    if rejected_mean == "token":
        return LossOutput(anchor + distance, metrics, token_loss={"rejected": floor_BT.sum(dim=-1)})
    return LossOutput(anchor + floor + distance, metrics)


def _floor(policy: PairLogps, threshold: float, exponent: float, max_slope: float) -> Tensor:
    """softplus(-l_t - delta)^p of every rejected token, a line where its slope would be more than `max_slope`, 0 where
    there is no token: `[pairs, tokens]`."""
    logps_BT = masked(policy.rejected, policy.rejected_mask)
    below_BT = -logps_BT - threshold
    held_BT = below_BT.clamp(max=_where_slope_is(max_slope, exponent)) if max_slope < math.inf else below_BT
    # -logsigmoid(-x) is softplus(x), exact in both tails where F.softplus switches to a line.
    raised_BT = (-F.logsigmoid(-held_BT)) ** exponent
    if max_slope < math.inf:
        raised_BT = raised_BT + max_slope * (below_BT - held_BT)
    return masked(raised_BT, policy.rejected_mask)


def _where_slope_is(slope: float, exponent: float) -> float:
    """The x at which softplus(x)^p, whose slope rises with x, has that slope; infinity where it has it nowhere."""

    def at(x: float) -> float:
        softplus = x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))
        return exponent * math.pow(softplus, exponent - 1) * math.exp(x - softplus)

    low, high = -500.0, 1.0
    while at(high) < slope:
        low, high = high, 2 * high
        if high > 1e9:
            return math.inf
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) < slope else (low, middle)
    return high


def _hard_gate(room: Tensor, kind: str) -> Tensor:
    """The gate of the hard margin on `room` = m_h - Delta."""
    match kind:
        case "relu":
            return F.relu(room)
        case "softplus":
            return -F.logsigmoid(-room)
        case "linear":
            return room
        case _:
            return torch.ones_like(room)
