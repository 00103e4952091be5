"""One pair before and after some training, of which the examples in docstrings compute: its log-ratios are 1 and -1."""

from __future__ import annotations

import torch

from slimepo.types import PairLogps

_CHOSEN_MASK, _REJECTED_MASK = torch.tensor([[True, True]]), torch.tensor([[True, False]])

# The chosen answer has two tokens, the rejected one has one.
after = PairLogps(torch.tensor([[-1.0, -3.0]]), _CHOSEN_MASK, torch.tensor([[-4.0, 0.0]]), _REJECTED_MASK)
before = PairLogps(torch.tensor([[-2.0, -3.0]]), _CHOSEN_MASK, torch.tensor([[-3.0, 0.0]]), _REJECTED_MASK)
