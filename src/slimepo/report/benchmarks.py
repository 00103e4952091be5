"""Scores of `slimepo eval` as tables: models by benchmarks, the parts of some, and what judges gave the canaries.

Scores of different judges, prompts, baselines, questions, rules or settings never share a column, a table or a picture.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimepo.evaluation.benchmarks import ifeval
from slimepo.evaluation.benchmarks.bootstrap import paired_difference
from slimepo.evaluation.benchmarks.mt_bench import BENCHMARK, CATEGORIES, category_table
from slimepo.evaluation.canaries import CanaryResult, canary_words
from slimepo.evaluation.judge.request import Identity, Measure, Scores
from slimepo.evaluation.judge.request import columns as split_columns
from slimepo.evaluation.score_files import ScoreFile
from slimepo.evaluation.settings import BENCHMARKS
from slimepo.report.figures import (
    COLOURS,
    INK,
    LINES,
    MARKERS,
    WIDE,
    Panel,
    Style,
    figure_of,
    styles,
    svg,
    swatch,
)
from slimepo.report.groups import Group, count
from slimepo.report.records import Source, mapping, number, unique
from slimepo.report.tables import Line, Table, in_blocks
from slimepo.words import ABSENT

# More lines than these cannot be followed in one picture, and fewer axes span no area.
_MOST_MODELS, _FEWEST_CATEGORIES = 6, 3
_TOP = 10.0
# Models in the sentence about a benchmark.
_MOST_TOLD = 3
_HASHES = ("prompts", "questions", "references")
_NOTES = {
    BENCHMARK: "Mean ratings of both turns. A category of the published set has 10 questions: small differences are "
    "chance.",
    ifeval.BENCHMARK: "Percent, with 95 % intervals. Of prompts all of whose instructions are followed, and of "
    "instructions; strictly as the response stands, loosely also without its first line, last line or asterisks. By "
    "kind: instructions, strictly.",
}
_PAIRED = (
    "Percentage points, with 95 % intervals of the difference itself: prompts are drawn again 1,000 times, the same "
    f"ones for both models. {ABSENT} where a score file is older and does not hold the verdicts one by one: "
    "slimepo eval ifeval score writes it anew."
)


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
    # Arena-Hard's score of a category stands in the file of the whole benchmark and in the category's own.
    scores: list[tuple[Path, Scores]] = []
    for entry in ((file.folder, each) for file in _files(sources) for each in file.scores):
        if entry not in scores:
            scores.append(entry)
    counts = [Counter(each.model for each in column) for column in split_columns(each for _, each in scores)]
    twice = {model for column in counts for model, times in column.items() if times > 1}
    places = list(dict.fromkeys((folder, each.model) for folder, each in scores if each.model in twice))
    labels = unique([f"{folder.parent.name}/{folder.name}: {model}" for folder, model in places])
    label_of = dict(zip(places, labels, strict=True))
    run_of = dict(zip(labels, (model for _, model in places), strict=True))
    told = [replace(each, model=label_of.get((folder, each.model), each.model)) for folder, each in scores]
    found = []
    columns = split_columns(told)
    for at, column in enumerate(columns):
        # Two scores of one folder that should be one, and are not, are both shown.
        names = unique([each.model for each in column])
        runs = {name: run_of.get(each.model, each.model) for name, each in zip(names, column, strict=True)}
        renamed = [replace(each, model=name) for name, each in zip(names, column, strict=True)]
        mark = f" {chr(97 + at % 26)})" if len(columns) > 1 else ""
        found.append(ScoreColumn(mark, tuple(renamed), runs))
    return found


def benchmark_table(columns: Sequence[ScoreColumn]) -> tuple[Table, list[str]]:
    """Models by benchmarks, each cell the headline with its interval; and what is to be known of the columns."""
    models = list(dict.fromkeys(each.model for column in columns for each in column.scores))
    cells = [{each.model: benchmark_cell(each) for each in column.scores} for column in columns]
    lines = [Line(model, tuple(column.get(model, ABSENT) for column in cells)) for model in models]
    notes = [f"{column.mark or column.head + ':'} {_about(column.scores)}".strip() for column in columns]
    return Table(("model", *(column.head for column in columns)), lines), notes


def benchmark_cell(scores: Scores) -> str:
    """The headline measure with its interval (`34.1 [31.8, 36.0]`), else its standard error (`34.1 ± 1.3`)."""
    cell = _cell(scores.measures.get(scores.headline), ".2f" if scores.unit == "1-10" else ".1f")
    return cell if scores.official or cell == ABSENT else f"{cell} *"


def _cell(measure: Measure | None, form: str) -> str:
    value = number(measure.value) if measure else None
    if measure is None or value is None:
        return ABSENT
    low, high, error = map(number, (measure.lower, measure.upper, measure.standard_error))
    sure = f" ± {error:{form}}" if error is not None else ""
    if low is not None and high is not None:
        sure = f" [{low:{form}}, {high:{form}}]"
    return f"{value:{form}}{sure}"


def category_tables(columns: Sequence[ScoreColumn]) -> list[tuple[ScoreColumn, str, Table]]:
    """MT-Bench by category and IFEval's figures by kind, a table a column: the column, its title, the table."""
    found = []
    for column in columns:
        identity = column.scores[0].identity
        if identity.benchmark == BENCHMARK:
            title = f"MT-Bench by category, judge {identity.judge}{column.mark}"
            found.append((column, title, _mean_ratings(column.scores)))
        elif identity.benchmark == ifeval.BENCHMARK:
            found.append((column, f"IFEval's figures, and by kind{column.mark}", _shares(column.scores)))
    return found


