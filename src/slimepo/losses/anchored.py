"""Objectives on log-ratios that hold the chosen answer up beside the margin."""

from __future__ import annotations

import torch.nn.functional as F

from slimepo.losses.common import check_number, log_ratios, mean_logps, pair_metrics, reward_metrics
from slimepo.losses.dpo import dpo
from slimepo.types import LossOutput, PairLogps


def rpo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, eta: float = 0.2) -> LossOutput:
    """DPO with an anchor on the chosen answer: L = -log sigma(beta (r_w - r_l)) - eta * bar_l(w).

    Regularised preference optimisation (arXiv 2405.16436), with the anchor averaged over the response's tokens.

    Args:
        beta: > 0, strength of the tie to the reference.
        eta: >= 0, weight of the anchor.

    Returns:
        loss `[pairs]`; metrics: both terms, log-probs per token and the implicit rewards beta * r.

    Example:
        >>> from slimepo.losses import rpo
        >>> from slimepo.losses.example import after, before
        >>> rpo(after, before, beta=0.5, eta=0.1).loss  # 0.3133 of dpo and the anchor 0.1 * 2
        tensor([0.5133])
    """
    check_number("eta", eta, at_least=0)
    output = dpo(policy, reference, beta=beta)
    anchor = -eta * mean_logps(policy.chosen, policy.chosen_mask)
    terms = {"loss/preference": output.loss.detach(), "loss/nll": anchor.detach()}
    return LossOutput(output.loss + anchor, {**output.metrics, **terms})


def dpop(policy: PairLogps, reference: PairLogps, *, beta: float = 0.3, penalty: float = 50.0) -> LossOutput:
    """DPO-Positive: L = -log sigma(beta (r_w - r_l - penalty * max(0, -r_w))).

    A chosen answer that has become less likely than under the reference costs margin (arXiv 2402.13228).

    Args:
        beta: > 0, strength of the tie to the reference.
        penalty: lambda >= 0, in margin for every nat that the chosen answer lost.

    Returns:
        loss `[pairs]`; metrics: log-probs per token, the implicit rewards beta * r, and `penalized`, 1 where the chosen
        answer has lost.

    Example:
        >>> from slimepo.losses import dpop
        >>> from slimepo.losses.example import after, before
        >>> dpop(after, before, beta=0.5).loss  # the chosen answer has gained: 0.3133 of dpo
        tensor([0.3133])
        >>> dpop(before, after, beta=0.5, penalty=2).loss  # it has lost 1 nat: softplus(0.5 * (2 + 2))
        tensor([2.1269])
    """
    check_number("beta", beta, above=0)
    check_number("penalty", penalty, at_least=0)
    ratios = log_ratios(policy, reference)
    margin = ratios.chosen - ratios.rejected - penalty * F.relu(-ratios.chosen)
    metrics = pair_metrics(policy) | reward_metrics(beta * ratios.chosen, beta * ratios.rejected)
    metrics |= {"penalized": (ratios.chosen.detach() < 0).to(margin.dtype)}
    return LossOutput(-F.logsigmoid(beta * margin), metrics)


def cal_dpo(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, calibration_weight: float = 0.5
) -> LossOutput:
    """Calibrated DPO, whose rewards are to have a given size: with c = 1 / (2 beta),

    L = -log sigma(r_w - r_l) + calibration_weight * ((r_w - c)^2 + (r_l + c)^2) (arXiv 2412.14516).

    Args:
        beta: > 0; the log-ratios aimed at are c and -c, summed over tokens. Its authors run 0.002 on long answers.
        calibration_weight: >= 0; 0.5 in the authors' code (github.com/tengxiao1/Cal-DPO at d6bf4fb).

    Returns:
        loss `[pairs]`; metrics: both terms, log-probs per token and the implicit rewards r.

    Example:
        >>> from slimepo.losses import cal_dpo
        >>> from slimepo.losses.example import after, before
        >>> cal_dpo(after, before, beta=0.25).loss  # softplus(-2) + 0.5 * ((1 - 2) ** 2 + (-1 + 2) ** 2)
        tensor([1.1269])
    """
    check_number("beta", beta, above=0)
    check_number("calibration_weight", calibration_weight, at_least=0)
    chosen, rejected = log_ratios(policy, reference)
    preference = -F.logsigmoid(chosen - rejected)
    aim = 1 / (2 * beta)
    calibration = calibration_weight * ((chosen - aim) ** 2 + (rejected + aim) ** 2)
    terms = {"loss/preference": preference.detach(), "loss/calibration": calibration.detach()}
    return LossOutput(
        preference + calibration, pair_metrics(policy) | reward_metrics(chosen, rejected) | terms
    )


