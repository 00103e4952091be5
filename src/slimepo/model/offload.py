"""Checkpointed activations in CPU memory: layer inputs leave the device in the forward pass and come back in the
backward pass, one layer ahead, on a stream of their own.

With activation checkpointing a layer keeps its input alone: `tokens * hidden` numbers each. That is what is left to
grow with the tokens of a forward pass, and what this moves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from slimepo.errors import InputError

# Smaller ones are not worth the way.
SMALLEST_BYTES = 1 << 16


@dataclass(eq=False)
class Held:
    """A saved tensor in CPU memory; `back` is its copy on the device while that is asked for or under way."""

    cpu: Tensor
    device: torch.device
    before: weakref.ref[Held] | None  # the one saved before it, which the backward pass wants next
    back: Tensor | None = None
    arrived: Any = None


class Offload:
    """The two hooks of `saved_tensors_hooks`.

    `stream` is the CUDA stream that copies; None copies at once (on a CPU, for tests). `smallest_bytes`: what is
    smaller stays where it is, and so do parameters.
    """

    def __init__(self, stream: torch.cuda.Stream | None, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.stream, self.smallest_bytes = stream, smallest_bytes
        self._last: weakref.ref[Held] | None = None

    def pack(self, tensor: Tensor) -> Tensor | Held:
        """Start the copy to the CPU; the device's memory is free again as soon as the copy is done."""
        if isinstance(tensor, nn.Parameter) or tensor.nbytes < self.smallest_bytes:
            return tensor
        if self.stream is None:
            cpu = tensor.detach().clone()
        else:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                cpu = torch.empty_like(tensor, device="cpu", pin_memory=True)
                cpu.copy_(tensor, non_blocking=True)
            # The allocator must not hand this memory to others before the copy has read it.
            tensor.record_stream(self.stream)
        held = Held(cpu, tensor.device, self._last)
        self._last = weakref.ref(held)
        return held

    def unpack(self, held: Tensor | Held) -> Tensor:
        """The tensor on its device again; the one that is wanted next sets out."""
        if isinstance(held, Tensor):
            return held
        self._fetch(held)
        before = held.before and held.before()
        if before:
            self._fetch(before)
        back, held.back = held.back, None
        assert back is not None
        if self.stream is not None:
            torch.cuda.current_stream().wait_event(held.arrived)
            back.record_stream(torch.cuda.current_stream())
        return back

    def _fetch(self, held: Held) -> None:
        if held.back is not None:
            return
        if self.stream is None:
            held.back = held.cpu
            return
        # Behind the copy to the CPU, on the same stream.
        with torch.cuda.stream(self.stream):
            held.back = held.cpu.to(held.device, non_blocking=True)
            held.arrived = self.stream.record_event()


def offloads(args: Any) -> bool:
    """Whether training with these arguments moves activations: asked for, and on a CUDA device."""
    return bool(args.activation_offloading and args.device.type == "cuda")


def activations(args: Any) -> str:
    """What becomes of a layer's activations, in a few words."""
    if not args.activation_checkpointing:
        return "kept"
    if offloads(args):
        return "computed again, the layers' inputs in CPU memory until then"
    unmoved = " (there is no CUDA device to offload from)" if args.activation_offloading else ""
    return f"computed again in the backward pass{unmoved}"


def offload_checkpoints(model: nn.Module, offload: Offload) -> None:
    """Let the layers of `model` that are checkpointed now keep their inputs through `offload`.

    Raises:
        InputError: none is, so that nothing would be moved.
    """
    layers: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    if not layers:
        raise InputError(
            f"activation_checkpointing 'offload': no layer of {type(model).__name__} is checkpointed; use 'layers'"
        )
    for layer in layers:
        layer._gradient_checkpointing_func = _through(offload, layer._gradient_checkpointing_func)


def _through(offload: Offload, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    # A closure: a deep copy of the model must not try to copy a CUDA stream.
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        # What is saved within the layer meets checkpoint's own hooks first; only its inputs come here.
        with saved_tensors_hooks(offload.pack, offload.unpack):
            return checkpoint(*args, **kwargs)

    return checkpointed
