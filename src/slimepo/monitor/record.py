"""What the displacement monitor has written: the lines of its file, the warnings that hold, why a run was stopped."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from slimepo.files import append_json_lines, json_lines, write_text
from slimepo.monitor.bounds import bounds_fact
from slimepo.monitor.settings import Kind
from slimepo.monitor.verdicts import Verdict, Warned, last_facts

VERSION = 2
FILE = "monitor.jsonl"

logger = logging.getLogger(__name__)


class MonitorRecord:
    """The lines of a `monitor.jsonl`, in memory and on disk, one JSON object each; docs/monitor.md has the kinds.

    say: what warnings are given to; this module's logger if None.
    """

    def __init__(self, path: Path, say: Callable[[str], None] | None = None) -> None:
        self.path, self.say = path, say
        self.lines: list[dict[str, Any]] = []

    def begin(self, lines: list[dict[str, Any]]) -> None:
        """A file of these lines, in the place of any other."""
        self.lines = lines
        write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def append(self, line: dict[str, Any]) -> None:
        """One more line, in memory and on disk."""
        self.lines.append(line)
        append_json_lines(self.path, [line])

    def up_to(self, step: int) -> list[dict[str, Any]]:
        """The lines on disk that a run which goes on behind `step` keeps: it has not ended, whatever they say."""
        lines = json_lines(self.path)
        return [line for line in lines if line["step"] <= step and line["kind"] not in ("fallen", "end")]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind, in their order."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def on(self) -> dict[Warned, bool]:
        """Whether each warning that was ever given holds."""
        return {(line["warning"], line["set"]): line["state"] == "on" for line in self.of_kind("warning")}

    @property
    def stopped(self) -> dict[str, Any] | None:
        """Step, kind and words of the warning that ended the run."""
        stops = [line for line in self.of_kind("warning") if line["stops"]]
        return {key: stops[0][key] for key in ("step", "warning", "message")} if stops else None

    @property
    def cured(self) -> int:
        """How often a run that unlearns has been changed."""
        return cured_in(self.lines)

    def cure(self, step: int, words: str) -> None:
        """Write down, and say, what has been changed behind `step` in a run that unlearns."""
        self.append({"kind": "cure", "step": step, "message": words})
        self.tell(f"step {step}: {words}")
        alert("unlearning", f"step {step}: {words}")

    def holding(self) -> list[Kind]:
        """The kinds of warnings that are on."""
        return list(dict.fromkeys(kind for (kind, _), on in self.on.items() if on))

    def warn(self, step: int, verdicts: Sequence[Verdict], stop_on: Collection[Kind]) -> None:
        """Report what has come on or gone off; a kind in `stop_on` that comes on is why the run stops."""
        for verdict in verdicts:
            if verdict.holds != self.on.get((verdict.kind, verdict.rows), False):
                message = verdict.message if verdict.holds else f"{verdict.kind}: no longer so"
                self._report(step, verdict, message, verdict.holds and verdict.kind in stop_on)

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
                    self._report(step, verdict, verdict.message)
            elif self.on.get((verdict.kind, verdict.rows), False):
                self._report(step, verdict, f"{verdict.kind}: not so of all {pairs:,} held-out pairs")
        self.begin(self.lines + [end | {"warnings": self.holding()} for end in ends])

    def tell(self, message: str) -> None:
        """Say something to whoever trains; it is not kept."""
        (self.say or logger.warning)(message)

    def summary(self, heldout: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What is worth keeping in the stage's record: warnings, why it stopped, the cost, the facts that matter most.

        A warning is there once with its last words, and with the step at which it was `gone` again. heldout: the
        record's own figures of all held-out pairs, which the facts are then of; else of the sample.
        """
        if not self.lines:
            return None
        raised: list[dict[str, Any]] = []
        open_ones: dict[Warned, dict[str, Any]] = {}
        for line in self.of_kind("warning"):
            key = line["warning"], line["set"]
            if line["state"] == "off":
                open_ones.pop(key)["gone"] = line["step"]
            elif key in open_ones:
                open_ones[key]["message"] = line["message"]
            else:
                open_ones[key] = {k: line[k] for k in ("step", "warning", "set", "message")} | {"gone": None}
                raised.append(open_ones[key])
        return {
            "warnings": raised,
            "stopped": self.stopped,
            "cures": [{key: line[key] for key in ("step", "message")} for line in self.of_kind("cure")],
            "seconds": sum(line["seconds"] for line in self.lines if line["kind"] in ("probe", "generation")),
            "facts": [*last_facts(self.lines, heldout), *self._bounds()],
        }

    def _bounds(self) -> list[str]:
        measured = [line for line in self.of_kind("probe") if line.get("bound")][-1:]
        facts = [bounds_fact(line["bound"], line["train"]["pairs"]) for line in measured]
        return [fact for fact in facts if fact is not None]

    def _report(self, step: int, verdict: Verdict, message: str, stops: bool = False) -> None:
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
        words = f"step {step}: {message}{'; the run stops here' if stops else ''}"
        self.tell(words)
        alert(verdict.kind, words)


def cured_in(lines: Sequence[Mapping[str, Any]]) -> int:
    """How often a run has been changed, by the lines of its file; those that were lost are counted in its first."""
    before = int(lines[0].get("cured", 0)) if lines else 0
    return before + len([line for line in lines if line["kind"] == "cure"])


def alert(title: str, words: str) -> None:
    """Show a warning where a tracker of this process (`report_to`) has a place for it: Trackio, Weights & Biases."""
    trackio, wandb = (sys.modules.get(name) for name in ("trackio", "wandb"))
    if trackio is not None and trackio.context_vars.current_run.get() is not None:
        trackio.alert(title=title, text=words)
    if wandb is not None and wandb.run is not None:
        wandb.alert(title=title, text=words)
