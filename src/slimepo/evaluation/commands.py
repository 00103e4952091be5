"""`slimepo eval ...`: the benchmarks and the measures without a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True, help="Score a model: MT-Bench, Arena-Hard, AlpacaEval, or without a judge."
)

_BENCHMARKS = {
    "mt-bench": "MT-Bench: 80 questions of two turns, graded 1 to 10.",
    "arena-hard": "Arena-Hard: answers compared with a baseline's in both orders (--rules v2.0, or v0.1).",
    "alpaca-eval": "AlpacaEval 2: win rate against gpt-4-1106-preview, raw and length-controlled.",
}


def _benchmark(
    context: typer.Context,
    steps: Annotated[
        list[str] | None,
        typer.Argument(metavar="[STEP]...", help="answer, judge, score; all three without any."),
    ] = None,
    *,
    model: Annotated[
        str, typer.Option(help="A model folder, an adapter, a stage of a run, a Hub id, or NAME@URL.")
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Answers, judgments and scores go there, for all models.")
    ],
    judge: Annotated[
        str | None,
        typer.Option(help="NAME (OpenAI's API), NAME@URL, the URL of a server of one model, or hf:PATH."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in files and tables.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="An answers file, or the name of a model that has answered in --out.")
    ] = None,
    rules: Annotated[str | None, typer.Option(help="Arena-Hard: v2.0 or v0.1.")] = None,
    category: Annotated[
        str | None, typer.Option(help="Arena-Hard v2.0: hard_prompt or creative_writing.")
    ] = None,
    style_control: Annotated[
        str | None, typer.Option(help="Arena-Hard v2.0: published (50 steps, as upstream) or converged.")
    ] = None,
    references: Annotated[str | None, typer.Option(help="MT-Bench: gpt-4 or gpt-4-1106-preview.")] = None,
    data_dir: Annotated[
        str | None, typer.Option(help="A folder with the benchmarks' files, for work without a network.")
    ] = None,
    key_variable: Annotated[
        str | None,
        typer.Option(help="The environment variable with the judge's key (OpenAI's API: OPENAI_API_KEY)."),
    ] = None,
    model_key_variable: Annotated[
        str | None, typer.Option(help="The same for a model behind an endpoint.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first questions only (unofficial).")] = None,
    temperature: Annotated[float | None, typer.Option(help="Instead of the benchmark's own.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Instead of the benchmark's own.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message for the model.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampled answers (default: 0).")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, hf or vllm.")] = None,
    batch_rows: Annotated[int | None, typer.Option(help="Answers written side by side.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Calls under way at once (default: 8).")] = None,
    attempts: Annotated[
        int | None, typer.Option(help="Attempts a call before it is given up (default: 8).")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for one attempt (default: 180).")] = None,
    price_prompt: Annotated[
        float | None, typer.Option(help="The judge's price, US dollars per million tokens.")
    ] = None,
    price_completion: Annotated[float | None, typer.Option(help="The same for what it writes.")] = None,
    max_unscored: Annotated[
        float | None, typer.Option(help="The share of items without a score that is borne (default: 0.05).")
    ] = None,
    canaries: Annotated[
        bool,
        typer.Option("--canaries", help="Judge answers that deserve nothing too, and say what they got."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count calls and tokens; make none.")] = False,
) -> None:
    given = {key: value for key, value in locals().items() if value is not None and key not in _NOT_SETTINGS}
    # The same function is all three commands: they differ in their names only.
    given["benchmark"] = context.command.name
    from rich.console import Console

    from slimepo.evaluation.settings import Evaluation
    from slimepo.settings import validate

    settings = validate(Evaluation, given, f"eval {context.command.name}")
    chosen = _steps(steps or [])
    from slimepo.evaluation.bench_runs import make_job, run_benchmark

    run_benchmark(make_job(settings, model, out, name), Console(), chosen, dry_run=dry_run)


_NOT_SETTINGS = ("context", "steps", "model", "out", "name", "dry_run")

for _name, _help in _BENCHMARKS.items():
    app.command(_name, help=_help)(_benchmark)


@app.command()
def basics(
    model: Annotated[str, typer.Option(help="A model folder, an adapter, a stage of a run, or a Hub id.")],
    data: Annotated[str, typer.Option(help="Held-out pairs: a file, a folder or a Hub id.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the figures there as JSON too.")] = None,
    split: Annotated[str | None, typer.Option(help="Which split of a Hub or saved data set.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many pairs.")] = 200,
    samples: Annotated[int, typer.Option(min=0, help="Prompts that are answered (greedy).")] = 64,
    tasks: Annotated[int, typer.Option(min=0, help="Tasks of the built-in world that are answered.")] = 110,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of prompt and response together.")] = 2048,
    batch_rows: Annotated[int, typer.Option(min=1, help="Answers written side by side.")] = 32,
) -> None:
    """Without a judge: preference accuracy, perplexity, verifiable tasks, and how generations end, repeat and vary."""
    from rich.console import Console

    from slimepo.evaluation.basics import measure_basics, show_basics
    from slimepo.training.folder import write_json

    console = Console()
    figures = measure_basics(
        model, data, console, split=split, limit=limit, samples=samples, tasks=tasks, max_new_tokens=max_new_tokens,
        max_length=max_length, batch_rows=batch_rows,
    )  # fmt: skip
    show_basics(figures, console)
    if out is not None:
        write_json(out, figures)


def _steps(names: list[str]) -> Any:
    from slimepo.errors import InputError

    known = ("answer", "judge", "score")
    for name in names:
        if name not in known:
            raise InputError(f"unknown step {name!r}; the steps are {', '.join(known)}")
    return tuple(step for step in known if step in names) or known
