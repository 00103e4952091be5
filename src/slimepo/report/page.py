"""The report: one self-contained HTML page and its tables in Markdown, from folders of runs."""

from __future__ import annotations

import bisect
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.errors import InputError, unwritable
from slimepo.files import refuse_folder, write_text
from slimepo.redaction import redact
from slimepo.report import curves, facts, panels, tables
from slimepo.report.benchmarks import benchmark_table, benchmark_verdict, canary_table, category_sections
from slimepo.report.figures import styles, swatch
from slimepo.report.findings import findings, verdict
from slimepo.report.folders import Report, read_report
from slimepo.report.groups import Group, compare_settings, count
from slimepo.report.map import map_panel, map_picture
from slimepo.report.markdown import latex_table, markdown_table, report_markdown
from slimepo.report.records import Fallen, Sample, Source, by_kind, mapping

if TYPE_CHECKING:
    from markupsafe import Markup
    from rich.console import Console

_MOST_CHARACTERS = 300
_MOST_SAMPLES = 24
# Answers a group that fell most.
_MOST_FALLEN = 3
_MOST_TIMELINES = 6
# What chat templates put around turns, and what they call who speaks.
_MARKS = re.compile(r"<\|[^|<>]+\|>|</?(?:start_of_turn|end_of_turn|bos|eos|s)>|\[/?INST\]")
_ROLES = ("system", "user", "assistant", "model", "tool")
_MOST_COMMANDS = 12
# In nats: from each on, a token that became so much likelier or less likely has a deeper shade.
_SHADES = (0.1, 0.3, 1.0, 3.0)


def write_report(paths: Sequence[Path], page: Path) -> tuple[Report, list[Path]]:
    """Read folders and write the page, beside it its tables in Markdown and its map as a picture, where there is one.

    Returns:
        What was read, and the files that were written.

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
            return report, [*texts, page.with_suffix(".png")]
    except OSError as error:
        raise unwritable(f"report: {page}", error, "--out says where the page goes") from error
    return report, [*texts]


def report_command(paths: Sequence[Path], out: Path | None, console: Console) -> None:
    """What `slimepo report` does; the page goes into the folder that it is about, or here for several.

    Raises:
        InputError: as `write_report`; or `out` cannot be a page.
    """
    page = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    if page.is_dir():
        raise InputError(f"--out {page} is a folder; give a file, such as {page / 'report.html'}")
    refuse_folder(page)
    if page.suffix in (".md", ".png"):
        raise InputError(
            f"--out {page}: the page is HTML; give {page.with_suffix('.html')}, Markdown comes beside it"
        )
    report, written = write_report(paths, page)
    unfinished = sum(record.state != "finished" for group in report.groups for record in group.records)
    note = f", {unfinished} not to the end" if unfinished else ""
    console.print(f"{report.counted}{note}: {page}")
    beside = {".md": "tables in Markdown", ".png": "map"}
    console.print(", ".join(f"{beside[path.suffix]}: {path}" for path in written[1:]))


def report_page(report: Report) -> str:
    """One self-contained HTML page. What a run folder does not have is left out, not made up."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("slimepo", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(svg=Markup, count=count, short=_short, whole=_whole, shade=_shade, nats=_nats)
    environment.filters.update(by_kind=by_kind, spoken=spoken)
    groups, sources = report.groups, report.sources
    records = [record for group in groups for record in group.records]
    differing, same = compare_settings(groups)
    return environment.get_template("template.html.j2").render(
        report=report,
        groups=groups,
        keys={label: swatch(style) for label, style in styles(groups).items()},
        start_key=swatch(),
        records=records,
        start=tables.start_group(sources),
        map=map_panel(groups),
        verdict=" ".join(filter(None, (verdict(groups), benchmark_verdict(report.scores, sources)))),
        findings=findings(groups, sources),
        figures=_figures(groups),
        differences=tables.differences(groups),
        benchmarks=benchmark_table(report.scores),
        categories=category_sections(report.scores, groups, sources),
        canaries=canary_table(sources),
        fallen=shown_fallen(groups),
        over_time=[
            record for group in groups if (record := next((r for r in group.records if r.over_time), None))
        ][:_MOST_TIMELINES],
        samples=shown_samples(groups),
        differing=differing,
        same=same,
        blocks=tables.in_blocks(groups),
        searches=facts.searched(report.searches),
        certificates=facts.certificates(groups),
        speed=facts.speed(groups, sources),
        data=facts.data_facts(groups, sources),
        pairs=facts.pair_facts(sources),
        versions=_versions(sources),
        commands=[
            f"slimepo run {_from_here(source.path)}/recipe.yaml --out again/{source.path.resolve().name}"
            for source in sources
            if source.records
        ][:_MOST_COMMANDS],
        watched="Held-out"
        if any("heldout/pairs" in line for r in records for line in r.monitor)
        else "Training",
        cited=[("Markdown", markdown_table(report.results)), ("LaTeX", latex_table(report.results))],
        recipes=[(source.path.name, _yaml(source.recipe)) for source in sources if source.recipe],
    )