def paired_tables(columns: Sequence[ScoreColumn], sources: Sequence[Source]) -> list[tuple[str, Table]]:
    """How the models of an IFEval column differ, question by question: a title and a table each.

    They are compared with the model that runs on the page started from, else with the first one.
    """
    found = []
    for column in columns:
        if column.scores[0].identity.benchmark == ifeval.BENCHMARK and len(column.scores) > 1:
            start = _start_of(column, sources) or column.scores[0]
            lines = [
                Line(each.model, tuple(_difference(each, start, name) for name in ifeval.FIGURES))
                for each in column.scores
                if each is not start
            ]
            heads = ("model", *(name.replace("_", " ") for name in ifeval.FIGURES))
            title = f"IFEval: paired differences to {start.model}{column.mark}"
            found.append((title, Table(heads, lines)))
    return found


def benchmark_verdict(columns: Sequence[ScoreColumn], sources: Sequence[Source]) -> str:
    """What training did to IFEval's scores, in a sentence; empty where the start was not scored."""
    sentences = []
    for column in columns:
        start = _start_of(column, sources)
        others = [each for each in column.scores if each is not start and ifeval.FIGURES[0] in each.items]
        if start is None or not others or ifeval.FIGURES[0] not in start.items:
            continue
        told = ", ".join(
            f"{_difference(each, start, ifeval.FIGURES[0])}{' points' if each is others[0] else ''} with {each.model}"
            for each in others[:_MOST_TOLD]
        )
        more = f" and {len(others) - _MOST_TOLD} more" * (len(others) > _MOST_TOLD)
        began = _cell(start.measures.get(ifeval.FIGURES[0]), ".1f")
        sentences.append(
            f"IFEval{column.mark}, prompts of which every instruction was followed: {told}{more}, from {began} % at "
            "the start."
        )
    return " ".join(sentences)


def _start_of(column: ScoreColumn, sources: Sequence[Source]) -> Scores | None:
    """The scores of the model that the runs started from, by its name; None where it was not scored."""
    models = {Path(str(model)).name for each in sources if (model := mapping(each.recipe).get("model"))}
    return next((each for each in column.scores if column.runs[each.model] in models), None)


def _difference(one: Scores, other: Scores, name: str) -> str:
    if name not in one.items or name not in other.items:
        return ABSENT
    difference, *ends = (100 * part for part in paired_difference(one.items[name], other.items[name], seed=0))
    return f"{difference:+z.1f} [{', '.join(f'{end:+z.1f}' for end in ends)}]"


