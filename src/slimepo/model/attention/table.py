"""Every path for the attention of packed rows: a new one is a module and a row here."""

from __future__ import annotations

from slimepo.model.attention.flex import FLEX
from slimepo.model.attention.path import AttentionPath
from slimepo.model.attention.sdpa import by_length, one_by_one, side_by_side
from slimepo.model.attention.varlen import VARLEN

PATHS: dict[str, AttentionPath] = {
    "side_by_side": AttentionPath(side_by_side, measured=True),
    "one_by_one": AttentionPath(one_by_one),
    "varlen": VARLEN,
    "flex": FLEX,
    "by_length": AttentionPath(by_length),
}
# What a model may be asked to attend along.
ATTENTIONS = ("auto", *PATHS)
