"""What `slimepo data check` says about a file: counts, lengths, drops, duplicates, and rows with their tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slimepo.data.read import Rows, row_notes
from slimepo.data.render import ChatFormat
from slimepo.data.rows import CHOSEN, REJECTED, Ids, Row, as_preference
from slimepo.data.split import PAPER_SPLIT, check_fractions, fingerprint, message_hash, part_of, row_hash
from slimepo.data.tokenize import DROP_REASONS, MALFORMED_ROW, NO_VERDICT, TIE, Drop, by_reason, tokenize
from slimepo.types import Preference, Unpaired
from slimepo.words import plural

_PERCENTILES = (0, 5, 50, 95, 99, 100)
_BINS = 12
_BAR = 40


@dataclass(frozen=True)
class DropCount:
    """How many rows one reason cost, and the first of them."""

    count: int
    place: str
    detail: str


@dataclass(frozen=True)
class Lengths:
    """The lengths of one part of the rows in tokens; `histogram` counts the rows between `edges`."""

    total: int
    mean: float
    percentiles: dict[int, int]
    edges: list[int]
    histogram: list[int]


@dataclass(frozen=True)
class DataReport:
    """What `check` found. `rows` counts everything read, `kept` what can be trained on."""

    name: str
    format: str
    rows: int
    kept: int
    drops: dict[str, DropCount]
    duplicate_rows: int
    duplicate_prompts: int
    parts: dict[str, int]
    fingerprint: str
    lengths: dict[str, Lengths] = field(default_factory=dict)
    trained_tokens: int = 0
    notes: tuple[str, ...] = ()


def check(
    rows: Rows,
    chat: ChatFormat,
    *,
    name: str = "",
    max_length: int = 2048,
    max_prompt_length: int | None = None,
    fractions: Mapping[str, float] = PAPER_SPLIT,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[DataReport, Sequence[Row]]:
    """The report on rows that were read, and the tokenised rows.

    Duplicates count the rows beyond the first of their kind. `parts` counts the kept rows in each part of the split.
    """
    records: list[Preference | Unpaired] = [*rows.preferences, *rows.unpaired]
    drops = [Drop(MALFORMED_ROW, place, reason) for place, reason in rows.malformed]
    drops += [Drop(TIE, place, "neither answer is preferred") for place in rows.ties]
    drops += [
        Drop(NO_VERDICT, place, "nothing says which answer is better") for place in rows.without_verdict
    ]
    tokens = tokenize(
        [*rows.preferences, *map(as_preference, rows.unpaired)],
        chat,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        progress=progress,
        pairs=bool(rows.unpaired) or any(row.rejected for row in rows.preferences),
        one_sided=bool(rows.unpaired),
    )
    check_fractions(fractions)
    kept = {row.id for row in tokens.rows}
    parts = dict.fromkeys(fractions, 0)
    for record in records:
        part = part_of(record.prompt, fractions, seed) if record.source in kept else None
        if part is not None:
            parts[part] += 1
    report = DataReport(
        name=name,
        format=rows.format,
        rows=len(records) + len(drops),
        kept=len(tokens.rows),
        drops=count_drops([*drops, *tokens.drops]),
        duplicate_rows=len(records) - len({row_hash(row) for row in records}),
        duplicate_prompts=len(records) - len({message_hash(row.prompt) for row in records}),
        parts=parts,
        fingerprint=fingerprint(records),
        lengths=_all_lengths(tokens.rows, unpaired=bool(rows.unpaired)),
        trained_tokens=sum(len(ids) for row in tokens.rows for ids in row.responses),
        notes=(
            *chat.notes,
            *row_notes(rows),
            *(
                f"{plural(len(found), 'row')}: {remark} (the first, {found[0].source}: {found[0].detail})"
                for remark, found in by_reason(tokens.remarks).items()
            ),
        ),
    )
    return report, tokens.rows


def count_drops(drops: Iterable[Drop]) -> dict[str, DropCount]:
    """The drops by reason, in the order of DROP_REASONS, each with its first example."""
    found = by_reason(drops)
    return {
        reason: DropCount(len(found[reason]), found[reason][0].source, found[reason][0].detail)
        for reason in DROP_REASONS
        if reason in found
    }


def _all_lengths(rows: Sequence[Row], unpaired: bool) -> dict[str, Lengths]:
    if not rows:
        return {}
    sides: dict[str, list[Ids]] = {"prompt": [row.prompt_ids for row in rows]}
    if unpaired:
        sides["response"] = [ids for row in rows for ids in row.responses if len(ids)]
    else:
        sides["chosen"] = [row.response(CHOSEN) for row in rows]
        if any(len(row.response(REJECTED)) for row in rows):
            sides["rejected"] = [row.response(REJECTED) for row in rows]
    return {side: _lengths([len(ids) for ids in values]) for side, values in sides.items()}


def _lengths(lengths: list[int]) -> Lengths:
    values = np.asarray(lengths)
    at = np.percentile(values, _PERCENTILES, method="nearest")
    # Round edges; the last bin takes what lies beyond the 99th percentile, so that one giant does not flatten all.
    step = max(1, int(np.ceil(np.percentile(values, 99) / (_BINS - 1))))
    edges = [step * index for index in range(_BINS + 1)]
    bins = np.minimum(values // step, _BINS - 1)
    return Lengths(
        total=int(values.sum()),
        mean=float(values.mean()),
        percentiles={p: int(v) for p, v in zip(_PERCENTILES, at, strict=True)},
        edges=edges,
        histogram=[int(n) for n in np.bincount(bins, minlength=_BINS)],
    )


# --- printing ----------------------------------------------------------------------------------------


def print_report(report: DataReport, console: Console) -> None:
    """Print the report as tables and small histograms."""
    console.print(_summary_table(report))
    if report.drops:
        console.print(drop_table(report.drops))
    if report.lengths:
        console.print(_length_table(report.lengths))
        for side, lengths in report.lengths.items():
            _print_histogram(side, lengths, console)
    for note in report.notes:
        console.print(Text(f"note: {note}"))


def _summary_table(report: DataReport) -> Table:
    table = Table(title=Text(report.name) if report.name else None, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    shown = {
        "format": report.format,
        "rows read": f"{report.rows:,}",
        "rows kept": f"{report.kept:,}",
        "rows left out": f"{report.rows - report.kept:,}",
        "duplicate rows": f"{report.duplicate_rows:,}",
        "duplicate prompts": f"{report.duplicate_prompts:,}",
        "trained tokens": f"{report.trained_tokens:,}" if report.lengths else "",
        **{f"with SFT first, split: {name}": f"{count:,}" for name, count in report.parts.items()},
        "fingerprint": report.fingerprint,
    }
    for what, value in shown.items():
        if value:
            table.add_row(what, Text(value))
    return table


def drop_table(drops: Mapping[str, DropCount]) -> Table:
    """The rows left out, by reason, as a rich table."""
    table = Table(title="rows left out", title_justify="left")
    table.add_column("reason", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("the first of them", overflow="fold")
    for reason, drop in drops.items():
        table.add_row(
            reason, f"{drop.count:,}", Text(f"{drop.place}: {drop.detail}" if drop.detail else drop.place)
        )
    return table


def _length_table(lengths: Mapping[str, Lengths]) -> Table:
    table = Table(title="length in tokens", title_justify="left")
    table.add_column("part")
    names = {0: "min", 50: "median", 100: "max"}
    for heading in ["mean", *(names.get(p, f"{p} %") for p in _PERCENTILES), "all together"]:
        table.add_column(heading, justify="right")
    for side, each in lengths.items():
        cells = [f"{each.percentiles[p]:,}" for p in _PERCENTILES]
        table.add_row(side, f"{each.mean:,.1f}", *cells, f"{each.total:,}")
    return table


def _print_histogram(side: str, lengths: Lengths, console: Console) -> None:
    console.print(Text(f"{side}: rows by length"), style="bold")
    most = max(lengths.histogram)
    last = len(lengths.histogram) - 1
    for index, count in enumerate(lengths.histogram):
        start, end = lengths.edges[index], lengths.edges[index + 1] - 1
        label = f"{start}+" if index == last else f"{start}-{end}" if end > start else str(start)
        bar = "#" * max(round(_BAR * count / most), 1 if count else 0)
        console.print(Text(f"{label:>12} {count:>7,} {bar}"))


def show_rows(rows: Sequence[Row], chat: ChatFormat, n: int, console: Console) -> None:
    """Print the first `n` rows as the model reads them, special tokens included, the trained tokens marked.

    Trained tokens are green; where the console has no colour they stand between ⟦ and ⟧.
    """
    coloured = console.color_system is not None and not console.no_color
    special = set(chat.tokenizer.all_special_ids) | set(chat.tokenizer.added_tokens_decoder)
    for row in rows[:n]:
        console.print(Text(f"--- {row.id}", style="bold"))
        for side, ids in zip(("chosen", "rejected"), row.responses, strict=False):
            if not len(ids):
                continue
            console.print(
                Text(f"{side}: {len(row.prompt_ids)} prompt tokens, {len(ids)} trained", style="bold")
            )
            shown = Text()
            _append(shown, chat, row.prompt_ids, special, "dim" if coloured else "")
            shown.append("" if coloured else "⟦")
            _append(shown, chat, ids, special, "green" if coloured else "")
            shown.append("" if coloured else "⟧")
            console.print(shown)


def _append(shown: Text, chat: ChatFormat, ids: Ids, special: set[int], style: str) -> None:
    """Add the text of some tokens; each special token by itself and, where there is colour, reversed."""
    for is_special, run in itertools.groupby(ids.tolist(), special.__contains__):
        for part in [[token] for token in run] if is_special else [list(run)]:
            text = chat.tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            shown.append(str(text), style=f"{style} reverse" if is_special and style else style)