def _mean_ratings(scores: Sequence[Scores]) -> Table:
    rows = category_table(scores)
    names = [*CATEGORIES, "turn-1", "turn-2", "overall"]
    heads = [name for name in names if any(name in row for row in rows)]
    lines = []
    for row in rows:
        means = [number(row.get(head)) for head in heads]
        cells = (ABSENT if mean is None else f"{mean:.2f}" for mean in means)
        lines.append(Line(str(row["model"]), tuple(cells)))
    return Table(("model", *(head.replace("-", " ") for head in heads)), lines)


def _shares(scores: Sequence[Scores]) -> Table:
    kinds = sorted({name for each in scores for name in each.measures} - set(ifeval.FIGURES))
    names = [*ifeval.FIGURES, *kinds]
    lines = [
        Line(each.model, tuple(_cell(each.measures.get(name), ".1f") for name in names)) for each in scores
    ]
    return Table(("model", *(name.rpartition("/")[2].replace("_", " ") for name in names)), lines)


def canary_table(sources: Sequence[Source]) -> Table:
    """What each judge gave answers that deserve nothing; one line where several models had the same canaries."""
    found: list[tuple[str, dict[str, CanaryResult], list[str]]] = []
    for file in (file for file in _files(sources) if file.canaries):
        identity, model = file.scores[0].identity, file.scores[0].model
        against = f", against {identity.baseline}" if identity.baseline else ""
        label = f"{_name(identity)}, judge {identity.judge}{against}"
        models = next((line[2] for line in found if line[:2] == (label, file.canaries)), None)
        if models is None:
            found.append((label, file.canaries, [model]))
        elif model not in models:
            models.append(model)
    names = list(dict.fromkeys(name for _, canaries, _ in found for name in canaries))
    lines = []
    for label, canaries, models in found:
        words = [canary_words(canaries[name]) if name in canaries else ABSENT for name in names]
        lines.append(Line(label, (*words, ", ".join(models))))
    return Table(("benchmark and judge", *names, "mixed in with"), lines)


def _files(sources: Sequence[Source]) -> list[ScoreFile]:
    """Every score file once: a folder may be given by itself and lie in another one."""
    found: list[ScoreFile] = []
    for file in (file for source in sources for file in source.scores):
        resolved = replace(file, folder=file.folder.resolve())
        if resolved not in found:
            found.append(resolved)
    return found


def _name(identity: Identity) -> str:
    known = (each.title for key, each in BENCHMARKS.items() if identity.benchmark.startswith(key))
    return next(known, identity.benchmark)


def _about(scores: Sequence[Scores]) -> str:
    """What the scores of a column share, how many items they are of, and the notes of each."""
    identity = scores[0].identity
    facts = {key: value for key, value in vars(identity).items() if key != "settings"}
    # Of a hash the first few characters tell as much.
    words = [
        f"{key} {str(value)[:12] if key in _HASHES else value}"
        for key, value in {**facts, **identity.settings}.items()
        if value not in (None, "")
    ]
    for each in scores:
        unscored = f", {len(each.unscored)} not" if each.unscored else ""
        words.append(f"{each.model}: {count(each.scored)} items scored{unscored}")
    notes = dict.fromkeys(note for each in scores for note in each.notes)
    return "; ".join([", ".join(words), *(note if scores[0].official else f"* {note}" for note in notes)])


def category_sections(
    columns: Sequence[ScoreColumn], groups: Sequence[Group], sources: Sequence[Source]
) -> list[dict[str, Any]]:
    """What the page shows of `category_tables` and `paired_tables`: a note, and where it can be drawn a radar plot."""
    found = []
    for column, title, table in category_tables(columns):
        look = model_styles(column, groups)
        panels = radar_panels(column, title, look)
        keys = {label: swatch(style) for label, style in look.items()} if panels else {}
        note = _NOTES[column.scores[0].identity.benchmark]
        found.append({"title": title, "note": note, "table": table, "panels": panels, "keys": keys})
    return found + [
        {"title": title, "note": _PAIRED, "table": table} for title, table in paired_tables(columns, sources)
    ]


