"""Everything that takes part in a benchmark of a training step, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast, get_args
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.peers import PeerAbsentError, Setup, Step
from slimepo import kernels
from slimepo.errors import InputError
from slimepo.model import logps
from slimepo.training.config import SLIMEConfig
from slimepo.training.trainer import PreferenceTrainer


class Contender(NamedTuple):
    """`build(model, setup)` gives a step: forward and backward of all micro-batches, its loss returned."""

    build: Callable[[nn.Module, Setup], Step]
    runs: str  # what it runs, in a few words


def slimepo(
    model: nn.Module,
    setup: Setup,
    *,
    layout: str,
    impl: str = "auto",
    attention: str = "auto",
    checkpointing: bool = False,
) -> Step:
    """slimepo's own trainer, SLIME objective; `impl` is the head's implementation, `attention` that of packed rows."""
    trainer = PreferenceTrainer(
        model,
        SLIMEConfig(
            output_dir=str(setup.folder),
            per_device_train_batch_size=len(setup.micro_batches[0]),
            layout=layout,
            bf16=setup.bf16,
            attention=attention,
            activation_checkpointing=checkpointing,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=setup.rows,
        peft_config=setup.adapter,
    )
    policy: Any = trainer.model
    if checkpointing:
        # Trainer.train would do this first.
        policy.activation_checkpointing_enable()
    head = functools.partial(kernels.linear_logps, impl=cast(Any, impl))
    _try_head(head, policy.device)

    def step() -> float:
        policy.zero_grad(set_to_none=True)
        batches = [trainer.data_collator.batch(pairs) for pairs in setup.micro_batches]
        with patch.object(logps, "linear_logps", head):
            rows = [row for pairs in setup.micro_batches for row in pairs]
            return float(trainer.training_step(policy, {"batches": batches, "mismatched": [], "rows": rows}))

    return step


def _try_head(head: Callable[..., Tensor], device: torch.device) -> None:
    ones = torch.ones(2, 2, device=device)
    try:
        head(ones, ones, torch.zeros(2, dtype=torch.long, device=device))
    except InputError as error:
        raise PeerAbsentError(str(error)) from error


BASELINE = "slimepo shared"

CONTENDERS: dict[str, Contender] = {
    "slimepo shared": Contender(
        functools.partial(slimepo, layout="shared"), "a row a micro-batch, prompts computed once"
    ),
    "slimepo packed": Contender(functools.partial(slimepo, layout="packed"), "a row a micro-batch"),
    "slimepo padded": Contender(
        functools.partial(slimepo, layout="padded"), "padded rows, no attention mask"
    ),
    "slimepo shared, checkpointed": Contender(
        functools.partial(slimepo, layout="shared", checkpointing=True),
        "layers computed again in the backward pass",
    ),
    "TRL DPO as shipped": Contender(
        functools.partial(peers.trl_dpo, checkpointing=True),
        "defaults but float32: checkpointed, reference model",
    ),
    "TRL DPO": Contender(peers.trl_dpo, "not checkpointed, reference model"),
    "TRL DPO at its best": Contender(
        functools.partial(peers.trl_dpo, best=True),
        "not checkpointed, head on responses alone, reference known (not counted)",
    ),
    "TRL SimPO": Contender(peers.trl_simpo, "CPOTrainer, loss simpo, cpo_alpha 0, not checkpointed"),
    "Liger SimPO": Contender(peers.liger_simpo, "chunked head and loss, compiled, every position"),
    "SLIME authors": Contender(peers.authors, "full log-softmax of policy and reference, written anew"),
}

# One contender for each head that runs on this kind of machine; `auto` is among the ones above.
HEADS = {
    f"slimepo shared, {impl} head": Contender(
        functools.partial(slimepo, layout="shared", impl=impl), f"linear_logps impl={impl}"
    )
    for impl in get_args(kernels.Implementation)
    if impl != "auto"
}
