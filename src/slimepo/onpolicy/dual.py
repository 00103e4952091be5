"""One-shot constrained alignment (arXiv 2405.19544): the multipliers of a policy that keeps constraints, from samples.

The policy that maximises E[r] - beta KL(pi || reference) among those with E[g_j] >= b_j for every constraint j is
reference * exp((r + lambda . g) / beta), normalised for each prompt. Its multipliers lambda >= 0 are where the convex
dual is least:

    D(lambda) = beta E_x ln E_{y ~ reference} exp((r + lambda . (g - b)) / beta)

Nothing is trained for that: the answers of the reference to each prompt stand for its distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from slimepo.errors import InputError
from slimepo.losses.common import check_number

Array = NDArray[np.float64]
# How far beside a bound a solution may lie, in units of the constraint's spread.
_SLACK = 1e-4


@dataclass(frozen=True)
class Dual:
    """The `multipliers` `[constraints]`; of the policy that they make `reward` and `constraints` `[constraints]`, means
    over prompts of what it expects, and its KL to the reference in nats; `before`: E[g] of the reference itself."""

    multipliers: Array
    reward: float
    constraints: Array
    kl: float
    before: Array


def solve_dual(
    rewards: Sequence[Array],
    constraints: Sequence[Array],
    bounds: Sequence[float],
    beta: float,
    names: Sequence[str] = (),
) -> Dual:
    """The multipliers that keep E[g_j] >= bounds[j], by L-BFGS-B.

    Args:
        rewards: r of each prompt's answers, `[answers]`, which the reference has written.
        constraints: g of the same, `[constraints, answers]`.
        bounds: b, the least mean over prompts, one a constraint.
        beta: > 0, the price of a nat of KL; DPO on the labels has the same.
        names: of the constraints, for errors.

    Raises:
        InputError: a bound that no policy on these answers reaches, each by itself or all together; scipy is missing.

    Example:
        >>> import numpy as np
        >>> from slimepo.onpolicy.dual import solve_dual
        >>> dual = solve_dual([np.array([1.0, 0.0])], [np.array([[-1.0, 1.0]])], [0.5], beta=1.0)
        >>> dual.multipliers.round(4)  # (1 + ln 3) / 2: the second answer has three times the odds of the first
        array([1.0493])
    """
    check_number("beta", beta, above=0)
    if find_spec("scipy") is None:
        raise InputError("the dual is solved by scipy: pip install 'slimepo[relabel]'")
    from scipy.optimize import minimize

    bound = np.asarray(bounds, dtype=np.float64)
    best = np.mean([g.max(axis=1) for g in constraints], axis=0)
    for j in np.flatnonzero(best <= bound).tolist():
        name = f" of {names[j]!r}" if names else ""
        raise InputError(
            f"the bound {bound[j]:g}{name} is out of reach: the best answer to each prompt gives {best[j]:.4g} on the "
            "mean, and a policy comes near that only by writing nothing else. Give less, or more answers a prompt"
        )

    def tilted(multipliers: Array) -> tuple[float, Array]:
        """D, and its gradient E[g] - b."""
        value, gradient = 0.0, np.zeros(len(bound))
        for r, g in zip(rewards, constraints, strict=True):
            above = g - bound[:, None]
            logits = (r + multipliers @ above) / beta
            top = logits.max()
            weights = np.exp(logits - top)
            value += beta * (top + np.log(weights.mean()))
            gradient += above @ (weights / weights.sum())
        return value / len(rewards), gradient / len(rewards)

    spread = np.std(np.concatenate(constraints, axis=1), axis=1)
    found = minimize(
        tilted, np.zeros(len(bound)), jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(bound),
        options={"ftol": 0, "gtol": 1e-9, "maxiter": 200},
    ).x  # fmt: skip
    short = -tilted(found)[1]
    if (short > _SLACK * spread).any():
        told = ", ".join(f"{b:g}" for b in bound)
        raise InputError(
            f"no policy on these answers keeps all of the bounds {told} together: give less of one"
        )
    expected = [_expected(r, g, (r + found @ g) / beta) for r, g in zip(rewards, constraints, strict=True)]
    return Dual(
        multipliers=found,
        reward=float(np.mean([reward for reward, _, _ in expected])),
        constraints=np.mean([kept for _, kept, _ in expected], axis=0),
        kl=float(np.mean([kl for _, _, kl in expected])),
        before=np.mean([g.mean(axis=1) for g in constraints], axis=0),
    )


def _expected(reward: Array, constraints: Array, logits: Array) -> tuple[float, Array, float]:
    """E[r], E[g] and KL to even odds of the answers with odds exp(logits)."""
    logps = logits - np.logaddexp.reduce(logits)
    odds = np.exp(logps)
    return float(odds @ reward), constraints @ odds, float(odds @ logps + np.log(len(odds)))


def preferred(scores: Array) -> Array:
    """sigmoid(s_1 - s_0) of pairs of scores `[pairs, 2]`: how likely the second is to be preferred (Bradley-Terry)."""
    odds: Array = np.exp(-np.logaddexp(0, scores[:, 0] - scores[:, 1]))
    return odds
