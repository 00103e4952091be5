"""What the displacement monitor has written: the lines of its file, the warnings that hold, why a run was stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimepo.training.folder import json_lines, write_text
from slimepo.training.pace import Kind
from slimepo.training.verdicts import Verdict, three_facts

VERSION = 1
FILE = "monitor.jsonl"

logger = logging.getLogger(__name__)


class MonitorRecord:
    """The lines of a `monitor.jsonl`, in memory and on disk, one JSON object each; docs/monitor.md has the kinds.

    say: what warnings are given to.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = logger.warning) -> None:
        self.path, self.say = path, say
        self.lines: list[dict[str, Any]] = []
        self.on: dict[Kind, bool] = {}
        self.stopped: dict[str, Any] | None = None

    def clear(self) -> None:
        """Forget what an earlier training wrote; its file stays until a line is written."""
        self.lines, self.on, self.stopped = [], {}, None

    def begin(self, line: dict[str, Any]) -> None:
        """A new file with its first line."""
        self.lines = [line]
        self.rewrite()

    def append(self, line: dict[str, Any]) -> None:
        """One more line, in memory and on disk."""
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_as_text(line))

    def rewrite(self) -> None:
        """Put the lines as they are now in the place of the file."""
        write_text(self.path, "".join(map(_as_text, self.lines)))

    def up_to(self, step: int) -> list[dict[str, Any]]:
        """The lines on disk that a run which goes on behind `step` keeps: it has not ended, whatever they say."""
        return [line for line in json_lines(self.path) if line["step"] <= step and line["kind"] != "end"]

    def take_up(self, kept: list[dict[str, Any]]) -> None:
        """Go on behind these lines."""
        self.lines = kept
        self.on = {line["warning"]: line["state"] == "on" for line in self.of_kind("warning")}
        self.stopped = next((_stop(line) for line in self.of_kind("warning") if line["stops"]), None)
        self.rewrite()

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind, in their order."""
        return [line for line in self.lines if line["kind"] == kind]

    def holding(self) -> list[Kind]:
        """The warnings that are on."""
        return [kind for kind, on in self.on.items() if on]

    def warn(self, step: int, verdicts: Sequence[Verdict], stop_on: Collection[Kind]) -> None:
        """Report what has come on or gone off; a kind in `stop_on` that comes on is why the run stops."""
        for verdict in verdicts:
            if verdict.holds == self.on.get(verdict.kind, False):
                continue
            self.on[verdict.kind] = verdict.holds
            stops = verdict.holds and verdict.kind in stop_on
            message = verdict.message if verdict.holds else f"{verdict.kind}: no longer so"
            self.append(
                {
                    "kind": "warning",
                    "step": step,
                    "warning": verdict.kind,
                    "state": "on" if verdict.holds else "off",
                    "set": verdict.rows,
                    "message": message,
                    "stops": stops,
                }
            )
            self.say(f"step {step}: {message}{'; the run stops here' if stops else ''}")
            if stops and self.stopped is None:
                self.stopped = _stop(self.lines[-1])

    def warn_after_the_end(self, step: int, verdicts: Sequence[Verdict]) -> None:
        """The same of a run that has ended: its last line stays the last, and names what holds now."""
        ends = [self.lines.pop()] if self.lines[-1]["kind"] == "end" else []
        self.warn(step, verdicts, ())
        self.lines += [end | {"warnings": self.holding()} for end in ends]
        self.rewrite()

    def summary(self, heldout: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What is worth keeping in the stage's record: warnings, why it stopped, the cost, three facts.

        heldout: that record's own figures of all held-out pairs, which the facts are then of; else of the sample.
        """
        if not self.lines:
            return None
        raised = [line for line in self.of_kind("warning") if line["state"] == "on"]
        ends = self.of_kind("end")
        return {
            "warnings": [
                {key: line[key] for key in ("step", "warning", "set", "message")} for line in raised
            ],
            "stopped": self.stopped,
            "share": ends[-1]["share"] if ends else None,
            "facts": three_facts(self.lines, heldout),
        }


def _as_text(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _stop(line: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the warning that ends a run."""
    return {key: line[key] for key in ("step", "warning", "message")}
