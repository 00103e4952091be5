"""Objectives without a reference model: SimPO, CPO and ORPO."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimepo.losses.common import (
    check_number,
    chosen_nll,
    mean_logps,
    pair_metrics,
    reward_metrics,
    sum_logps,
)
from slimepo.types import LossOutput, PairLogps


def simpo(
    policy: PairLogps,
    reference: PairLogps | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    nll_weight: float = 0.0,
) -> LossOutput:
    """Simple preference optimisation: L = -log sigma(beta (bar_l(w) - bar_l(l)) - gamma).

    arXiv 2405.14734, Eq. 6. `nll_weight` adds -nll_weight * l_t averaged over all chosen tokens of the global
    batch, which SimPO does not have and some trainers add unasked.

    Args:
        beta: > 0, scale of the reward.
        gamma: the target reward margin; the margin aimed at is gamma / beta, in nats per token.
        nll_weight: >= 0, weight of the likelihood of the chosen answer.

    Returns:
        loss `[pairs]`, the NLL term in `token_loss`; metrics: log-probs per token and the rewards beta * bar_l.

    Example:
        >>> import torch
        >>> from slimepo.losses import simpo
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> simpo(pairs, beta=1.0, gamma=0.5).loss  # means -2 and -4: softplus(-(2 - 0.5))
        tensor([0.2014])
    """
    check_number("beta", beta, above=0)
    check_number("gamma", gamma)
    check_number("nll_weight", nll_weight, at_least=0)
    chosen = beta * mean_logps(policy.chosen, policy.chosen_mask)
    rejected = beta * mean_logps(policy.rejected, policy.rejected_mask)
    metrics = pair_metrics(policy) | reward_metrics(chosen, rejected)
    return LossOutput(-F.logsigmoid(chosen - rejected - gamma), metrics, chosen_nll(policy, nll_weight))


def cpo(
    policy: PairLogps,
    reference: PairLogps | None = None,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
) -> LossOutput:
    """Contrastive preference optimisation: L = -log sigma(beta (l(w) - l(l))) + nll_weight * NLL(w).

    arXiv 2401.08417, Eq. 5 to 7, with l summed over the tokens and the NLL averaged over all chosen tokens of the
    global batch, as TRL's CPOTrainer does (`cpo_alpha` is `nll_weight`).

    Args:
        beta: > 0, scale of the summed log-probs.
        nll_weight: >= 0, weight of the likelihood of the chosen answer.

    Returns:
        loss `[pairs]`, the NLL term in `token_loss`; metrics: log-probs per token and the rewards beta * l.

    Example:
        >>> import torch
        >>> from slimepo.losses import cpo
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> output = cpo(pairs)
        >>> output.loss  # both answers sum to -4: softplus(0)
        tensor([0.6931])
        >>> output.token_loss  # the NLL as a sum, to be divided by the tokens of the whole step
        {'chosen': tensor([4.])}
    """
    check_number("beta", beta, above=0)
    check_number("nll_weight", nll_weight, at_least=0)
    chosen = beta * sum_logps(policy.chosen, policy.chosen_mask)
    rejected = beta * sum_logps(policy.rejected, policy.rejected_mask)
    metrics = pair_metrics(policy) | reward_metrics(chosen, rejected)
    return LossOutput(-F.logsigmoid(chosen - rejected), metrics, chosen_nll(policy, nll_weight))


def orpo(
    policy: PairLogps,
    reference: PairLogps | None = None,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
) -> LossOutput:
    """Odds-ratio preference optimisation: L = NLL(w) - beta * log sigma(log odds(w) - log odds(l)).

    log odds(y) = bar_l(y) - log(1 - exp(bar_l(y))) (arXiv 2403.07691, Eq. 4 to 7). The NLL is averaged over all
    chosen tokens of the global batch; TRL's ORPOTrainer counts the prompt's tokens in it as well.

    Args:
        beta: > 0, weight of the odds ratio (lambda in the paper).
        nll_weight: >= 0, weight of the likelihood of the chosen answer.

    Returns:
        loss `[pairs]`, the NLL term in `token_loss`; metrics: log-probs per token, log odds ratio and the rewards
        beta * bar_l.

    Example:
        >>> import torch
        >>> from slimepo.losses import orpo
        >>> from slimepo.types import PairLogps
        >>> pairs = PairLogps(
        ...     chosen=torch.tensor([[-1.0, -3.0]]), chosen_mask=torch.tensor([[True, True]]),
        ...     rejected=torch.tensor([[-4.0, 0.0]]), rejected_mask=torch.tensor([[True, False]]),
        ... )
        >>> orpo(pairs, beta=1.0).loss  # log odds of exp(-2) and exp(-4): softplus(-(-1.8546 + 3.9815))
        tensor([0.1126])
    """
    check_number("beta", beta, above=0)
    check_number("nll_weight", nll_weight, at_least=0)
    chosen = mean_logps(policy.chosen, policy.chosen_mask)
    rejected = mean_logps(policy.rejected, policy.rejected_mask)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    metrics = pair_metrics(policy) | reward_metrics(beta * chosen, beta * rejected)
    metrics |= {"log_odds_ratio": log_odds_ratio.detach()}
    return LossOutput(-beta * F.logsigmoid(log_odds_ratio), metrics, chosen_nll(policy, nll_weight))


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p; a p of 1 within rounding counts as the largest p below 1, so that it stays finite."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    # 1 - p = -expm1(log p) keeps its digits where p is close to 1; 1 - exp(log p) has none left there.
    return logps - torch.log(-torch.expm1(logps))
