"""`slimepo data ...`: look at data before training on it, and make some."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from slimepo.errors import InputError
from slimepo.types import Message

app = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")


@app.command("check")
def check_data(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A file, a folder or a Hub id.")],
    model: Annotated[
        str | None, typer.Option(help="The model (or tokenizer folder) to count tokens with.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Use another model's template, or a .jinja file.")
    ] = None,
    template_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the template, such as enable_thinking=false."),
    ] = None,
    format: Annotated[str, typer.Option(help="The name of the format, if it is not recognised.")] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OURS=THEIRS", help="A column that has another name: prompt=question; label= ignores one."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="The split to read, of a folder, a Hub data set or a saved one.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=2, help="Maximum tokens of prompt and response together.")
    ] = 2048,
    max_prompt_length: Annotated[int | None, typer.Option(min=1)] = None,
    show: Annotated[
        int, typer.Option(min=0, help="Number of rows to print with the trained tokens marked.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Skip malformed rows.")] = False,
    displacement: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that training starts from: forecast which pairs will lower their chosen answer.",
        ),
    ] = None,
    gradient_pairs: Annotated[
        int,
        typer.Option(min=0, help="Number of pairs whose gradients are compared (two backward passes each)."),
    ] = 100,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the rows with the lowest CHES to this file, as JSONL."),
    ] = None,
    keep_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The share of pairs to keep with --keep.")
    ] = 0.9,
) -> None:
    """Check a file of pairs as training would read it: counts, lengths, drops by reason, duplicates."""
    from rich.progress import Progress

    from slimepo.data.chat import chat_format, load_tokenizer
    from slimepo.data.inspect import check, print_report, show_rows
    from slimepo.data.read import placed_rows, read_rows
    from slimepo.files import refuse_folder, write_json_lines
    from slimepo.settings import parse_value
    from slimepo.terminal import make_console

    if keep is not None and displacement is None:
        raise InputError("--keep goes with --displacement, which says what to keep")
    if (tokens := model or displacement) is None:
        raise InputError("data check: give --model, whose tokens are counted, or --displacement")
    if keep is not None and keep.resolve() == Path(source).resolve():
        raise InputError(f"--keep {keep} is the file that is read: give another")
    refuse_folder(keep, "--keep")
    options = {key: parse_value(value) for key, value in _pairs(template_option, "--template-option")}
    columns = {ours: theirs or None for ours, theirs in _pairs(column, "--column")}
    console = make_console()
    rows = read_rows(source, format=format, split=split, skip_bad_rows=skip_bad_rows, columns=columns)
    chat = chat_format(load_tokenizer(tokens, chat_template), options)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("tokenising", total=None)
        report, kept = check(
            rows, chat, name=source, max_length=max_length, max_prompt_length=max_prompt_length, seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    print_report(report, console)
    show_rows(kept, chat, show, console)
    if displacement is None:
        return
    import torch

    from slimepo.model.load import load_model
    from slimepo.plan.displacement import forecast, lowest, print_forecast

    loaded = load_model(displacement)
    if torch.accelerator.is_available():
        loaded.to(torch.accelerator.current_accelerator())
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("gradients", total=gradient_pairs)
        found = forecast(
            loaded,
            kept,
            gradient_pairs,
            report=lambda done, total: progress.update(task, completed=done, total=total),
        )
    prompts = {row.source: _text(row.prompt) for row in rows.preferences}
    print_forecast(found, console, lambda row: f"{row}: {prompts.get(row, '')[-100:]!r}")
    if keep is not None:
        ids = lowest(found, keep_share)
        write_json_lines(
            keep,
            (row for place, row in placed_rows(source, split) if place in ids and isinstance(row, Mapping)),
        )
        console.print(f"{len(ids)} of {len(found.ids)} pairs written to {keep}", highlight=False)


@app.command()
def instructions(
    to: Annotated[Path, typer.Argument(help="The folder for train.jsonl and heldout.jsonl.")],
    train: Annotated[int, typer.Option(min=1, help="Number of prompts to train on.")] = 1000,
    heldout: Annotated[
        int, typer.Option(min=1, help="Number of held-out prompts, on topics of their own.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same files.")] = 0,
) -> None:
    """Write requests with constraints that code can verify, as tasks for a small real model."""
    from slimepo.playground.instructions import write_instructions
    from slimepo.terminal import make_console

    files = write_instructions(to, train=train, heldout=heldout, seed=seed)
    make_console().print(f"{train} and {heldout} instructions: {', '.join(map(str, files))}")


@app.command()
def overlap(
    prompts: Annotated[Path, typer.Argument(metavar="FILE", help="Prompts: one a line, or JSONL rows.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Another such file, or a benchmark: ifeval.")],
    data_dir: Annotated[
        str | None, typer.Option(help="A folder with the benchmarks' files, to work without a network.")
    ] = None,
) -> None:
    """Show the overlap of prompts with a benchmark's, or with another file's: whole prompts and runs of words."""
    from slimepo.data.overlap import overlap as compare
    from slimepo.evaluation.run import load_benchmark
    from slimepo.evaluation.settings import BENCHMARKS, Evaluation
    from slimepo.pipeline.generate import read_prompts
    from slimepo.settings import validate
    from slimepo.terminal import make_console

    ours = [_text(prompt) for prompt in read_prompts([], prompts)]
    if other in BENCHMARKS:
        settings = validate(Evaluation, {"benchmark": other, "data_dir": data_dir}, "overlap")
        benchmark = load_benchmark(settings, Path())
        theirs = [turn for question in benchmark.questions for turn in question.turns]
    else:
        theirs = [_text(prompt) for prompt in read_prompts([], Path(other))]
    found, console = compare(ours, theirs), make_console()
    console.print(f"{found.prompts} prompts beside {len(theirs)} of {other}: {found.same} are the same")
    for size, (count, runs) in found.shared.items():
        console.print(f"{size} words in a row that stand there too: {count} prompts, {runs} different runs")
    console.print(f"the longest: {found.longest!r}")


def _text(prompt: list[Message]) -> str:
    return "\n".join(str(message["content"]) for message in prompt)


def _pairs(given: list[str] | None, option: str) -> list[tuple[str, str]]:
    for pair in given or []:
        if "=" not in pair:
            raise InputError(f"{option} {pair!r} is not KEY=VALUE")
    return [(key, value) for key, _, value in (pair.partition("=") for pair in given or [])]
