"""The report: one self-contained HTML page and its tables in Markdown, from folders of runs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError, unwritable
from slimepo.files import refuse_folder, write_text
from slimepo.redaction import redact
from slimepo.report import curves, panels, tables
from slimepo.report.benchmarks import (
    benchmark_table,
    canary_table,
    category_sections,
    category_tables,
    paired_tables,
    score_columns,
)
from slimepo.report.figures import styles, swatch
from slimepo.report.findings import findings, verdict
from slimepo.report.folders import read_sources
from slimepo.report.groups import Group, compare_settings, count, group_records
from slimepo.report.map import map_panel, map_picture
from slimepo.report.records import Sample, Source, mapping
from slimepo.words import ABSENT

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.console import Console

_MOST_CHARACTERS = 300
_MOST_SAMPLES = 40
_MOST_TIMELINES = 6
_MOST_COMMANDS = 12
# What LaTeX reads as its own.
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "→": r"$\to$",
    ABSENT: "--", "\u00a0": "~", **{letter: f"\\{letter}" for letter in "%&_#$" + "{" + "}"},
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a page is made from: the folders as they were given, and their runs grouped over seeds."""

    sources: tuple[Source, ...]
    groups: tuple[Group, ...]

    @property
    def title(self) -> str:
        """The model and the data, where all runs share them; else the run's name, or how many runs there are."""
        recipes = [mapping(source.recipe) for source in self.sources if source.records]
        models = {_last(recipe.get("model")) for recipe in recipes} - {""}
        data = {_last(mapping(recipe.get("data")).get("path")) for recipe in recipes} - {""}
        if len(models) == 1 and len(data) <= 1:
            return " on ".join((*models, *data))
        if len(self.sources) == 1:
            return self.sources[0].path.resolve().name or "slimepo report"
        return f"slimepo report: {self.runs} runs" if self.runs else "slimepo report"

    @property
    def runs(self) -> int:
        """Runs on the page, each seed counted."""
        return sum(len(group.records) for group in self.groups)

    @property
    def counted(self) -> str:
        """How many runs are on the page; where there is none, how many scores of how many models."""
        models = [score.model for column in score_columns(self.sources) for score in column.scores]
        told = {"score": len(models), "model": len(set(models))}
        if self.runs or not models:
            told = {"run": self.runs}
        return " of ".join(f"{number} {what}{'' if number == 1 else 's'}" for what, number in told.items())


def read_report(paths: Sequence[Path]) -> Report:
    """Read every folder.

    Raises:
        InputError: one is no folder of slimepo's, or there is nothing in any of them.
    """
    sources = read_sources(paths)
    groups = group_records([record for source in sources for record in source.records])
    return Report(tuple(sources), tuple(groups))


def write_report(paths: Sequence[Path], page: Path) -> Report:
    """Read folders and write the page, beside it its tables in Markdown and its map as a picture.

    Raises:
        InputError: as `read_report`; the extra `report` (matplotlib) is not installed; or nothing can be written there.
    """
    report = read_report(paths)
    texts = {page: report_page(report), page.with_suffix(".md"): report_markdown(report)}
    try:
        for path, text in texts.items():
            write_text(path, redact(text))
        if picture := map_picture(report.groups, redact(report.title)):
            page.with_suffix(".png").write_bytes(picture)
    except OSError as error:
        raise unwritable(f"report: {page}", error, "--out says where the page goes") from error
    return report


def report_command(paths: Sequence[Path], out: Path | None, console: Console) -> None:
    """What `slimepo report` does; the page goes into the folder that it is about, or here for several.

    Raises:
        InputError: as `write_report`; or `out` cannot be a page.
    """
    page = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    if page.is_dir():
        raise InputError(f"--out {page} is a folder; give a file, such as {page / 'report.html'}")
    refuse_folder(page)
    if page.suffix == ".md":
        raise InputError(
            f"--out {page}: the page is HTML; give {page.with_suffix('.html')}, Markdown comes beside it"
        )
    report = write_report(paths, page)
    unfinished = sum(record.state != "finished" for group in report.groups for record in group.records)
    note = f", {unfinished} not to the end" if unfinished else ""
    console.print(f"{report.counted}{note}: {page}")
    beside = [f"tables in Markdown: {page.with_suffix('.md')}"]
    beside += [f"map: {page.with_suffix('.png')}"] if page.with_suffix(".png").exists() else []
    console.print(", ".join(beside))


