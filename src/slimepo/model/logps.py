"""Per-token log-probs of response tokens, computed inside the model's own forward.

Hidden states are selected before the head, so that prompt and padding never meet the vocabulary. Because it
all happens inside the outermost module's forward, wrappers (DDP, FSDP, DeepSpeed, autocast, peft) see an
ordinary call: parameters are gathered and gradients reduced as usual.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimepo.data.batch import Batch, pair_logps
from slimepo.errors import InputError
from slimepo.kernels import TokenStats, linear_logps, linear_logps_stats
from slimepo.kernels.naive import adjust, gather_logps, stats_of_logits
from slimepo.kernels.passes import Adjustment
from slimepo.model.attention.interface import packed_rows
from slimepo.model.balance import balance_loss, with_gradient_of
from slimepo.types import PairLogps

_ROWS_AT_ONCE = 1024


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside peft's wrappers."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise InputError(f"{type(inner).__name__} is not a transformers causal language model")
    if inner.config.is_encoder_decoder:
        raise InputError(f"{type(inner).__name__} is an encoder-decoder, and slimepo trains decoders alone")
    return inner


@contextmanager
def without_router_logits(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model of experts returns no router logits and computes no balance loss, whatever its config says.

    Nobody reads them here, and transformers' balance loss fails on the one token a row that generation adds to a mask.
    """
    configs = [
        config
        for config in {id(each): each for each in (model.config, model.config.get_text_config())}.values()
        if getattr(config, "output_router_logits", False)
    ]
    for config in configs:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config in configs:
            config.output_router_logits = True


def install_logps(model: nn.Module) -> None:
    """Let `model(input_ids, predict_at=..., targets=...)` return log-probs `[N]`; other calls stay as they are.

    With `stats=True` it returns `slimepo.kernels.TokenStats`, which says more of each token.

    Doing it again changes nothing, so that what accelerate has put around the forward meanwhile stays.
    """
    inner: Any = causal_lm(model)
    if getattr(inner, "_gives_logps", False):
        return
    # A bound method, not a closure: a deep copy of the model then calls the copy and not this one.
    model_class: Any = type(inner)
    inner.forward = types.MethodType(forward_with_logps(model_class), inner)
    inner._gives_logps = True


def policy_logps(forward: Callable[..., Any], batch: Batch) -> PairLogps:
    """Log-probs of the batch's response tokens; `forward` is a model that has `install_logps` behind it."""
    return pair_logps(response_logps(forward, batch), batch)


def response_logps(forward: Callable[..., Any], batch: Batch, balance: float | None = None) -> Tensor:
    """Log-probs of the batch's response tokens, flat `[N]`, in the order of `targets`.

    balance: what the balance loss of the model's experts is multiplied by; its gradients are those of the backward pass
    too, and its value is left on the model (`balance_of`).
    """
    asked = {} if balance is None else {"balance": balance}
    logps: Tensor = forward(**_inputs(batch), **asked)
    return logps


def balance_of(model: nn.Module) -> Tensor:
    """The balance loss of the last batch that was asked for it, a scalar without gradients."""
    inner: Any = causal_lm(model)
    found: Tensor = inner._balance
    return found


def token_stats(forward: Callable[..., Any], batch: Batch, balance: float | None = None) -> TokenStats:
    """`response_logps` with what the kernels say beside of each token, all flat `[N]`, in the order of `targets`."""
    asked = {} if balance is None else {"balance": balance}
    stats: TokenStats = forward(**_inputs(batch), stats=True, **asked)
    return stats


def _inputs(batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "predict_at": batch["predict_at"],
        "targets": batch["targets"],
    }
    if batch["packing"] is not None:
        inputs |= {"position_ids": batch["packing"]["position_ids"], "packing": batch["packing"]}
    return inputs