def dpo_shift(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, rejected_share: float = 0.75
) -> LossOutput:
    """DPO-Shift: L = -log sigma(beta (r_w - f r_l)), the rejected answer pushed down less than the chosen one up.

    arXiv 2502.07599, with a fixed f.

    Args:
        beta: > 0, strength of the tie to the reference.
        rejected_share: 0 < f <= 1; its authors go from 0.5 to 1, where it is `dpo`.

    Returns:
        loss `[pairs]`; metrics: log-probs per token and the implicit rewards beta * r_w and beta * f * r_l.

    Example:
        >>> from slimepo.losses import dpo_shift
        >>> from slimepo.losses.example import after, before
        >>> dpo_shift(after, before, beta=0.5, rejected_share=0.6).loss  # softplus(-0.5 * (1 + 0.6))
        tensor([0.3711])
    """
    check_number("beta", beta, above=0)
    check_number("rejected_share", rejected_share, above=0, at_most=1)
    ratios = log_ratios(policy, reference)
    chosen, rejected = beta * ratios.chosen, beta * rejected_share * ratios.rejected
    return LossOutput(
        -F.logsigmoid(chosen - rejected), pair_metrics(policy) | reward_metrics(chosen, rejected)
    )


def lpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.2,
    chosen_rate: float = 1.0,
    rejected_rate: float = 0.8,
    hinge_weight: float = 5.0,
) -> LossOutput:
    """Linear preference optimisation, whose two sides learn apart from each other.

    arXiv 2508.14947. With x1, x2 the log-ratios per token of the chosen and the rejected response, sg() a stopped
    gradient, r1 and r2 the two rates and o = 1 / (2 beta)::

        L = 2 beta * 2 / (r1 + r2) * (r1 |x1 - sg(x2) - o| + r2 |sg(x1) - x2 - o|) + hinge_weight * max(0, -x1)

    Args:
        beta: > 0; the offset aimed at is 1 / (2 beta), in nats per token.
        chosen_rate, rejected_rate: r1 and r2 > 0, how fast either side moves; a small r2 rejects gently.
        hinge_weight: >= 0, pull on chosen answers that have become less likely than under the reference.

    Returns:
        loss `[pairs]`; metrics: both terms, log-probs per token and the implicit rewards beta * x.

    Example:
        >>> from slimepo.losses import lpo
        >>> from slimepo.losses.example import after, before
        >>> lpo(after, before, beta=0.5, rejected_rate=1.0).loss  # x1 = 0.5, x2 = -1: |1.5 - 1| twice, no hinge
        tensor([1.])
    """
    check_number("beta", beta, above=0)
    check_number("chosen_rate", chosen_rate, above=0)
    check_number("rejected_rate", rejected_rate, above=0)
    check_number("hinge_weight", hinge_weight, at_least=0)
    x1, x2 = log_ratios(policy, reference, length_normalized=True)
    offset = 1 / (2 * beta)
    chosen = chosen_rate * (x1 - x2.detach() - offset).abs()
    rejected = rejected_rate * (x1.detach() - x2 - offset).abs()
    distance = 4 * beta / (chosen_rate + rejected_rate) * (chosen + rejected)
    hinge = hinge_weight * F.relu(-x1)
    metrics = pair_metrics(policy) | reward_metrics(beta * x1, beta * x2)
    metrics |= {"loss/preference": distance.detach(), "loss/hinge": hinge.detach()}
    return LossOutput(distance + hinge, metrics)