def report_page(report: Report) -> str:
    """One self-contained HTML page. What a run folder does not have is left out, not made up."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    groups, sources = report.groups, report.sources
    records = [record for group in groups for record in group.records]
    environment = Environment(
        loader=PackageLoader("slimepo", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(svg=Markup, count=count, short=_short, whole=_whole, parted=_parted)
    differing, same = compare_settings(groups)
    columns = score_columns(sources)
    benchmarks, benchmark_notes = benchmark_table(columns)
    results, start = tables.results(groups, sources), tables.common_start(groups)
    versions: dict[str, dict[str, None]] = {}
    for source in sources:
        for name, version in source.versions.items():
            versions.setdefault(name, {})[version] = None
    return environment.get_template("template.html.j2").render(
        report=report,
        groups=groups,
        map=map_panel(groups),
        verdict=verdict(groups),
        findings=findings(groups, sources),
        results=results,
        benchmarks=benchmarks,
        benchmark_notes=benchmark_notes,
        categories=category_sections(columns, groups),
        canaries=canary_table(sources),
        speed=tables.speed(groups, sources),
        data=tables.data_facts(groups, sources),
        figures={
            "rate": panels.rate_panels(groups, start),
            "curves": curves.curve_panels(groups, curves.logged, curves.MAIN, start),
            "sampled": curves.curve_panels(groups, curves.logged, curves.SAMPLED),
            "answered": curves.curve_panels(groups, curves.answered, curves.ANSWERED),
            "watched": curves.curve_panels(groups, curves.watched, curves.WATCHED),
            "others": curves.curve_panels(groups, curves.logged, curves.other_metrics(groups)),
            "shapes": panels.distribution_panels(groups),
            "families": panels.family_panels(groups),
            "start": bool(start),
            "pairs_start": any(key in start for key, _ in curves.MAIN),
        },
        keys={label: swatch(style) for label, style in styles(groups).items()},
        start_key=swatch(),
        differing=differing,
        same=same,
        blocks=tables.in_blocks(groups),
        samples=shown_samples(sources)[:_MOST_SAMPLES],
        over_time=[record for record in records if record.over_time][:_MOST_TIMELINES],
        warned=[record for record in records if record.warnings],
        monitor_facts=[(record.name, fact) for record in records for fact in record.monitor_facts],
        start=tables.start_group(sources),
        seeds=sorted({record.seed for record in records if record.seed is not None}),
        prompts=sorted({record.prompts for record in records if record.prompts}),
        pairs=tables.pair_facts(sources),
        versions=[(name, ", ".join(found)) for name, found in sorted(versions.items())],
        commands=[
            f"slimepo run {source.path.name}/recipe.yaml --out again/{source.path.name}"
            for source in sources
            if source.records
        ][:_MOST_COMMANDS],
        cited=[("Markdown", _markdown_table(results)), ("LaTeX", _latex_table(results))]
        if results.lines
        else [],
        recipes=[(source.path.name, _yaml(source.recipe)) for source in sources if source.recipe],
    )


def report_markdown(report: Report) -> str:
    """Results, benchmarks, canaries, differing settings and warnings in Markdown."""
    groups, sources = report.groups, report.sources
    results = tables.results(groups, sources)
    parts = [_markdown_table(results)] if results.lines else []
    columns = score_columns(sources)
    scores, notes = benchmark_table(columns)
    if scores.lines:
        parts += [_markdown_table(scores), "\n".join(f"- {_markdown(note)}" for note in notes) + "\n"]
    by_category = [(title, table) for _, title, table in category_tables(columns)]
    for title, table in (*by_category, *paired_tables(columns)):
        parts += [f"{_markdown(title)}:\n", _markdown_table(table)]
    canaries = canary_table(sources)
    if canaries.lines:
        parts += ["What judges gave the canaries:\n", _markdown_table(canaries)]
    differing, _ = compare_settings(groups)
    if differing:
        heads = ("setting", *(group.label for group in groups))
        lines = [tables.Line(setting.key, setting.values) for setting in differing]
        parts.append(_markdown_table(tables.Table(heads, lines)))
    warned = []
    for record in (record for group in groups for record in group.records):
        for each in record.warnings:
            step = "" if each.step is None else f", step {each.step:.0f}"
            gone = "" if each.gone is None else f" (gone at step {each.gone:.0f})"
            warned.append(f"- {_markdown(f'{record.name}{step}: {each.text}{gone}')}")
    if warned:
        parts.append("\n".join(warned) + "\n")
    return "\n".join(parts)


def shown_samples(sources: Sequence[Source]) -> list[Sample]:
    """The prompts that runs answered, each with everybody's answer."""
    found: dict[str, Sample] = {}
    for record in (record for source in sources for record in source.records):
        names = {"before": "before training", "after": record.name}
        for sample in record.samples:
            old = found.setdefault(sample.prompt, replace(sample, answers=()))
            told = [replace(answer, run=names[answer.run]) for answer in sample.answers]
            # Runs that started alike gave the same answer before: it is shown once.
            new = tuple(answer for answer in told if answer not in old.answers)
            found[sample.prompt] = replace(old, answers=(*old.answers, *new))
    return list(found.values())


