"""Objectives that go by more than a pair's own log-probs: its rewards, who wrote it, or the other pairs."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slimepo.losses.common import (
    check_choice,
    check_number,
    log_ratios,
    pair_metrics,
    reward_metrics,
    sum_logps,
)
from slimepo.losses.dpo import dpo, smoothed_logistic
from slimepo.types import LossOutput, PairLogps


def xpo(
    policy: PairLogps,
    reference: PairLogps,
    opponent: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1e-5,
) -> LossOutput:
    """Exploratory preference optimisation (arXiv 2405.21046, Algorithm 1): DPO, and away from what is known already.

    Of each pair one answer is the policy's own and one, y', of an opponent, which is the reference as published. With
    log pi(y') summed over its tokens::

        L = -log sigma(beta (r_w - r_l)) + alpha * log pi(y')

    Args:
        opponent: `[pairs, 2]`, 1 where the chosen, or the rejected, response is the opponent's, else 0.
        beta: > 0, strength of the tie to the reference.
        alpha: >= 0, weight of the exploration.

    Returns:
        loss `[pairs]`; metrics: both terms, and those of `dpo`.

    Example:
        >>> import torch
        >>> from slimepo.losses import xpo
        >>> from slimepo.losses.example import after, before
        >>> lost = torch.tensor([[0.0, 1.0]])
        >>> xpo(after, before, lost, beta=0.5, alpha=0.01).loss  # 0.3133 of dpo, and 0.01 * -4
        tensor([0.2733])
    """
    check_number("alpha", alpha, at_least=0)
    output = dpo(policy, reference, beta=beta)
    sums = [sum_logps(policy.chosen, policy.chosen_mask), sum_logps(policy.rejected, policy.rejected_mask)]
    logps_B2 = torch.stack(sums, dim=-1)
    exploration = alpha * (opponent.to(logps_B2) * logps_B2).sum(dim=-1)
    terms = {"loss/preference": output.loss.detach(), "loss/exploration": exploration.detach()}
    return LossOutput(output.loss + exploration, {**output.metrics, **terms})


def reward_aware_rpo(
    policy: PairLogps,
    reference: PairLogps,
    rewards: Tensor,
    *,
    beta: float = 0.05,
    scale: float = 1.0,
    distance: Literal["backward_kl", "forward_kl", "squared"] = "backward_kl",
) -> LossOutput:
    """Reward-aware preference optimisation: the implicit margin h is to be the margin g of given rewards.

    NeMo-RL's RPO (`preference_loss: rpo_bwd_kl`, `rpo_fwd_kl`, `rpo_sq`; arXiv 2406.11704), which shares no more than
    its name with `rpo`. With h = beta (r_w - r_l), g = scale * (R_w - R_l) and B(x) a coin that shows heads with
    sigma(x)::

        L = KL(B(g) || B(h))    backward_kl
        L = KL(B(h) || B(g))    forward_kl
        L = (h - g)^2           squared

    Args:
        rewards: `[pairs, 2]`, R of the chosen and the rejected response.
        beta: > 0, strength of the tie to the reference.
        scale: > 0, of the rewards.
        distance: how far h is from g.

    Returns:
        loss `[pairs]`; metrics: log-probs per token, the implicit rewards beta * r, and `reward_gap` g.

    Example:
        >>> import torch
        >>> from slimepo.losses import reward_aware_rpo
        >>> from slimepo.losses.example import after, before
        >>> given = torch.tensor([[3.0, 1.0]])
        >>> reward_aware_rpo(after, before, given, beta=0.5, scale=0.25, distance="squared").loss  # (1 - .5) ** 2
        tensor([0.2500])
    """
    check_number("beta", beta, above=0)
    check_number("scale", scale, above=0)
    check_choice("distance", distance, ("backward_kl", "forward_kl", "squared"))
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    h = chosen - rejected
    given = rewards.to(h)
    g = scale * (given[:, 0] - given[:, 1])
    if distance == "squared":
        loss = (h - g) ** 2
    else:
        p, q = (g, h) if distance == "backward_kl" else (h, g)
        loss = torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q))
        loss = loss + torch.sigmoid(-p) * (F.logsigmoid(-p) - F.logsigmoid(-q))
    metrics = pair_metrics(policy) | reward_metrics(chosen, rejected)
    return LossOutput(loss, metrics | {"reward_gap": torch.where(metrics["margin"].isnan(), torch.nan, g)})


def aot(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> LossOutput:
    """Alignment by optimal transport, paired: the margins of all pairs are to dominate the reference's, rank by rank.

    With m the margin l_w - l_l of a pair, summed over tokens, and M the reference's margin of the same rank among the
    pairs that are given here, L = -log sigma(beta (m - M)) (arXiv 2406.05882).

    Ranks are those of a micro-batch: a step depends on how it is cut, unless one micro-batch holds it.

    Args:
        beta: > 0, strength of the tie to the reference.
        label_smoothing: 0 <= e < 0.5, as of `dpo`.

    Returns:
        loss `[pairs]`, of the pair whose margin m is; metrics: log-probs per token and the implicit rewards beta * r.

    Example:
        >>> from slimepo.losses import aot
        >>> from slimepo.losses.example import after, before
        >>> aot(after, before, beta=0.5).loss  # of a single pair it is dpo
        tensor([0.3133])
    """
    check_number("beta", beta, above=0)
    check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    ours, theirs = (
        sum_logps(logps.chosen, policy.chosen_mask) - sum_logps(logps.rejected, policy.rejected_mask)
        for logps in (policy, reference)
    )
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    loss = smoothed_logistic(beta * (ours - _of_the_same_rank(theirs, ours)), label_smoothing)
    return LossOutput(loss, pair_metrics(policy) | reward_metrics(chosen, rejected))


def aot_unpaired(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> LossOutput:
    """Alignment by optimal transport, unpaired: chosen log-ratios are to dominate rejected ones, rank by rank.

    L = -log sigma(beta (r_w - R)) with R the log-ratio of the same rank among the rejected answers that are given here
    (arXiv 2406.05882): which answer stood beside which does not count. Ranks are those of a micro-batch, as of `aot`.

    Args:
        beta: > 0, strength of the tie to the reference.
        label_smoothing: 0 <= e < 0.5, as of `dpo`.

    Returns:
        loss `[pairs]`, of the pair whose chosen answer it is; metrics as of `aot`.

    Example:
        >>> from slimepo.losses import aot_unpaired
        >>> from slimepo.losses.example import after, before
        >>> aot_unpaired(after, before, beta=0.5).loss  # of a single pair it is dpo
        tensor([0.3133])
    """
    check_number("beta", beta, above=0)
    check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    loss = smoothed_logistic(chosen - _of_the_same_rank(rejected, chosen), label_smoothing)
    return LossOutput(loss, pair_metrics(policy) | reward_metrics(chosen, rejected))


def _of_the_same_rank(values: Tensor, ranked: Tensor) -> Tensor:
    """For each of `ranked`, the one of `values` that has its rank; both `[pairs]`."""
    ranks = ranked.detach().argsort(stable=True).argsort(stable=True)
    return values.sort(stable=True).values[ranks]