def _figures(groups: Sequence[Group]) -> dict[str, Any]:
    """The page's pictures, by the section in which they stand."""
    start = tables.common_start(groups)
    drawn = {
        "rate": panels.rate_panels(groups, start),
        "watched": curves.curve_panels(groups, curves.watched, curves.WATCHED),
        "answered": curves.curve_panels(groups, curves.answered, curves.ANSWERED),
        "curves": curves.curve_panels(groups, curves.logged, curves.MAIN, start),
        "sampled": curves.curve_panels(groups, curves.logged, curves.SAMPLED),
        "others": [
            *curves.curve_panels(groups, curves.logged, curves.other_metrics(groups)),
            *panels.gradient_tails(groups),
        ],
        "shapes": panels.distribution_panels(groups),
        "families": panels.family_panels(groups),
    }
    return drawn | {"start": bool(start), "pairs_start": any(key in start for key, _ in curves.MAIN)}


def _versions(sources: Sequence[Source]) -> list[tuple[str, str]]:
    found: dict[str, dict[str, None]] = {}
    for source in sources:
        for name, version in source.versions.items():
            found.setdefault(name, {})[version] = None
    return [(name, ", ".join(versions)) for name, versions in sorted(found.items())]


def shown_fallen(groups: Sequence[Group]) -> list[tuple[str, list[Fallen]]]:
    """The chosen answers that fell most, by group, worst first: over the groups, and over a group's seeds."""
    found = []
    for group in groups:
        of_group = sorted(
            (each for record in group.records for each in record.fallen),
            key=lambda each: each.mean[1] - each.mean[0],
        )
        # Seeds of one data set may have lost the same answer.
        worst: dict[str, Fallen] = {}
        for each in of_group:
            worst.setdefault(each.prompt, each)
        if worst:
            found.append((group.label, [*worst.values()][:_MOST_FALLEN]))
    return sorted(found, key=lambda each: each[1][0].mean[1] - each[1][0].mean[0])


def shown_samples(groups: Sequence[Group]) -> list[Sample]:
    """The prompts that runs answered, those first of which they answered differently; a seed stands for its group."""
    found: dict[str, Sample] = {}
    for group in groups:
        record = next((record for record in group.records if record.samples), group.first)
        names = {"before": "before training", "after": record.name}
        for sample in record.samples:
            old = found.setdefault(sample.prompt, replace(sample, answers=()))
            told = [replace(answer, run=names[answer.run]) for answer in sample.answers]
            # Runs that started alike gave the same answer before: it is shown once.
            new = tuple(answer for answer in told if answer not in old.answers)
            found[sample.prompt] = replace(old, answers=(*old.answers, *new))
    several = sorted(found.values(), key=lambda sample: -len({answer.text for answer in sample.answers}))
    return several[:_MOST_SAMPLES]


def spoken(prompt: str) -> str:
    """The last turn of a prompt that was written with a chat template's tokens; any other as it is.

    >>> spoken("<|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nHi!<|im_end|>\\n<|im_start|>assistant\\n")
    'Hi!'
    """
    parts = [part for part in map(str.strip, _MARKS.split(prompt)) if part]
    # The turn that is to come has its role alone.
    said = [part for part in parts if part not in _ROLES]
    if not _MARKS.search(prompt) or not said:
        return prompt
    last = said[-1]
    role, _, text = last.partition("\n")
    return text.strip() if role in _ROLES and text.strip() else last


def _from_here(path: Path) -> str:
    """A run folder as it is called from where the report is made; by its name alone if it is somewhere else."""
    whole, here = path.resolve(), Path.cwd()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) and whole != here else whole.name


def _yaml(recipe: Any) -> str:
    from ruamel.yaml import YAML

    text = io.StringIO()
    # Through JSON, so that only plain data is left, whatever paths or tuples the recipe holds.
    YAML().dump(json.loads(json.dumps(mapping(recipe), default=str)), text)
    return text.getvalue()


def _whole(text: str) -> Markup:
    """The text, escaped, with numbers such as 1e-3 kept on one line (browsers break at the hyphen)."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"\S*\d+e-\d+", r'<span class="whole">\g<0></span>', str(escape(text))))


def _short(value: Any, most: int = _MOST_CHARACTERS) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= most else text[:most] + " …"


def _shade(change: float) -> str:
    """The style of a token whose log-prob changed by so many nats: `d` less likely, `u` likelier; 1 to 4 how far."""
    far = bisect.bisect_right(_SHADES, abs(change))
    return f"{'d' if change < 0 else 'u'}{far}" if far else ""


def _nats(value: float, sign: str = "") -> str:
    return format(value, f"{sign or '-'}z.2f")