def _yaml(recipe: Any) -> str:
    from ruamel.yaml import YAML

    text = io.StringIO()
    # Through JSON, so that only plain data is left, whatever paths or tuples the recipe holds.
    YAML().dump(json.loads(json.dumps(mapping(recipe), default=str)), text)
    return text.getvalue()


def _markdown_table(table: tables.Table) -> str:
    lines = [[_markdown(head) for head in table.heads], ["---"] + ["---:"] * (len(table.heads) - 1)]
    for line in table.lines:
        note = f" ({line.note})" if line.note and line.note != line.label else ""
        cells = list(line.cells)
        if line.error and cells:
            cells[0] = line.error if cells[0] == ABSENT else f"{cells[0]} ({line.error})"
        shown = [_markdown(cell) for cell in (line.label + note, *cells)]
        lines.append([f"**{cell}**" if line.best and at < 2 else cell for at, cell in enumerate(shown)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _latex_table(table: tables.Table) -> str:
    """For a paper, with booktabs."""
    rows = [table.heads, *((line.label, *line.cells) for line in table.lines)]
    head, *lines = (
        " & ".join("".join(_LATEX.get(c, c) for c in cell) for cell in row) + r" \\" for row in rows
    )
    columns = "l" + "r" * (len(table.heads) - 1)
    body = [head, r"\midrule", *lines]
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]
    )


def _markdown(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).replace("|", "\\|").replace("<", "&lt;")


def _whole(text: str) -> Markup:
    """The text, escaped, with numbers such as 1e-3 kept on one line (browsers break at the hyphen)."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"\S*\d+e-\d+", r'<span class="whole">\g<0></span>', str(escape(text))))


def _parted(cell: str) -> tuple[str, str]:
    """A figure, and what stands in brackets behind it."""
    figure, _, rest = cell.partition(" (")
    return figure, rest.removesuffix(")")


def _last(path: Any) -> str:
    """What a model or a file is called, without its folders; nothing for a random model."""
    if not isinstance(path, str):
        return ""
    *folders, name = re.sub(r"\.(jsonl?|csv|parquet)(\.gz)?$", "", path.rstrip("/")).split("/")
    # Names that many files have say nothing by themselves.
    return "/".join([*folders[-1:], name]) if name in ("train", "pairs", "data", "model") else name


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"
