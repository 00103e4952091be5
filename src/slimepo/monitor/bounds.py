"""How much of what SLIME promises has been used up: the two bounds of docs/guarantees.md, on a sample of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slimepo.losses import slime
from slimepo.monitor.displacement import SideScores
from slimepo.monitor.probe import as_pair_logps

# Nats under which a rejected token counts as fallen through the floor.
DEEP = 10.0


def bounded(options: Mapping[str, Any]) -> bool:
    """Whether the bounds hold of SLIME with these options: means per answer, and terms that are not negative."""
    return bool(
        options["length_normalized"]
        and options["rejected_mean"] == "sequence"
        and options["hard_gate"] != "linear"
    )


def bound_figures(
    options: Mapping[str, Any], chosen: SideScores, rejected: SideScores, start: Mapping[str, float] | None
) -> dict[str, float]:
    """The terms of SLIME's loss on these pairs, and of both bounds what is allowed, what is so, and the quotient.

    `fell` and `fall_allowed` are of chosen answers, in nats per token, `deep` and `deep_allowed` the share of rejected
    tokens below -`DEEP` nats. A bound is left out where its weight is 0. `loss_rose` is 1 where the loss of the sample
    is above that of the start, and then nothing is promised.

    options: all of SLIME's, as they are now. start: these figures at step 0, None if this is it.
    """
    metrics = slime(as_pair_logps(chosen, rejected), None, **options).metrics
    now = {"chosen": float(metrics["logps/chosen"].mean())}
    now |= {term: float(metrics[f"loss/{term}"].mean()) for term in ("rejected", "distance")}
    then = start or now
    weight_w, weight_l = options["chosen_weight"], options["rejected_weight"]
    loss, loss_then = (x["rejected"] + x["distance"] - weight_w * x["chosen"] for x in (now, then))
    found = {**now, "loss_rose": float(loss > loss_then)}
    if weight_w > 0:
        fell, allowed = then["chosen"] - now["chosen"], (then["rejected"] + then["distance"]) / weight_w
        found |= {"fell": fell, "fall_allowed": allowed, "fall_used": max(fell, 0.0) / max(allowed, 1e-12)}
    if weight_l > 0:
        deep = float(np.mean([(tokens < -DEEP).mean() for tokens in rejected.logps]))
        # What each such token adds at the least, by the objective's own code: its floor may be a line down there.
        one = SideScores([np.array([-DEEP])], [], [])
        least = float(slime(as_pair_logps(one, one), None, **options).metrics["loss/rejected"])
        allowed = min(loss_then / least, 1.0)
        found |= {"deep": deep, "deep_allowed": allowed, "deep_used": deep / max(allowed, 1e-12)}
    return {key: round(value, 6) for key, value in found.items()}


def bounds_fact(figures: Mapping[str, float], pairs: int) -> str | None:
    """The bounds, and what is used of them, in plain words; None where there is none."""
    said = []
    if figures["loss_rose"]:
        return f"SLIME's loss on {pairs} training pairs is above that of the start, and so promises nothing."
    if "fell" in figures:
        fell = figures["fell"]
        used = (
            f"fell by {fell:.2g}, {figures['fall_used']:.1%} of that"
            if fell > 0
            else f"rose by {abs(fell):.2g}"
        )
        said.append(
            f"that their chosen answers fall by more than {figures['fall_allowed']:.3g} nats per token (they {used})"
        )
    # A share of all tokens rules out nothing.
    if figures.get("deep_allowed", 1.0) < 1:
        said.append(
            f"that more than {figures['deep_allowed']:.1%} of their rejected tokens are below -{DEEP:g} nats "
            f"({figures['deep']:.1%} are)"
        )
    return f"SLIME's loss on {pairs} training pairs rules out {', and '.join(said)}." if said else None
