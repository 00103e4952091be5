"""Scores of `slimepo eval` as tables: models by benchmarks, MT-Bench by category, and what judges gave the canaries.

Scores of different judges, prompts, baselines, questions, rules or settings never share a column, a table or a picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slimepo.evaluation.benchmarks import mt_bench
from slimepo.evaluation.canaries import CanaryResult, canary_words
from slimepo.evaluation.judge.request import Identity, Scores
from slimepo.evaluation.judge.request import columns as split_columns
from slimepo.evaluation.settings import BENCHMARKS
from slimepo.report.numbers import count
from slimepo.report.records import ABSENT, Scored, Source, number, unique
from slimepo.report.tables import Line, Table

_HASHES = ("prompts", "questions", "references")


@dataclass(frozen=True)
class ScoreColumn:
    """Scores that compare, one a model under its label; `runs` gives the name that each was evaluated under."""

    mark: str
    scores: tuple[Scores, ...]
    runs: dict[str, str]

    @property
    def head(self) -> str:
        first = self.scores[0]
        category = first.identity.settings.get("category")
        what = f"{_name(first.identity)} {category}" if category else _name(first.identity)
        return f"{what}, {first.headline} ({first.unit}){self.mark}"


def score_columns(sources: Sequence[Source]) -> list[ScoreColumn]:
    """The columns of the benchmark table. A model evaluated in two folders is told apart by them."""
    scores: list[tuple[Path, Scores]] = []
    # Arena-Hard's score of a category stands in the file of the whole benchmark and in the category's own.
    for entry in ((file.folder, each) for file in _files(sources) for each in file.scores):
        if entry not in scores:
            scores.append(entry)
    counts = [Counter(each.model for each in column) for column in split_columns(each for _, each in scores)]
    twice = {model for column in counts for model, times in column.items() if times > 1}
    places = list(dict.fromkeys((folder, each.model) for folder, each in scores if each.model in twice))
    labels = unique([f"{folder.parent.name}/{folder.name}: {model}" for folder, model in places])
    label_of = dict(zip(places, labels, strict=True))
    run_of = dict(zip(labels, (model for _, model in places), strict=True))
    labelled = [
        replace(each, model=label_of.get((folder, each.model), each.model)) for folder, each in scores
    ]
    found = split_columns(labelled)
    return [_column(mark, each, run_of) for mark, each in zip(_marks(len(found)), found, strict=True)]


def _column(mark: str, scores: Sequence[Scores], run_of: Mapping[str, str]) -> ScoreColumn:
    # Two scores of one folder that should be one, and are not, are both shown.
    names = unique([each.model for each in scores])
    runs = {name: run_of.get(each.model, each.model) for name, each in zip(names, scores, strict=True)}
    renamed = (replace(each, model=name) for name, each in zip(names, scores, strict=True))
    return ScoreColumn(mark, tuple(renamed), runs)


def benchmark_table(columns: Sequence[ScoreColumn]) -> tuple[Table, list[str]]:
    """Models by benchmarks, each cell the headline with its interval; and what is to be known of the columns."""
    models = list(dict.fromkeys(each.model for column in columns for each in column.scores))
    cells = [{each.model: benchmark_cell(each) for each in column.scores} for column in columns]
    lines = [Line(model, tuple(column.get(model, ABSENT) for column in cells)) for model in models]
    notes = [f"{column.mark or column.head + ':'} {_about(column.scores)}".strip() for column in columns]
    return Table(("model", *(column.head for column in columns)), lines), notes


def benchmark_cell(scores: Scores) -> str:
    """The headline measure with its interval (`34.1 [31.8, 36.0]`), else its standard error (`34.1 ± 1.3`)."""
    measure = scores.measures.get(scores.headline)
    value = number(measure.value) if measure else None
    if measure is None or value is None:
        return ABSENT
    form = ".2f" if scores.unit == "1-10" else ".1f"
    low, high, error = map(number, (measure.lower, measure.upper, measure.standard_error))
    sure = f" ± {error:{form}}" if error is not None else ""
    if low is not None and high is not None:
        sure = f" [{low:{form}}, {high:{form}}]"
    return f"{value:{form}}{sure}{'' if scores.official else ' *'}"


def category_tables(columns: Sequence[ScoreColumn]) -> list[tuple[ScoreColumn, str, Table]]:
    """MT-Bench by category, a table a column: the column, its title, and means of ratings."""
    found = []
    for column in columns:
        identity = column.scores[0].identity
        if identity.benchmark != mt_bench.BENCHMARK:
            continue
        rows = mt_bench.category_table(column.scores)
        names = [*mt_bench.CATEGORIES, "turn-1", "turn-2", "overall"]
        heads = [name for name in names if any(name in row for row in rows)]
        lines = [Line(str(row["model"]), tuple(_mean(row.get(head)) for head in heads)) for row in rows]
        title = f"MT-Bench by category, judge {identity.judge}{column.mark}"
        found.append((column, title, Table(("model", *(head.replace("-", " ") for head in heads)), lines)))
    return found


def canary_table(sources: Sequence[Source]) -> Table:
    """What each judge gave answers that deserve nothing; one line where several models had the same canaries."""
    found: list[tuple[str, dict[str, CanaryResult], list[str]]] = []
    for file in _files(sources):
        if not file.canaries:
            continue
        identity = file.scores[0].identity
        against = f", against {identity.baseline}" if identity.baseline else ""
        label, model = f"{_name(identity)}, judge {identity.judge}{against}", file.scores[0].model
        same = (label, file.canaries)
        models = next((line[2] for line in found if line[:2] == same), None)
        if models is None:
            found.append((*same, [model]))
        elif model not in models:
            models.append(model)
    names = list(dict.fromkeys(name for _, canaries, _ in found for name in canaries))
    lines = [
        Line(
            label,
            (
                *(canary_words(canaries[n]) if n in canaries else ABSENT for n in names),
                ", ".join(models),
            ),
        )
        for label, canaries, models in found
    ]
    return Table(("benchmark and judge", *names, "mixed in with"), lines)


def _files(sources: Sequence[Source]) -> list[Scored]:
    """Every score file once: a folder may be given by itself and lie in another one."""
    found: list[Scored] = []
    for file in (file for source in sources for file in source.scores):
        resolved = replace(file, folder=file.folder.resolve())
        if resolved not in found:
            found.append(resolved)
    return found


def _mean(value: str | float | None) -> str:
    mean = number(value)
    return ABSENT if mean is None else f"{mean:.2f}"


def _name(identity: Identity) -> str:
    known = (each.title for key, each in BENCHMARKS.items() if identity.benchmark.startswith(key))
    return next(known, identity.benchmark)


def _about(scores: Sequence[Scores]) -> str:
    """What the scores of a column share, how many items they are of, and the notes of each."""
    identity = scores[0].identity
    facts = {
        "benchmark": identity.benchmark,
        "judge": identity.judge,
        "rules": identity.rules,
        "prompts": identity.prompts,
        "baseline": identity.baseline,
        "questions": identity.questions,
        **identity.settings,
    }
    # Of a hash the first few characters tell as much.
    words = [
        f"{key} {str(value)[:12] if key in _HASHES else value}"
        for key, value in facts.items()
        if value not in (None, "")
    ]
    words += [f"{each.model}: {_items(each)}" for each in scores]
    notes = dict.fromkeys(note for each in scores for note in each.notes)
    return "; ".join([", ".join(words), *(note if scores[0].official else f"* {note}" for note in notes)])


def _items(scores: Scores) -> str:
    unscored = len(scores.unscored)
    return f"{count(scores.scored)} items scored" + (f", {unscored} not" if unscored else "")


def _marks(columns: int) -> list[str]:
    return [""] * columns if columns < 2 else [f" {chr(97 + at % 26)})" for at in range(columns)]