def model_styles(column: ScoreColumn, groups: Sequence[Group]) -> dict[str, Style]:
    """One style a model: that of its run where the run is on the page too, else one that is left.

    Models of one group (seeds) share its colour and differ in line and marker.
    """
    look = styles(groups)
    of_run = {
        f"{Path(record.source).resolve().name}-{record.stage}": look[group.label]
        for group in groups
        for record in group.records
    }
    wanted = {label: of_run.get(run) for label, run in column.runs.items()}
    used = {style.colour for style in wanted.values() if style}
    free = sorted(COLOURS, key=lambda colour: colour in used)
    found: dict[str, Style] = {}
    for label in sorted(wanted, key=lambda label: wanted[label] is None):
        own = wanted[label]
        shapes = list(zip(LINES, MARKERS, strict=True))
        others = [Style(colour, *shape) for shape in shapes for colour in ([own.colour] if own else free)]
        choice = [own, *others] if own else others
        left = (style for style in choice if style not in found.values())
        found[label] = next(left, choice[len(found) % len(choice)])
    return {label: found[label] for label in column.runs}


def radar_panels(column: ScoreColumn, title: str, look: Mapping[str, Style]) -> list[Panel]:
    """The models of a column overlaid, at most six a picture; none where fewer than three categories are scored."""
    rows = category_table(column.scores)
    names = [name for name in CATEGORIES if any(name in row for row in rows)]
    if len(names) < _FEWEST_CATEGORIES:
        return []
    blocks = in_blocks(rows, _MOST_MODELS)
    panels = []
    for at, (first, last) in enumerate(blocks, 1):
        models = {
            str(row["model"]): [float(row.get(name, math.nan)) for name in names] for row in rows[first:last]
        }
        part = f" ({at} of {len(blocks)})" if len(blocks) > 1 else ""
        drawn = _radar(f"{title}{part}", names, models, look)
        panels.append(Panel(f"Mean rating, 0 to 10{part}", drawn))
    return panels


def _radar(
    title: str, names: Sequence[str], models: Mapping[str, Sequence[float]], look: Mapping[str, Style]
) -> str:
    angles = [2 * math.pi * at / len(names) for at in range(len(names))]
    # Ratings beyond the scale count as they are.
    top = max([_TOP, *(value for values in models.values() for value in values if value == value)])
    with figure_of(WIDE, 3.1, left=0.2, right=0.8, bottom=0.13, top=0.87, polar=True) as (figure, axes):
        axes.set_theta_zero_location("N")
        axes.set_theta_direction(-1)
        for label, values in models.items():
            style, closed = look[label], [*values, values[0]]
            around, line = [*angles, angles[0]], {"color": style.colour, "linestyle": style.line}
            axes.plot(around, closed, style.marker, **line, linewidth=1.4, markersize=3.6)
            # A category without a score is a gap, not a zero.
            if not any(math.isnan(value) for value in values):
                axes.fill(around, closed, color=style.colour, alpha=0.07, linewidth=0)
        axes.set_ylim(0, top)
        axes.set_xticks(angles, [""] * len(names))
        axes.set_yticks([2, 4, 6, 8, 10], ["2", "4", "6", "8", "10"], fontsize=7)
        axes.set_rlabel_position(math.degrees(angles[1]) / 2)
        for name, angle in zip(names, angles, strict=True):
            across, up = math.sin(angle), math.cos(angle)
            side = "center" if abs(across) < 0.1 else "left" if across > 0 else "right"
            height = "center" if abs(up) < 0.1 else "bottom" if up > 0 else "top"
            axes.text(angle, 1.06 * top, name, ha=side, va=height, color=INK)
        said = "; ".join(
            f"{label}: {', '.join(f'{n} {v:.2f}' for n, v in zip(names, values, strict=True) if v == v)}"
            for label, values in models.items()
        )
        return svg(figure, f"radar-{title}", f"{title}, mean ratings of 0 to {top:g}: {said}")
