"""The prompts of a run, as the rows that they are given as say them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from slimepo.data.messages import MalformedRow, prompt_turns
from slimepo.data.render import ChatFormat, RowRefused, encode_prompt
from slimepo.errors import InputError
from slimepo.onpolicy.rewards import Prompt
from slimepo.onpolicy.settings import Rollouts


class PromptDataset(Dataset[Prompt]):
    """The prompts of a run; a step's are drawn as those of rows are."""

    def __init__(self, prompts: Sequence[Prompt], settings: Rollouts) -> None:
        self.prompts, self.settings = list(prompts), settings
        self.lengths = [len(prompt.ids) for prompt in prompts]

    def tokens(self) -> list[tuple[str, int, int]]:
        """Each prompt by its id: its tokens with an answer of the longest kind, and the highest of its own."""
        return [
            (prompt.id, len(prompt.ids) + self.settings.max_new_tokens, max(prompt.ids, default=0))
            for prompt in self.prompts
        ]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def prompts_from(given: Any, chat: ChatFormat) -> list[Prompt]:
    """Prompts as they are, or of rows with a `prompt`: text, or messages; a row's `id` is its own or its number.

    Raises:
        InputError: a row has no prompt, or the chat template refuses it.
    """
    prompts: list[Prompt] = []
    for number, row in enumerate(given):
        if isinstance(row, Prompt):
            prompts.append(row)
            continue
        try:
            messages = prompt_turns(row if isinstance(row, Mapping) else {})
        except MalformedRow as malformed:
            raise InputError(f"row {number} has no prompt to be answered: {malformed}") from malformed
        name = str(row.get("id") or number)
        try:
            prompts.append(Prompt(name, messages, row, encode_prompt(chat, messages)))
        except RowRefused as refused:
            raise InputError(f"row {name}: {refused.reason}: {refused.detail}") from refused
    if not prompts:
        raise InputError("there is no prompt to train on")
    return prompts
