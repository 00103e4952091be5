"""The page and the tables that end the quickstart, from one plain dict (the run folder's result)."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from slimepo.report import figures
from slimepo.report.figures import Run, short_rate

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.table import Table

_LABELS = {
    "slime": "SLIME",
    "dpo": "DPO",
    "simpo": "SimPO",
    "sft": "SFT control",
    "kto": "KTO",
    "orpo": "ORPO",
}
_CONTROL = "plain SFT on the chosen answers"
_MOST_CHARACTERS = 300
_NONE = "–"

# Heading on the page and in Markdown, heading in the terminal.
COLUMNS: tuple[tuple[str, str], ...] = (
    ("exact match, %", "exact, %"),
    ("valid format, %", "valid"),
    ("end token, %", "ends"),
    ("repetition, %", "rep."),
    ("chosen, nats/token", "chosen"),
    ("rejected, nats/token", "reject."),
    ("chosen fell, %", "fell"),
    ("under floor, %", "floor"),
)
_TERMINAL_NOTES = (
    "exact, chosen: before → after; chosen, reject.: nats per token",
    "rep.: answers that loop; fell: pairs whose chosen answer became less likely",
    "floor: rejected tokens under the floor of SLIME's rejected term",
)


class Finding(NamedTuple):
    """A sentence or two about the numbers under a short heading, and lines that go with them."""

    head: str
    text: str
    lines: tuple[str, ...] = ()


class Row(NamedTuple):
    """One line of the results table; `cells` go with `COLUMNS`."""

    name: str
    objective: str
    rate: str
    cells: tuple[str, ...]
    note: str = ""
    error: str = ""
    best: bool = False


def quickstart_page(result: Mapping[str, Any]) -> str:
    """One self-contained HTML page about a quickstart: findings, table, figures, samples, settings.

    Nothing in `result` is required; what is absent is left out. Needs the extra `report` (InputError without).
    """
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    runs = read_runs(result)
    look = figures.styles(runs)
    environment = Environment(
        loader=PackageLoader("slimepo", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(svg=Markup, count=_count, duration=_duration, short=_short, whole=_whole)
    return environment.get_template("template.html.j2").render(
        result=result,
        runs=runs,
        findings=findings(result, runs),
        columns=[page for page, _ in COLUMNS],
        rows=table_rows(result, runs),
        figures=_figures(result, runs),
        keys={run.name: figures.swatch(look[run.name]) for run in runs},
        rates=_rate_keys(runs, look),
        start_key=figures.swatch(),
        pairs=_numbers(result.get("pairs")),
        seconds=_numbers(result.get("seconds")),
        recipe=_yaml(result.get("recipe")),
    )


def markdown_table(result: Mapping[str, Any]) -> str:
    """The results table in Markdown."""
    heads = ["run", "objective", "learning rate", *(page for page, _ in COLUMNS)]
    lines = [heads, ["---"] * 3 + ["---:"] * len(COLUMNS)]
    for row in table_rows(result, read_runs(result)):
        objective = f"{row.objective} ({row.note})" if row.note else row.objective
        first = f"stopped: {row.error}" if row.error else row.cells[0]
        cells = [_markdown(cell) for cell in (row.name, objective, row.rate, first, *row.cells[1:])]
        lines.append([f"**{cell}**" if row.best and at in (0, 3) else cell for at, cell in enumerate(cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def results_table(result: Mapping[str, Any]) -> Table:
    """The results table for a terminal of 100 columns or more."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = table_rows(result, read_runs(result))
    controls = [row.name for row in rows if row.note == _CONTROL]
    notes = [f"{row.name} stopped: {row.error}" for row in rows if row.error]
    notes += [f"{', '.join(controls)}: the control, {_CONTROL}"] if controls else []
    table = Table(
        title=Text(str(result.get("title") or "slimepo quickstart")),
        title_justify="left",
        caption=Text("\n".join([*notes, *_TERMINAL_NOTES])),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("run", overflow="fold", min_width=10)
    for _, head in COLUMNS:
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        cells = ("stopped", *row.cells[1:]) if row.error else row.cells
        table.add_row(*(Text(cell) for cell in (row.name, *cells)), style="bold" if row.best else None)
    return table


def read_runs(result: Mapping[str, Any]) -> list[Run]:
    """The runs of a result, cleaned of what is absent or not a finite number. Equal names get a number."""
    found = [run for run in result.get("runs") or () if isinstance(run, Mapping)]
    runs: list[Run] = []
    for index, run in enumerate(found):
        rate = _number(run.get("learning_rate"))
        name = str(run.get("name") or f"{run.get('objective')} {short_rate(rate)}")
        runs.append(
            Run(
                name=f"{name} ({index + 1})" if name in {other.name for other in runs} else name,
                objective=str(run.get("objective") or "unknown"),
                series=_series_name(run, found),
                learning_rate=rate,
                options=dict(run.get("options") or {}),
                before=_numbers(run.get("before")),
                after=_numbers(run.get("after")),
                chosen_fell=_number(run.get("chosen_fell")),
                curve=[_numbers(point) for point in run.get("curve") or ()],
                seconds=_number(run.get("seconds")),
                steps=_number(run.get("steps")),
                error=str(run.get("error") or ""),
            )
        )
    return runs


def table_rows(result: Mapping[str, Any], runs: Sequence[Run]) -> list[Row]:
    """The results table: the SFT model that every run starts from, then the runs in their order."""
    start, best = start_metrics(result, runs), _best(runs)
    rows = [Row("SFT start", _NONE, _NONE, _cells({}, start, None))] if start else []
    for run in runs:
        note = _CONTROL if run.objective == "sft" else _told(run.options)
        objective = _LABELS.get(run.objective, run.objective)
        cells = _cells(run.before or start, run.after, run.chosen_fell)
        rows.append(
            Row(run.name, objective, short_rate(run.learning_rate), cells, note, run.error, run is best)
        )
    return rows


def start_metrics(result: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, float]:
    """What the SFT model scored before any run: `sft.metrics`, and the `before` of the runs where they have one."""
    before = next((run.before for run in runs if run.before), {})
    return {**_numbers((result.get("sft") or {}).get("metrics")), **before}


def findings(result: Mapping[str, Any], runs: Sequence[Run]) -> list[Finding]:
    """What the numbers say, in plain words and whatever they are."""
    start = start_metrics(result, runs)
    made = [
        _best_match(runs, start.get("exact_match")),
        _by_series(
            "Learning rate", "Exact match from the lowest to the highest rate tried:", runs, _rate_words
        ),
        _by_series(
            "Chosen answers", "The chosen answer became less likely in so many pairs:", runs, _fell_words
        ),
        _format(runs, start.get("format_valid")),
        _certainty(result, [run.after for run in runs] + [start]),
        *(Finding("Stopped", f"{run.name}: {run.error}") for run in runs if run.error),
    ]
    return [finding for finding in made if finding is not None]


def _best_match(runs: Sequence[Run], start: float | None) -> Finding | None:
    best = _best(runs)
    if best is None:
        return None
    control = _best([run for run in runs if run.objective == "sft"])
    others = _best([run for run in runs if run.objective != "sft"])
    score = best.after["exact_match"]
    text = f"{best.name}{f', the control ({_CONTROL})' if best is control else ''}: {_percent(score, 1)}"
    text += f", from {_percent(start, 1)} after SFT." if start is not None else "."
    if start is not None and score <= start:
        text = f"No run is better than the SFT start. The nearest is {text}"
    if best is control and others is not None:
        text += f" Best of those that also see rejected answers: {others.name}, {_match(others)}."
    elif control is not None:
        text += f" The control, {_CONTROL}: {_match(control)} at its best ({control.name})."
    return Finding("Best exact match", text)


def _by_series(
    head: str, lead: str, runs: Sequence[Run], words: Callable[[list[Run]], str]
) -> Finding | None:
    told = [(name, words(group)) for name, group in figures.series(runs).items()]
    lines = tuple(f"{name}: {text}" for name, text in told if text)
    return Finding(head, lead, lines) if lines else None


def _rate_words(group: list[Run]) -> str:
    have = [run for run in group if "exact_match" in run.after and run.learning_rate is not None]
    if len({run.learning_rate for run in have}) < 2:
        return ""
    rates = f"{short_rate(have[0].learning_rate)} to {short_rate(have[-1].learning_rate)}"
    return f"{_match(have[0])} → {_match(have[-1])} ({rates})"


def _fell_words(group: list[Run]) -> str:
    have = [(run.chosen_fell, short_rate(run.learning_rate)) for run in group if run.chosen_fell is not None]
    return ", ".join(f"{_percent(share, 0)} at {rate}" for share, rate in have)


def _format(runs: Sequence[Run], start: float | None) -> Finding | None:
    have = sorted(
        (run for run in runs if "format_valid" in run.after), key=lambda run: run.after["format_valid"]
    )
    if not have:
        return None
    ends = [(have[-1], "highest")] + ([(have[0], "lowest")] if len(have) > 1 else [])
    told = [f"{_percent(run.after['format_valid'], 1)} with {run.name} (the {which})" for run, which in ends]
    told += [f"{_percent(start, 1)} after SFT"] if start is not None else []
    return Finding("Format", f"Answers in a valid form: {', '.join(told)}.")


def _certainty(result: Mapping[str, Any], scores: Sequence[Mapping[str, float]]) -> Finding | None:
    prompts = _number(result.get("heldout_prompts"))
    shares = [each["exact_match"] for each in scores if 0 <= each.get("exact_match", -1) <= 1]
    if not prompts or prompts < 1 or not shares:
        return None
    # The share nearest to one half has the widest interval.
    share = min(shares, key=lambda share: abs(share - 0.5))
    points = 196 * math.sqrt(share * (1 - share) / prompts)
    return Finding(
        "How sure",
        f"One seed and {_count(prompts)} held-out prompts: an exact match is known to about ± {points:.1f} points "
        "(95 %). Smaller differences may be chance, and another seed was not tried.",
    )


def _best(runs: Sequence[Run]) -> Run | None:
    have = [run for run in runs if "exact_match" in run.after]
    return max(have, key=lambda run: run.after["exact_match"], default=None)


def _cells(before: Mapping[str, float], after: Mapping[str, float], fell: float | None) -> tuple[str, ...]:
    def share(key: str) -> str:
        return f"{100 * after[key]:.1f}" if key in after else _NONE

    def change(key: str, scale: float, form: str) -> str:
        numbers = [format(side[key] * scale, form) for side in (before, after) if key in side]
        return " → ".join(numbers) if key in after else _NONE

    return (
        change("exact_match", 100, ".1f"),
        share("format_valid"),
        share("end_rate"),
        share("repetition"),
        change("logps/chosen", 1, ".2f"),
        f"{after['logps/rejected']:.2f}" if "logps/rejected" in after else _NONE,
        f"{100 * fell:.1f}" if fell is not None else _NONE,
        share("rejected_below_floor"),
    )


def _figures(result: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, list[figures.Panel]]:
    start = start_metrics(result, runs)
    over_rate = [
        figures.over_learning_rate(runs, key, start.get(key), title, scale)
        for key, title, scale in (
            ("exact_match", "Exact match, %", 100),
            ("logps/chosen", "Chosen answers, nats per token", 1),
            ("format_valid", "Valid format, %", 100),
        )
    ]
    return {
        "rate": [panel for panel in over_rate if panel is not None],
        "curves": figures.training_curves(runs, start),
        "families": figures.family_dots(runs),
    }


def _rate_keys(runs: Sequence[Run], look: Mapping[str, figures.Style]) -> list[tuple[str, str]]:
    first = {run.learning_rate: look[run.name] for run in reversed(runs) if run.learning_rate is not None}
    return [(short_rate(rate), figures.swatch(first[rate], neutral=True)) for rate in sorted(first)]


def _series_name(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """The objective; where runs differ in its options too, the run's name without its learning rate."""
    objective = str(run.get("objective") or "unknown")
    label = _LABELS.get(objective, objective)
    others = [
        r
        for r in runs
        if r.get("objective") == run.get("objective") and r.get("options") != run.get("options")
    ]
    if not others:
        return label
    stem = _stem(run)
    label = label if stem in ("", objective) else stem
    return f"{label} {_told(run.get('options') or {})}".strip() if stem in map(_stem, others) else label


def _stem(run: Mapping[str, Any]) -> str:
    return re.sub(r"\s+[\d.]+(e[-+]?\d+)?$", "", str(run.get("name") or ""))


def _yaml(recipe: Any) -> str:
    from ruamel.yaml import YAML

    text = io.StringIO()
    # Through JSON, so that only plain data is left, whatever paths or tuples the recipe holds.
    YAML().dump(json.loads(json.dumps(recipe, default=str)), text)
    return text.getvalue() if recipe else ""


def _told(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())


def _match(run: Run) -> str:
    return _percent(run.after["exact_match"], 1)


def _percent(share: float, digits: int) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"


def _whole(text: str) -> Markup:
    """The text, escaped, with numbers such as 1e-3 kept on one line (browsers break at the hyphen)."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"\S*\d+e-\d+", r'<span class="whole">\g<0></span>', str(escape(text))))


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"


def _markdown(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).replace("|", "\\|").replace("<", "&lt;")


def _count(value: Any) -> str:
    number = _number(value)
    return _NONE if number is None else f"{number:,.0f}"


def _duration(value: Any) -> str:
    seconds = _number(value)
    if seconds is None:
        return _NONE
    return f"{seconds:.1f} s" if seconds < 60 else "{} min {} s".format(*divmod(round(seconds), 60))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _numbers(value: Any) -> dict[str, float]:
    pairs = ((str(key), _number(item)) for key, item in (value or {}).items())
    return {key: number for key, number in pairs if number is not None}
