"""Objectives without a reference model: SimPO, CPO, ORPO and their kin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimepo.errors import InputError
from slimepo.losses.common import (
    check_number,
    chosen_nll,
    exp_then_line,
    mean_logps,
    pair_metrics,
    reward_metrics,
    sum_logps,
)
from slimepo.losses.dpo import smoothed_logistic
from slimepo.types import LossOutput, PairLogps, SampleLogps


def simpo(
    policy: PairLogps,
    reference: PairLogps | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
) -> LossOutput:
    """Simple preference optimisation: L = -log sigma(beta (bar_l(w) - bar_l(l)) - gamma).

    arXiv 2405.14734, Eq. 6. `nll_weight` adds -nll_weight * l_t averaged over all chosen tokens of the global
    batch, which SimPO does not have and some trainers add unasked.

    Args:
        beta: > 0, scale of the reward.
        gamma: the target reward margin; the margin aimed at is gamma / beta, in nats per token.
        label_smoothing: 0 <= e < 0.5, as of `dpo`.
        nll_weight: >= 0, weight of the likelihood of the chosen answer.

    Returns:
        loss `[pairs]`, the NLL term in `token_loss`; metrics: log-probs per token and the rewards beta * bar_l.

    Example:
        >>> from slimepo.losses import simpo
        >>> from slimepo.losses.example import after
        >>> simpo(after, beta=1.0, gamma=0.5).loss  # means -2 and -4: softplus(-(2 - 0.5))
        tensor([0.2014])
    """
    check_number("beta", beta, above=0)
    check_number("gamma", gamma)
    check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    check_number("nll_weight", nll_weight, at_least=0)
    chosen = beta * mean_logps(policy.chosen, policy.chosen_mask)
    rejected = beta * mean_logps(policy.rejected, policy.rejected_mask)
    metrics = pair_metrics(policy) | reward_metrics(chosen, rejected)
    loss = smoothed_logistic(chosen - rejected - gamma, label_smoothing)
    return LossOutput(loss, metrics, chosen_nll(policy, nll_weight))


def cpo(
    policy: PairLogps,
    reference: PairLogps | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
) -> LossOutput:
    """Contrastive preference optimisation: L = -log sigma(beta (l(w) - l(l))) + nll_weight * NLL(w).

    arXiv 2401.08417, Eq. 5 to 7, with l summed over the tokens and the NLL averaged over all chosen tokens of the
    global batch, as TRL's CPOTrainer does (`cpo_alpha` is `nll_weight`).

    Args:
        beta: > 0, scale of the summed log-probs.
        label_smoothing: 0 <= e < 0.5, as of `dpo`.
        nll_weight: >= 0, weight of the likelihood of the chosen answer.

    Returns:
        loss `[pairs]`, the NLL term in `token_loss`; metrics: log-probs per token and the rewards beta * l.

    Example:
        >>> from slimepo.losses import cpo
        >>> from slimepo.losses.example import after
        >>> output = cpo(after)
        >>> output.loss  # both answers sum to -4: softplus(0)
        tensor([0.6931])
        >>> output.token_loss  # the NLL as a sum, to be divided by the tokens of the whole step
        {'chosen': tensor([4.])}
    """
    check_number("beta", beta, above=0)
    check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    check_number("nll_weight", nll_weight, at_least=0)
    chosen = beta * sum_logps(policy.chosen, policy.chosen_mask)
    rejected = beta * sum_logps(policy.rejected, policy.rejected_mask)
    metrics = pair_metrics(policy) | reward_metrics(chosen, rejected)
    loss = smoothed_logistic(chosen - rejected, label_smoothing)
    return LossOutput(loss, metrics, chosen_nll(policy, nll_weight))


def slic(
    policy: PairLogps,
    reference: PairLogps | None = None,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
) -> LossOutput:
    """Sequence likelihood calibration: L = max(0, 1 - beta (l(w) - l(l))) + nll_weight * NLL(w).

    arXiv 2305.10425 with l summed over the tokens and the chosen answer as its target of regularisation; TRL's
    CPOTrainer with `loss_type="hinge"`. `hinge` is its form with a reference.

    Args:
        beta: > 0; the margin aimed at is 1 / beta.
        nll_weight: >= 0, weight of the likelihood of the chosen answer.

    Returns:
        as of `cpo`.

    Example:
        >>> from slimepo.losses import slic
        >>> from slimepo.losses.example import after
        >>> slic(after).loss  # both answers sum to -4
        tensor([1.])
    """
    check_number("beta", beta, above=0)
    check_number("nll_weight", nll_weight, at_least=0)
    chosen = beta * sum_logps(policy.chosen, policy.chosen_mask)
    rejected = beta * sum_logps(policy.rejected, policy.rejected_mask)
    metrics = pair_metrics(policy) | reward_metrics(chosen, rejected)
    return LossOutput(F.relu(1 - (chosen - rejected)), metrics, chosen_nll(policy, nll_weight))


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
        >>> from slimepo.losses import orpo
        >>> from slimepo.losses.example import after
        >>> orpo(after, beta=1.0).loss  # log odds of exp(-2) and exp(-4): softplus(-(-1.8546 + 3.9815))
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


def alpha_po(
    policy: PairLogps,
    *,
    alpha: float = 0.25,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    nll_weight: float = 0.0,
) -> LossOutput:
    """AlphaPO: SimPO with a reward of another shape, R(y) = (1 - exp(-alpha bar_l(y))) / alpha.

    L = -log sigma(beta (R(w) - R(l)) - gamma) (arXiv 2501.03884); with alpha -> 0 the reward is bar_l, SimPO's.
    Beyond e^20 the exponential goes on along its tangent.

    Args:
        alpha: not 0; above it unlikely answers are set further apart, below it likely ones.
        beta, gamma, label_smoothing, nll_weight: as of `simpo`.

    Returns:
        as of `simpo`, with the rewards beta * R.

    Example:
        >>> from slimepo.losses import alpha_po
        >>> from slimepo.losses.example import after
        >>> alpha_po(after, alpha=-0.5, beta=1.0).loss  # R = -2 (1 - e^-1) and -2 (1 - e^-2): softplus(-(.4651 - .5))
        tensor([0.7108])
    """
    check_number("alpha", alpha)
    if alpha == 0:
        raise InputError("alpha = 0 is simpo: give that loss, or another alpha, such as 0.25")
    check_number("beta", beta, above=0)
    check_number("gamma", gamma)
    check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    check_number("nll_weight", nll_weight, at_least=0)
    chosen, rejected = (
        beta * (1 - exp_then_line(-alpha * mean_logps(logps, mask))) / alpha
        for logps, mask in ((policy.chosen, policy.chosen_mask), (policy.rejected, policy.rejected_mask))
    )
    metrics = pair_metrics(policy) | reward_metrics(chosen, rejected)
    loss = smoothed_logistic(chosen - rejected - gamma, label_smoothing)
    return LossOutput(loss, metrics, chosen_nll(policy, nll_weight))


def simper(policy: PairLogps) -> LossOutput:
    """SimPER: L = exp(bar_l(l)) - exp(bar_l(w)), inverse perplexities and nothing to set (arXiv 2502.00883).

    Returns:
        loss `[pairs]`, between -1 and 1; metrics: log-probs per token and the rewards exp(bar_l).

    Example:
        >>> from slimepo.losses import simper
        >>> from slimepo.losses.example import after
        >>> simper(after).loss  # e^-4 - e^-2
        tensor([-0.1170])
    """
    chosen = mean_logps(policy.chosen, policy.chosen_mask).exp()
    rejected = mean_logps(policy.rejected, policy.rejected_mask).exp()
    return LossOutput(rejected - chosen, pair_metrics(policy) | reward_metrics(chosen, rejected))


def bopo(policy: PairLogps, weight: Tensor) -> LossOutput:
    """Best-anchored, objective-guided preference optimisation: L = -log sigma(weight * (bar_l(w) - bar_l(l))).

    arXiv 2503.07580, for answers with a cost g: the chosen one is the best, and a pair weighs g(l) / g(w).

    Args:
        weight: `[pairs]`, that ratio of costs; the rows' `weight`, which does not weigh their losses here.

    Returns:
        loss `[pairs]`; metrics: log-probs per token and the rewards weight * bar_l.

    Example:
        >>> import torch
        >>> from slimepo.losses import bopo
        >>> from slimepo.losses.example import after
        >>> bopo(after, torch.tensor([1.2])).loss  # costs 10 and 12: softplus(-1.2 * (-2 + 4))
        tensor([0.0868])
    """
    chosen = mean_logps(policy.chosen, policy.chosen_mask)
    rejected = mean_logps(policy.rejected, policy.rejected_mask)
    chosen, rejected = weight.to(chosen) * chosen, weight.to(chosen) * rejected
    return LossOutput(
        -F.logsigmoid(chosen - rejected), pair_metrics(policy) | reward_metrics(chosen, rejected)
    )


def tpo(
    policy: PairLogps,
    gold: SampleLogps,
    *,
    beta: float = 0.01,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
    nll_weight: float = 1.0,
) -> LossOutput:
    """Triple preference optimisation: a pair, and a gold answer that is imitated.

    L = -log sigma(beta (l(w) - l(l)) - gamma) + nll_weight * NLL(gold) (arXiv 2405.16681), l summed over tokens and the
    NLL averaged over all gold tokens of the global batch. `tpo/l` is its form with means and a target margin.

    Args:
        gold: log-probs of the third answer of each row.
        beta: > 0, scale of the log-probs.
        gamma: the target reward margin.
        label_smoothing: 0 <= e < 0.5, as of `dpo`.
        length_normalized: True takes means over tokens in the margin.
        nll_weight: >= 0, weight of the gold answer's likelihood.

    Returns:
        loss `[pairs]`, the NLL in `token_loss`; metrics: log-probs per token, of the gold answer too, and the rewards.

    Example:
        >>> import torch
        >>> from slimepo.losses import tpo
        >>> from slimepo.losses.example import after
        >>> from slimepo.types import SampleLogps
        >>> output = tpo(after, SampleLogps(torch.tensor([[-1.5]]), torch.tensor([[True]])))
        >>> output.loss, output.token_loss  # both answers of the pair sum to -4: softplus(0)
        (tensor([0.6931]), {'gold': tensor([1.5000])})
    """
    check_number("beta", beta, above=0)
    check_number("gamma", gamma)
    check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    check_number("nll_weight", nll_weight, at_least=0)
    of_response = mean_logps if length_normalized else sum_logps
    chosen = beta * of_response(policy.chosen, policy.chosen_mask)
    rejected = beta * of_response(policy.rejected, policy.rejected_mask)
    metrics = pair_metrics(policy) | reward_metrics(chosen, rejected)
    metrics |= {"logps/gold": mean_logps(gold.logps.detach(), gold.mask)}
    nll = {"gold": -nll_weight * sum_logps(gold.logps, gold.mask)}
    return LossOutput(smoothed_logistic(chosen - rejected - gamma, label_smoothing), metrics, nll)


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p; a p of 1 within rounding counts as the largest p below 1, so that it stays finite."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    # 1 - p = -expm1(log p) keeps its digits where p is close to 1; 1 - exp(log p) has none left there.
    return logps - torch.log(-torch.expm1(logps))
