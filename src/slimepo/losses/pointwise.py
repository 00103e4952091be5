"""Objectives that pull each answer of a pair by its own log-ratio to a reference model, not by the margin alone.

Write r for a response's log-ratio to the reference, summed over its tokens, w = beta r_w and v = beta r_l for the
implicit rewards of the chosen and the rejected response.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from slimepo.losses.common import LogRatios, check_number, log_ratios, pair_metrics, reward_metrics
from slimepo.types import LossOutput, PairLogps


def nca_pair(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> LossOutput:
    """Noise contrastive alignment of a pair: L = -log sigma(w) - (log sigma(-w) + log sigma(-v)) / 2.

    arXiv 2402.05369, whose loss for any number of rewarded answers this is where the better of two has all the reward.
    The chosen answer's best reward is log 2, so that it is not pushed on for ever.

    Args:
        beta: > 0, strength of the tie to the reference.

    Returns:
        loss `[pairs]`; metrics: log-probs per token and the implicit rewards.

    Example:
        >>> from slimepo.losses import nca_pair
        >>> from slimepo.losses.example import after, before
        >>> nca_pair(after, before, beta=0.5).loss  # w = .5 and v = -.5: .4741 + (.9741 + .4741) / 2
        tensor([1.1982])
    """
    w, v = _rewards(policy, reference, beta)
    loss = -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-v)
    return LossOutput(loss, pair_metrics(policy) | reward_metrics(w, v))


def bco_pair(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> LossOutput:
    """Binary classifier optimisation of a pair: L = -log sigma(w) - log sigma(-v).

    Two logistic losses, one a side (arXiv 2404.04656), without the running shift of rewards that its authors take for
    answers without a partner.

    Args:
        beta: > 0, strength of the tie to the reference.

    Returns:
        as of `nca_pair`.

    Example:
        >>> from slimepo.losses import bco_pair
        >>> from slimepo.losses.example import after, before
        >>> bco_pair(after, before, beta=0.5).loss  # w = .5 and v = -.5: twice softplus(-.5)
        tensor([0.9482])
    """
    w, v = _rewards(policy, reference, beta)
    return LossOutput(-F.logsigmoid(w) - F.logsigmoid(-v), pair_metrics(policy) | reward_metrics(w, v))


def sppo_hard(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> LossOutput:
    """Self-play preference optimisation with hard labels: L = (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2.

    arXiv 2405.00675, Eq. 4.7, with a probability of 1 that the chosen answer wins.

    Args:
        beta: > 0; the log-ratios aimed at are 1 / (2 beta) and -1 / (2 beta), summed over tokens.

    Returns:
        as of `nca_pair`.

    Example:
        >>> from slimepo.losses import sppo_hard
        >>> from slimepo.losses.example import after, before
        >>> sppo_hard(after, before, beta=0.25).loss  # (1 - 2) ** 2 + (-1 + 2) ** 2
        tensor([2.])
    """
    w, v = _rewards(policy, reference, beta)
    return LossOutput(
        ((w - 0.5) ** 2 + (v + 0.5) ** 2) / beta**2, pair_metrics(policy) | reward_metrics(w, v)
    )


def apo_zero(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> LossOutput:
    """Anchored preference optimisation, zero: L = sigma(-w) + sigma(v), up with the chosen and down with the rejected.

    arXiv 2408.06266, Eq. 7; for pairs whose chosen answer is better than what the model says.

    Args:
        beta: > 0, strength of the tie to the reference.

    Returns:
        as of `nca_pair`.

    Example:
        >>> from slimepo.losses import apo_zero
        >>> from slimepo.losses.example import after, before
        >>> apo_zero(after, before, beta=0.5).loss  # twice sigma(-.5)
        tensor([0.7551])
    """
    w, v = _rewards(policy, reference, beta)
    return LossOutput(torch.sigmoid(-w) + torch.sigmoid(v), pair_metrics(policy) | reward_metrics(w, v))


def apo_down(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> LossOutput:
    """Anchored preference optimisation, down: L = sigma(w) + sigma(v - w), both down and the rejected one further.

    arXiv 2408.06266, Eq. 8; for pairs whose chosen answer is worse than what the model says.

    Args:
        beta: > 0, strength of the tie to the reference.

    Returns:
        as of `nca_pair`.

    Example:
        >>> from slimepo.losses import apo_down
        >>> from slimepo.losses.example import after, before
        >>> apo_down(after, before, beta=0.5).loss  # sigma(.5) + sigma(-1)
        tensor([0.8914])
    """
    w, v = _rewards(policy, reference, beta)
    return LossOutput(torch.sigmoid(w) + torch.sigmoid(v - w), pair_metrics(policy) | reward_metrics(w, v))


def _rewards(policy: PairLogps, reference: PairLogps, beta: float) -> LogRatios:
    check_number("beta", beta, above=0)
    return LogRatios(*(beta * ratio for ratio in log_ratios(policy, reference)))
