"""What is odd about a data set as a whole, in sentences for the user: before any row is tokenised."""

from __future__ import annotations

from collections.abc import Iterator

from slimepo.data.read import Rows
from slimepo.data.split import message_hash


def row_notes(rows: Rows) -> Iterator[str]:
    """Columns that were not read, answers judged all alike, and pairs that contradict themselves or each other."""
    if rows.unread:
        columns = ", ".join(f"{name} ({count:,})" for name, count in sorted(rows.unread.items()))
        yield f"columns that were not read (rows that have them): {columns}"
    labels = {row.label for row in rows.unpaired}
    if len(labels) == 1:
        what = "desirable" if labels == {True} else "undesirable"
        yield f"all {len(rows.unpaired):,} judged answers are {what}: nothing is there to tell them from"
    if rows.scored_against:
        yield (
            f"{len(rows.scored_against):,} rows score their rejected answer higher than the chosen one; the first, "
            f"{rows.scored_against[0]}"
        )
    seen: set[tuple[str, str, str]] = set()
    turned: list[str] = []
    for row in rows.preferences:
        if row.rejected:
            prompt, chosen, rejected = (
                message_hash(row.prompt),
                message_hash(row.chosen),
                message_hash(row.rejected),
            )
            if chosen != rejected and (prompt, rejected, chosen) in seen:
                turned.append(row.source)
            seen.add((prompt, chosen, rejected))
    if turned:
        yield (
            f"{len(turned):,} pairs stand there the other way round too (A preferred to B, and B to A); the first, "
            f"{turned[0]}"
        )
