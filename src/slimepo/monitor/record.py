"""What the displacement monitor has written: the lines of its file, the warnings that hold, why a run was stopped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimepo.files import json_lines, write_text
from slimepo.monitor.settings import Kind
from slimepo.monitor.verdicts import Verdict, Warned, three_facts

VERSION = 1
FILE = "monitor.jsonl"

logger = logging.getLogger(__name__)


class MonitorRecord:
    """The lines of a `monitor.jsonl`, in memory and on disk, one JSON object each; docs/monitor.md has the kinds.

    say: what warnings are given to; this module's logger if None.
    """

    def __init__(self, path: Path, say: Callable[[str], None] | None = None) -> None:
        self.path, self.say = path, say
        self.lines: list[dict[str, Any]] = []
        self.on: dict[Warned, bool] = {}
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
        self.on = {(line["warning"], line["set"]): line["state"] == "on" for line in self.of_kind("warning")}
        self.stopped = next((_stop(line) for line in self.of_kind("warning") if line["stops"]), None)
        self.rewrite()

    def tell(self, message: str) -> None:
        """Say something to whoever trains; it is not kept."""
        (self.say or logger.warning)(message)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind, in their order."""
        return [line for line in self.lines if line["kind"] == kind]

    def holding(self) -> list[Kind]:
        """The kinds of warnings that are on."""
        return list(dict.fromkeys(kind for (kind, _), on in self.on.items() if on))

    def warn(self, step: int, verdicts: Sequence[Verdict], stop_on: Collection[Kind]) -> None:
        """Report what has come on or gone off; a kind in `stop_on` that comes on is why the run stops."""
        for verdict in verdicts:
            if verdict.holds == self.on.get((verdict.kind, verdict.rows), False):
                continue
            stops = verdict.holds and verdict.kind in stop_on
            message = verdict.message if verdict.holds else f"{verdict.kind}: no longer so"
            self._report(step, verdict, message, stops)
            if stops and self.stopped is None:
                self.stopped = _stop(self.lines[-1])

    def conclude(self, step: int, verdicts: Sequence[Verdict], pairs: int) -> None:
        """The last word, of all held-out pairs: what holds is said with its figures, what does not is taken back.

        The line of the end stays the last one.
        """
        ends = [self.lines.pop()] if self.lines[-1]["kind"] == "end" else []
        said = [(line["step"], line["message"]) for line in self.of_kind("warning")]
        for verdict in verdicts:
            if verdict.holds:
                # A run that was killed behind its last step has said so before.
                if (step, verdict.message) not in said:
                    self._report(step, verdict, verdict.message, stops=False)
            elif self.on.get((verdict.kind, verdict.rows), False):
                self._report(
                    step, verdict, f"{verdict.kind}: not so of all {pairs:,} held-out pairs", stops=False
                )
        self.lines += [end | {"warnings": self.holding()} for end in ends]
        self.rewrite()

    def _report(self, step: int, verdict: Verdict, message: str, stops: bool) -> None:
        self.on[verdict.kind, verdict.rows] = verdict.holds
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
        self.tell(f"step {step}: {message}{'; the run stops here' if stops else ''}")

    def summary(self, heldout: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What is worth keeping in the stage's record: warnings, why it stopped, the cost, three facts.

        heldout: that record's own figures of all held-out pairs, which the facts are then of; else of the sample.
        """
        if not self.lines:
            return None
        ends = self.of_kind("end")
        return {
            "warnings": self._raised(),
            "stopped": self.stopped,
            "share": ends[-1]["share"] if ends else None,
            "facts": three_facts(self.lines, heldout),
        }

    def _raised(self) -> list[dict[str, Any]]:
        """Every warning that came on, in its last words, and the step at which it was `gone` again."""
        raised: list[dict[str, Any]] = []
        for line in self.of_kind("warning"):
            open_ones = [
                earlier
                for earlier in raised
                if (earlier["warning"], earlier["set"], earlier["gone"])
                == (line["warning"], line["set"], None)
            ]
            if line["state"] == "off":
                for earlier in open_ones:
                    earlier["gone"] = line["step"]
            elif open_ones:
                open_ones[-1]["message"] = line["message"]
            else:
                raised.append(
                    {key: line[key] for key in ("step", "warning", "set", "message")} | {"gone": None}
                )
        return raised


def _as_text(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _stop(line: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the warning that ends a run."""
    return {key: line[key] for key in ("step", "warning", "message")}
