"""`slimepo data ...`: look at data before training on it, and make some."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from slimepo.errors import InputError
from slimepo.types import Message

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.data.read import Rows
    from slimepo.data.rows import Row
    from slimepo.plan.displacement import Forecast

app = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")
# As data is read by each of these commands.
_Format = Annotated[str, typer.Option(help="The name of the format, if it is not recognised.")]
_Columns = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OURS=THEIRS", help="A column that has another name: prompt=question; label= ignores one."
    ),
]


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
    format: _Format = "auto",
    column: _Columns = None,
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
        int | None,
        typer.Option(
            min=0,
            help="Number of pairs whose gradients are compared (two backward passes each); 100 if not given.",
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the rows with the lowest CHES to this file, as JSONL."),
    ] = None,
    keep_share: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="The share of pairs to keep with --keep; 0.9 if not given."),
    ] = None,
) -> None:
    """Check a file of pairs as training would read it: counts, lengths, drops by reason, duplicates."""
    from rich.progress import Progress

    from slimepo.data.chat import chat_format, load_tokenizer
    from slimepo.data.columns import columns_from
    from slimepo.data.inspect import check, print_report, show_rows
    from slimepo.data.read import read_rows
    from slimepo.files import refuse_folder
    from slimepo.settings import parse_value
    from slimepo.terminal import make_console

    if keep is not None and displacement is None:
        raise InputError("--keep goes with --displacement, which says what to keep")
    if keep_share is not None and keep is None:
        raise InputError("--keep-share is the share of pairs that --keep FILE writes: give that too")
    if gradient_pairs is not None and displacement is None:
        raise InputError("--gradient-pairs goes with --displacement, whose gradients are compared")
    if model is not None and displacement not in (None, model):
        raise InputError("--displacement MODEL counts that model's own tokens: leave --model out")
    if (tokens := model or displacement) is None:
        raise InputError("data check: give --model, whose tokens are counted, or --displacement")
    if keep is not None and keep.resolve() == Path(source).resolve():
        raise InputError(f"--keep {keep} is the file that is read: give another")
    refuse_folder(keep, "--keep")
    options = {key: parse_value(value) for key, value in _pairs(template_option, "--template-option")}
    columns = columns_from(column or ())
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
    if not kept:
        reasons = ", ".join(f"{reason}: {drop.count:,}" for reason, drop in report.drops.items())
        raise InputError(f"{source}: no row is left to train on ({reasons})")
    show_rows(kept, chat, show, console)
    if displacement is not None:
        from slimepo.plan.displacement import lowest

        found = _forecast(
            displacement, rows, kept, 100 if gradient_pairs is None else gradient_pairs, console
        )
        if keep is not None:
            ids = lowest(found, 0.9 if keep_share is None else keep_share)
            _write_rows(keep, source, split, ids)
            console.print(f"{len(ids)} of {len(found.ids)} pairs written to {keep}", highlight=False)


def _forecast(model: str, rows: Rows, kept: Sequence[Row], gradient_pairs: int, console: Console) -> Forecast:
    """Say which pairs are expected to lower their chosen answer, by the model that training starts from."""
    import torch
    from rich.progress import Progress

    from slimepo.model.load import load_model
    from slimepo.plan.displacement import forecast, print_forecast

    loaded = load_model(model)
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
    return found


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


@app.command("select")
def select_pairs(
    source: Annotated[str, typer.Argument(metavar="FILE", help="Pairs: a file, a folder or a Hub id.")],
    model: Annotated[str, typer.Option(help="The model that the next round starts from.")],
    reference: Annotated[
        str, typer.Option(help="The model that it is compared with: the first round's start.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Write the selected rows there, as JSONL.")],
    keep: Annotated[float, typer.Option(help="The share of the pairs to keep, above 0.")] = 0.5,
    bins: Annotated[int, typer.Option(help="Pools of like difficulty; each gives the same share.")] = 4,
    beta: Annotated[float, typer.Option(help="Of z = beta (log-ratio chosen - log-ratio rejected).")] = 0.1,
    format: _Format = "auto",
    column: _Columns = None,
    split: Annotated[
        str | None, typer.Option(help="Which split of a folder, a Hub or a saved data set.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and response together.")] = 2048,
) -> None:
    """Select pairs for the next round: those with the most signal to curvature in each pool of like difficulty."""
    from slimepo.data.columns import columns_from
    from slimepo.data.read import left_out_in_words, read_rows, row_notes
    from slimepo.files import refuse_folder
    from slimepo.losses.common import check_number
    from slimepo.model.chat import answer_logps, model_chat
    from slimepo.terminal import counted, make_console

    check_number("--keep", keep, above=0, at_most=1)
    check_number("--bins", bins, at_least=1)
    check_number("--beta", beta, above=0)
    if model == reference:
        raise InputError(
            f"--model and --reference are both {model}: every pair would score alike. Give the first round's start as "
            "the reference"
        )
    if out.resolve() == Path(source).resolve():
        raise InputError(f"--out {out} is the file that is read: give another")
    refuse_folder(out)
    for name in (model, reference):
        model_chat(name)
    rows = read_rows(source, format=format, split=split, columns=columns_from(column or ()))
    pairs = [row for row in rows.preferences if row.rejected]
    if not pairs:
        raise InputError(f"{source}: no row has a chosen and a rejected answer")
    import numpy as np

    from slimepo.plan.select import select, signal_to_curvature

    console, margins = make_console(), []
    for note in (*left_out_in_words(rows.left_out), *row_notes(rows)):
        console.print(f"note: {note}", highlight=False)
    if alone := len(rows.preferences) + len(rows.unpaired) - len(pairs):
        console.print(f"{alone:,} rows left out: they have no two answers to compare", highlight=False)
    for name in (model, reference):
        with counted(console, f"scoring with {name}") as report:
            logps, dropped = answer_logps(name, pairs, max_length, report)
        for sentence in dropped:
            console.print(sentence, highlight=False, markup=False)
        margins.append(logps[:, 0] - logps[:, 1])
    logits = beta * (margins[0] - margins[1])
    scored = np.flatnonzero(~np.isnan(logits)).tolist()
    if not scored:
        raise InputError(f"{source}: no pair could be scored: give a larger --max-length")
    z = logits[scored]
    kept = select([pairs[i] for i in scored], signal_to_curvature(z), keep, bins)
    _write_rows(out, source, split, {row.source for row in kept})
    console.print(
        f"{len(kept)} of {len(z)} pairs written to {out}; compared with {reference}, {model} leans to the rejected "
        f"answer in {(z < 0).mean():.1%} of all",
        highlight=False,
    )


def relabel(
    answers: Annotated[
        Path, typer.Argument(metavar="FILE", help="Answers: slimepo generate --samples 128 --out FILE.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The file of pairs, as JSONL.")],
    reward: Annotated[
        str,
        typer.Option(
            help="mocan: a column of numbers, one an answer, or a reward, as of a stage. pecan: a model's folder."
        ),
    ],
    constraint: Annotated[
        list[str], typer.Option(help="The same, of what is to be kept up (may be given again).")
    ],
    bound: Annotated[
        list[float],
        typer.Option(
            help="The least mean of that constraint, in their order; pecan: of what it is above the reference's."
        ),
    ],
    method: Annotated[
        Literal["mocan", "pecan"], typer.Option(help="Where rewards come from: functions, or aligned models.")
    ] = "mocan",
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="pecan: the model that wrote the answers.")
    ] = None,
    beta: Annotated[float, typer.Option(help="Price of a nat of KL; DPO's beta afterwards.")] = 0.1,
    pairs: Annotated[int, typer.Option(min=1, help="The most pairs of a prompt.")] = 8,
    labels: Annotated[
        Literal["weights", "drawn"],
        typer.Option(help="weights: each pair in both orders, with its odds as weight; drawn: once."),
    ] = "weights",
    seed: Annotated[int | None, typer.Option(min=0, help="Of drawn labels (default: 0).")] = None,
) -> None:
    """Pairs of a model's own answers, labelled so that DPO on them raises a reward and keeps constraints."""
    from slimepo.files import refuse_folder
    from slimepo.losses.common import check_number
    from slimepo.pipeline.pairs.relabel import relabel as write_pairs
    from slimepo.terminal import make_console

    refuse_folder(out)
    check_number("--beta", beta, above=0)
    if labels == "weights" and seed is not None:
        raise InputError("--seed is of drawn labels: say --labels drawn, or leave it out")
    write_pairs(
        answers, out, make_console(), method=method, reward=reward, constraints=constraint, bounds=bound,
        reference=reference, beta=beta, pairs=pairs, seed=(seed or 0) if labels == "drawn" else None,
    )  # fmt: skip


def _write_rows(to: Path, source: str, split: str | None, places: Collection[str]) -> None:
    """Write the rows of a source that stand at these places, as they are."""
    from slimepo.data.read import placed_rows
    from slimepo.files import write_json_lines

    write_json_lines(
        to, (row for place, row in placed_rows(source, split) if place in places and isinstance(row, Mapping))
    )


def _text(prompt: list[Message]) -> str:
    return "\n".join(str(message["content"]) for message in prompt)


def _pairs(given: list[str] | None, option: str) -> list[tuple[str, str]]:
    for pair in given or []:
        if "=" not in pair:
            raise InputError(f"{option} {pair!r} is not KEY=VALUE")
    return [(key, value) for key, _, value in (pair.partition("=") for pair in given or [])]