@functools.cache
def forward_with_logps(model_class: Any) -> Callable[..., Any]:
    """The forward of a model class that gives log-probs where it is asked for them; made once a class."""
    original = model_class.forward

    # `wraps` keeps the signature, which transformers inspects to decide what generation may pass.
    @functools.wraps(original)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        predict_at: Tensor | None = None,
        targets: Tensor | None = None,
        stats: bool = False,
        balance: float | None = None,
        **kwargs: Any,
    ) -> Any:
        if predict_at is None or targets is None:
            return original(self, *args, **kwargs)
        if self.base_model is self:
            raise InputError(
                f"{type(self).__name__} cannot be trained here: its backbone has no name of its own"
            )
        inputs = {name: value for name, value in kwargs.items() if value is not None}
        packed = "packing" in inputs
        with without_router_logits(self), packed_rows() if packed else nullcontext():
            asked = {} if balance is None else {"output_router_logits": True}
            output = self.base_model(*args, **inputs, **asked, use_cache=False)
        hidden = output.last_hidden_state
        if balance is not None:
            loss = balance_loss(
                self, output.router_logits, inputs["input_ids"], predict_at, padded=not packed
            )
            hidden = with_gradient_of(hidden, loss, balance)
            self._balance = loss.detach()
        selected_NH = hidden.reshape(-1, hidden.shape[-1])[predict_at]
        return (_head_stats if stats else head_logps)(self, selected_NH, targets)

    return forward


def head_logps(
    model: PreTrainedModel,
    hidden_NH: Tensor,
    targets_N: Tensor,
    fused: Callable[..., Tensor] = linear_logps,
) -> Tensor:
    """Log-probs `[N]` of the targets from selected hidden states, through the head that is active now.

    `fused` takes the arguments of `linear_logps`; what only plans memory computes no logits.
    """
    outer = model.get_output_embeddings()
    head, after = _active(outer), _adjustment(model)
    if _one_matrix(head):
        logps: Tensor = _inside(outer, head, fused, after, hidden_NH, targets_N)
        return logps
    # A head that is more than one matrix (LoRA on it, quantised weights) projects by itself; without gradients, which
    # need all logits, a block of rows at a time.
    rows = len(hidden_NH) if torch.is_grad_enabled() else _ROWS_AT_ONCE
    blocks = zip(torch.split(hidden_NH, rows or 1), torch.split(targets_N, rows or 1), strict=True)
    return torch.cat(
        [
            gather_logps(adjust(outer(hidden), after.softcap, after.scale), targets)
            for hidden, targets in blocks
        ]
    )


def _head_stats(model: PreTrainedModel, hidden_NH: Tensor, targets_N: Tensor) -> TokenStats:
    """What `head_logps` gives, with what else there is to say of each token."""
    outer = model.get_output_embeddings()
    head, after = _active(outer), _adjustment(model)
    if _one_matrix(head):
        stats: TokenStats = _inside(outer, head, linear_logps_stats, after, hidden_NH, targets_N)
        return stats
    raw_NV = outer(hidden_NH)
    logps_N = gather_logps(adjust(raw_NV, after.softcap, after.scale), targets_N)
    return TokenStats(logps_N, *stats_of_logits(raw_NV, targets_N, after.softcap, after.scale))


def _one_matrix(head: nn.Module) -> bool:
    """Whether the head is a plain matrix, in parts over several devices or not: nothing quantised, no LoRA."""
    return isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward


def _inside(
    outer: nn.Module,
    head: Any,
    fused: Callable[..., Any],
    after: Adjustment,
    hidden_NH: Tensor,
    targets_N: Tensor,
) -> Any:
    """What `fused` makes of hidden states and the head's matrix, inside a call of the head, through peft's wrapper.

    What keeps the weight in parts on several devices gathers it for the call, and sums up its gradient after. Read from
    outside, such a weight would be a part, or give a gradient that is wrong.
    """
    before = vars(head).get("forward")
    head.forward = lambda hidden: fused(
        hidden, head.weight, targets_N, head.bias, softcap=after.softcap, scale=after.scale
    )
    try:
        return outer(hidden_NH)
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def _active(head: Any) -> Any:
    """The module that computes the logits now: peft keeps the original head beside the one in training."""
    from peft.utils.other import ModulesToSaveWrapper

    if not isinstance(head, ModulesToSaveWrapper):
        return head
    active = [name for name in head.active_adapters if name in head.modules_to_save]
    if head.disable_adapters or not active:
        return head.original_module
    return head.modules_to_save[active[0]]


def _adjustment(model: PreTrainedModel) -> Adjustment:
    """What the architecture does to the logits after its head."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    divide = getattr(config, "logits_scaling", None) or 1.0
    return Adjustment(getattr(config, "final_logit_softcapping", None), scale / divide)
