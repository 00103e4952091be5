"""`slimepo data ...`: look at data before training on it, and make some."""

from __future__ import annotations

from typing import Annotated

import typer

from slimepo.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")


@app.command("check")
def check_data(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A file, a folder or a Hub id.")],
    model: Annotated[str, typer.Option(help="The model (or tokenizer folder) whose tokens are counted.")],
    chat_template: Annotated[
        str | None, typer.Option(help="Another model's template, or a .jinja file.")
    ] = None,
    template_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the template, such as enable_thinking=false."),
    ] = None,
    format: Annotated[str, typer.Option(help="The format's name, where it is not recognised.")] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OURS=THEIRS", help="A column with another name: prompt=question; label= leaves it out."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Which split of a folder, a Hub or a saved data set.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and response together.")] = 2048,
    max_prompt_length: Annotated[int | None, typer.Option(min=1)] = None,
    show: Annotated[
        int, typer.Option(min=0, help="Print this many rows with the trained tokens marked.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Go on past malformed rows.")
    ] = False,
) -> None:
    """Counts, lengths, drops by reason and duplicates of a file of pairs, as training would see it."""
    from rich.progress import Progress

    from slimepo.data.chat import chat_format, load_tokenizer
    from slimepo.data.inspect import check, print_report, show_rows
    from slimepo.data.read import read_rows
    from slimepo.settings import parse_value
    from slimepo.terminal import make_console

    options = {key: parse_value(value) for key, value in _pairs(template_option, "--template-option")}
    columns = {ours: theirs or None for ours, theirs in _pairs(column, "--column")}
    console = make_console()
    rows = read_rows(source, format=format, split=split, skip_bad_rows=skip_bad_rows, columns=columns)
    chat = chat_format(load_tokenizer(model, chat_template), options)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("tokenising", total=None)
        report, kept = check(
            rows, chat, name=source, max_length=max_length, max_prompt_length=max_prompt_length, seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    print_report(report, console)
    show_rows(kept, chat, show, console)


def _pairs(given: list[str] | None, option: str) -> list[tuple[str, str]]:
    for pair in given or []:
        if "=" not in pair:
            raise InputError(f"{option} {pair!r} is not KEY=VALUE")
    return [(key, value) for key, _, value in (pair.partition("=") for pair in given or [])]
