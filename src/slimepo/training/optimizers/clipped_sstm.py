"""clipped-SSTM (arXiv 2106.05958): an accelerated method whose clip level falls as its steps grow.

With alpha_{k+1} = (k + 1)^(2 nu / (1 + nu)) / (2 a L), A_{k+1} = A_k + alpha_{k+1}, and x0 = y0 = z0, A_0 = 0::

    x_{k+1} = (A_k y_k + alpha_{k+1} z_k) / A_{k+1}
    z_{k+1} = z_k - alpha_{k+1} clip(gradient at x_{k+1}, level / alpha_{k+1})
    y_{k+1} = (A_k y_k + alpha_{k+1} z_{k+1}) / A_{k+1}

A step moves z by no more than the level, however large a gradient is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer

from slimepo.errors import InputError
from slimepo.losses.common import check_number

NAME = "clipped_sstm"


class ClippedSSTM(Optimizer):
    """The parameters are x, where gradients are taken; y and z are in the state.

    Args:
        lr: 1 / (2 a L), the first step's alpha; with a rate that stays as it is, alpha_k = lr k^(2 nu / (1 + nu)).
        nu: 0 to 1, the smoothness: 1 for a gradient that is Lipschitz, 0 for one that is only bounded.
        level: > 0, B: the norm over all gradients together is clipped to B / alpha.

    Raises:
        InputError: a value out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        nu: float = 1.0,
        level: float = 1.0,
    ) -> None:
        check_number("lr", lr, at_least=0)
        check_number("nu", nu, at_least=0, at_most=1)
        check_number("level", level, above=0)
        super().__init__(params, {"lr": lr, "nu": nu, "level": level, "steps": 0, "total": 0.0, "alpha": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns what `closure` does, where it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return loss
        norm = float(torch.nn.utils.get_total_norm(gradients))
        for group in self.param_groups:
            # x is where the last step has put it with its rate; at the first step all three are one.
            alpha, before = group["alpha"] if group["steps"] else group["lr"], group["total"]
            level = group["level"] / alpha if alpha else math.inf
            group["steps"] += 1
            group["total"] = before + alpha
            group["alpha"] = group["lr"] * (group["steps"] + 1) ** (2 * group["nu"] / (1 + group["nu"]))
            # Weights of z in y, and in the next x; at the first rate of a warm-up, 0, both stay where they are.
            share = alpha / group["total"] if group["total"] else 0.0
            ahead = group["total"] + group["alpha"]
            for x in group["params"]:
                if x.grad is None:
                    continue
                state = self.state[x]
                if not state:
                    state["y"], state["z"] = x.clone(), x.clone()
                state["z"].sub_(x.grad, alpha=alpha * min(1.0, level / norm) if norm else 0.0)
                state["y"].lerp_(state["z"], share)
                x.copy_(state["y"].lerp(state["z"], group["alpha"] / ahead if ahead else 0.0))
        return loss


def optimizer_class(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
    """The optimizer that a config asks for, and its arguments: transformers' own, or `ClippedSSTM`.

    `optim_args`, such as "level=0.5,nu=1", has the latter's options.

    Raises:
        InputError: an option that it has not, or a setting that it cannot go with.
    """
    if args.optim != NAME:
        own: tuple[Any, dict[str, Any]] = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return own
    for name, why in (("weight_decay", "has none"), ("max_grad_norm", "clips by optim_args: level=1")):
        if getattr(args, name):
            raise InputError(f"{name} = {getattr(args, name)!r}, and it {why}: leave it out")
    if args.parallel not in (None, "ddp"):
        raise InputError(f"it needs whole gradients, and parallel = {args.parallel!r} cuts them: use ddp")
    options: dict[str, Any] = {"lr": args.learning_rate}
    for part in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
        key, _, value = part.partition("=")
        if key not in ("nu", "level"):
            raise InputError(f"optim_args: it has no {key!r}; it takes nu and level")
        try:
            options[key] = float(value)
        except ValueError:
            raise InputError(f"optim_args: {part!r} is not KEY=NUMBER") from None
    return ClippedSSTM, options
