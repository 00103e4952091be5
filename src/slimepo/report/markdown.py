"""The report's tables as text: in Markdown beside the page, in LaTeX for a paper."""

from __future__ import annotations

import re

from slimepo.report.benchmarks import benchmark_table, canary_table, category_tables, paired_tables
from slimepo.report.findings import verdict
from slimepo.report.folders import Report
from slimepo.report.groups import compare_settings
from slimepo.report.records import by_kind
from slimepo.report.tables import Line, Table
from slimepo.words import ABSENT

# What LaTeX reads as its own.
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "→": r"$\to$",
    ABSENT: "--", "\u00a0": "~", **{letter: f"\\{letter}" for letter in "%&_#$" + "{" + "}"},
}  # fmt: skip


def report_markdown(report: Report) -> str:
    """Title, verdict, results, benchmarks, canaries, differing settings and warnings in Markdown."""
    groups, columns = report.groups, report.scores
    parts = [f"# {_markdown(report.title)}\n"]
    parts += [f"{_markdown(said)}\n"] if (said := verdict(groups)) else []
    parts += [markdown_table(report.results)] if report.results.lines else []
    scores, notes = benchmark_table(columns)
    if scores.lines:
        parts += [markdown_table(scores), "\n".join(f"- {_markdown(note)}" for note in notes) + "\n"]
    by_category = [(title, table) for _, title, table in category_tables(columns)]
    for title, table in (*by_category, *paired_tables(columns, report.sources)):
        parts += [f"{_markdown(title)}:\n", markdown_table(table)]
    canaries = canary_table(report.sources)
    if canaries.lines:
        parts += ["What judges gave the canaries:\n", markdown_table(canaries)]
    differing, _ = compare_settings(groups)
    if differing:
        heads = ("setting", *(group.label for group in groups))
        lines = [Line(setting.key, setting.values) for setting in differing]
        parts.append(markdown_table(Table(heads, lines)))
    warned = []
    for record in (record for group in groups for record in group.records):
        for first, each in by_kind(record.warnings):
            step = "" if first.step is None else f", step {first.step:.0f}"
            gone = "" if each.gone is None else f" (gone at step {each.gone:.0f})"
            warned.append(f"- {_markdown(f'{record.name}{step}: {each.text}{gone}')}")
    if warned:
        parts.append("\n".join(warned) + "\n")
    return "\n".join(parts)


def markdown_table(table: Table) -> str:
    """A table in Markdown, its best line in bold."""
    lines = [[_markdown(head) for head in table.heads], ["---"] + ["---:"] * (len(table.heads) - 1)]
    for line in table.lines:
        note = f" ({line.note})" if line.note and line.note != line.label else ""
        cells = [*map(str, line.cells)]
        if line.error and cells:
            cells[0] = line.error if cells[0] == ABSENT else f"{cells[0]} ({line.error})"
        shown = [_markdown(cell) for cell in (line.label + note, *cells)]
        lines.append([f"**{cell}**" if line.best and at < 2 else cell for at, cell in enumerate(shown)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def latex_table(table: Table) -> str:
    """For a paper, with booktabs."""
    rows = [table.heads, *((line.label, *map(str, line.cells)) for line in table.lines)]
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
