"""`slimepo eval ...`: the benchmarks and the measures without a judge."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from slimepo.errors import InputError
from slimepo.evaluation.settings import BENCHMARKS, STEPS, Evaluation, has_option
from slimepo.settings import validate

_TITLES = ", ".join(known.title for known in BENCHMARKS.values())
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=f"Score a model: {_TITLES}, or basic measures without a judge.",
)


def _command(benchmark: str) -> Callable[..., None]:
    """A benchmark's command: what is written out here, and an option for each of the settings."""

    def command(
        steps: Annotated[
            list[str] | None,
            typer.Argument(metavar="[STEP]...", help="answer, judge, score (default: all three)."),
        ] = None,
        *,
        model: Annotated[
            str, typer.Option(help="A model folder, an adapter, a stage of a run, a Hub id, or NAME@URL.")
        ],
        out: Annotated[
            Path, typer.Option("--out", help="The folder for answers, judgments and scores of all models.")
        ],
        name: Annotated[str | None, typer.Option(help="The model's name in files and tables.")] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Count calls and tokens without making any call.")
        ] = False,
        **options: Any,
    ) -> None:
        settings = validate(Evaluation, {"benchmark": benchmark, **options}, f"eval {benchmark}")
        for step in steps or ():
            if step not in STEPS:
                raise InputError(f"unknown step {step!r}; the steps are {', '.join(STEPS)}")
        chosen = [step for step in STEPS if step in (steps or STEPS)]
        from slimepo.evaluation.job import make_job
        from slimepo.evaluation.run import run_benchmark
        from slimepo.terminal import make_console

        run_benchmark(make_job(settings, model, out, name), make_console(), chosen, dry_run=dry_run)

    signature = inspect.signature(command, eval_str=True)
    *own, _ = signature.parameters.values()
    asked = [_option(name, benchmark) for name in Evaluation.model_fields if name not in _NO_OPTIONS]
    command.__signature__ = signature.replace(parameters=[*own, *asked])  # type: ignore[attr-defined]
    return command


_NO_OPTIONS = ("benchmark", "stages")


def _option(name: str, benchmark: str) -> inspect.Parameter:
    """A setting as typer takes it; what another benchmark's is stays out of the help, and is refused by name."""
    field = Evaluation.model_fields[name]
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    words = [f"one of {', '.join(choices)}"] if choices else []
    words += [] if field.default is None or field.default is False else [f"default: {field.default}"]
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=" ".join([field.description or "", f"({'; '.join(words)})" if words else ""]).strip(),
        show_default=False,
        hidden=not has_option(benchmark, name),
    )
    # Which of its choices a text is, the settings themselves say, in one line.
    annotation: Any = str if choices else field.annotation
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[annotation, option]
    )


for _name, _known in BENCHMARKS.items():
    app.command(_name, help=f"{_known.title}: {_known.summary}")(_command(_name))


@app.command()
def basics(
    model: Annotated[str, typer.Option(help="A model folder, an adapter, a stage of a run, or a Hub id.")],
    data: Annotated[str, typer.Option(help="Held-out pairs: a file, a folder or a Hub id.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the measures to this file, as JSON.")
    ] = None,
    format: Annotated[str, typer.Option(help="The name of the format, if it is not recognised.")] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OURS=THEIRS", help="A column that has another name: prompt=question; label= ignores one."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="The split to read, of a Hub data set or a saved one.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of pairs.")] = 200,
    samples: Annotated[int, typer.Option(min=0, help="Number of prompts to answer greedily.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    max_length: Annotated[
        int, typer.Option(min=2, help="Maximum tokens of prompt and response together.")
    ] = 2048,
    batch_rows: Annotated[int, typer.Option(min=1, help="Number of answers written side by side.")] = 32,
) -> None:
    """Measure, without a judge, preference accuracy, perplexity, and how generations end, repeat and vary."""
    from slimepo.data.columns import columns_from
    from slimepo.evaluation.basics import measure_basics, show_basics
    from slimepo.files import refuse_folder, write_json
    from slimepo.terminal import make_console

    refuse_folder(out)
    console = make_console()
    measures = measure_basics(
        model, data, console, format=format, columns=columns_from(column or ()), split=split, limit=limit,
        samples=samples, max_new_tokens=max_new_tokens, max_length=max_length, batch_rows=batch_rows,
    )  # fmt: skip
    show_basics(measures, console)
    if out is not None:
        write_json(out, measures)
