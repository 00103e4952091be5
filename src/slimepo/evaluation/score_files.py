"""Score files of `slimepo eval`, read back; needs nothing that makes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from slimepo.errors import InputError
from slimepo.evaluation.canaries import CanaryResult
from slimepo.evaluation.judge.request import Scores, scores_of_row
from slimepo.files import read_json


@dataclass(frozen=True)
class ScoreFile:
    """A model's scores, and what the judge gave the canaries; `folder` is the evaluation's (--out)."""

    folder: Path
    scores: tuple[Scores, ...]
    canaries: dict[str, CanaryResult] = field(default_factory=dict)


def read_scores(path: Path) -> tuple[ScoreFile, ...]:
    """Every `scores/*.json` in a folder or one or two levels under it, or where the folder is `scores` itself.

    Raises:
        InputError: one holds scores that are not as `slimepo eval` writes them.
    """
    patterns = ["scores/*.json", "*/scores/*.json", "*/*/scores/*.json"]
    patterns += ["*.json"] if path.name == "scores" else []
    found = []
    for file in sorted({file for pattern in patterns for file in path.glob(pattern)}):
        record = read_json(file)
        if not isinstance(record, dict):
            continue
        try:
            rows = [row for row in record.get("scores") or () if row and isinstance(row, dict)]
            scores = tuple(map(scores_of_row, rows))
            canaries = {n: CanaryResult(**each) for n, each in (record.get("canaries") or {}).items()}
        except (InputError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: no score file of slimepo eval ({error})") from None
        if scores:
            found.append(ScoreFile(file.parent.parent, scores, canaries))
    return tuple(found)
