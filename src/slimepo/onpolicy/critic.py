"""The value model of PPO: the reward to come at each token of an answer, learned beside the policy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from slimepo.data.batch import Batch, collate, to_device
from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.model.adapters import OF_ADAPTERS
from slimepo.model.logps import causal_lm
from slimepo.onpolicy.settings import ValueModel

WEIGHTS, OPTIMIZER = "value_model.safetensors", "value_optimizer.pt"


class Critic:
    """A token classifier with one label on a copy of the policy's backbone, and the AdamW that trains it.

    It reads padded rows, in evaluation mode always: what it says of an answer does not depend on chance.

    Raises:
        InputError: transformers has no token classifier of this architecture.
    """

    def __init__(self, policy: nn.Module, settings: ValueModel, micro_batch_size: int, device: torch.device):
        self.settings, self.micro_batch_size, self.device = settings, micro_batch_size, device
        inner = causal_lm(policy)
        if getattr(inner, "quantization_method", None) is not None:
            raise InputError(
                "a value model trains a copy of the policy's weights, and these are quantised: use grpo, rloo or "
                "reinforce_pp, which need none"
            )
        config = copy.deepcopy(inner.config)
        config.num_labels, config.classifier_dropout = 1, 0.0
        try:
            model: Any = AutoModelForTokenClassification.from_config(config)
        except ValueError as error:
            raise InputError(
                f"{type(inner).__name__} has no token classifier in transformers, which a value model is made of: "
                "use grpo, rloo or reinforce_pp, which need none"
            ) from error
        # Without the adapters, whose modules stand around those of the backbone.
        weights = {
            name.replace(".base_layer.", ".").replace(".original_module.", "."): value
            for name, value in inner.base_model.state_dict().items()
            if not any(word in name for word in OF_ADAPTERS)
        }
        model.base_model.load_state_dict(weights)
        # A value of 0 at the start: nothing is known yet. The head is called score here and classifier there.
        for head in (each for each in model.children() if isinstance(each, nn.Linear)):
            for parameter in head.parameters():
                nn.init.zeros_(parameter)
        self.model = model.float().eval().to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=0.0
        )

    def values(self, rows: Sequence[Row]) -> list[list[np.ndarray]]:
        """For each row the values `[tokens]` of each response: of what comes from that token on."""
        found: list[list[np.ndarray]] = []
        with torch.no_grad():
            for batch in self._batches(rows):
                of_batch = np.split(
                    self._forward(batch).cpu().numpy(),
                    np.cumsum([n for of_position in batch["response_tokens"] for n in of_position])[:-1],
                )
                count = batch["rows"]
                found += [
                    [of_batch[place * count + i] for place in range(len(batch["positions"]))]
                    for i in range(count)
                ]
        return found

    def learn(self, rows: Sequence[Row], accelerator: Any) -> dict[str, float]:
        """One optimizer step on rows that have `values`, of when they were sampled, and `returns`; over all ranks.

        The loss is half the squared error a token, the larger one of the value and of the value held within `clip` of
        what it was, averaged over all tokens of the step (arXiv 1707.06347, as in the PPO of RLHF). Without any token
        there is no step: of gradients of 0 the optimizer's momentum would make one.
        """
        tokens = accelerator.reduce(
            torch.tensor(float(sum(len(r) for row in rows for r in row.responses)), device=self.device), "sum"
        )
        if not tokens:
            return {}
        sums = torch.zeros(3, device=self.device)
        for batch in self._batches(rows):
            value, before, target = (
                self._forward(batch), batch["token_values"]["values"], batch["token_values"]["returns"]
            )  # fmt: skip
            held = before + (value - before).clamp(-self.settings.clip, self.settings.clip)
            loss = torch.maximum((value - target) ** 2, (held - target) ** 2).sum() / 2 / tokens
            loss.backward()
            sums += torch.stack([loss.detach(), (target - before).sum() / tokens, target.sum() / tokens])
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = accelerator.reduce(parameter.grad, "sum")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, error, target_mean = accelerator.reduce(sums, "sum").tolist()
        return {"value/loss": loss_sum, "value/error": error, "value/return": target_mean}

    def save(self, folder: Path) -> None:
        """Write weights and optimizer into a checkpoint."""
        save_model(self.model, str(folder / WEIGHTS))
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it has no value model.
        """
        if not (folder / WEIGHTS).exists():
            raise InputError(f"{folder} has no value model, {WEIGHTS}: it is not a checkpoint of this run")
        load_model(self.model, str(folder / WEIGHTS))
        state = torch.load(folder / OPTIMIZER, map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state)

    def _batches(self, rows: Sequence[Row]) -> list[Batch]:
        size = self.micro_batch_size
        positions = tuple(range(max((len(row.responses) for row in rows), default=0)))
        return [
            to_device(collate(rows[start : start + size], positions), self.device)
            for start in range(0, len(rows), size)
        ]

    def _forward(self, batch: Batch) -> Tensor:
        logits: Tensor = self.model(input_ids=batch["input_ids"]).logits
        return logits.reshape(-1)[batch["predict_at"]]
