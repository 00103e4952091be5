"""The commands that train: run, train, and certify, which does what they do first."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from slimepo.parallel.launch import launch, launched
from slimepo.terminal import make_console
from slimepo.types import OBJECTIVES

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Recipe keys to set, such as stages.slime.learning_rate=1e-6."
    ),
]
OutFolder = Annotated[Path | None, typer.Option("--out", help="The run folder (default: runs/RECIPE-NAME).")]
Restart = Annotated[bool, typer.Option("--restart", help="Delete what is in the run folder and start again.")]
Accept = Annotated[
    list[str] | None,
    typer.Option(
        help="Continue although this differs from how the run began; the name is in the refusal (may be repeated).",
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option(
        "--nproc", min=1, help="Number of ranks on this machine: GPUs, or shares of its CPU if it has none."
    ),
]
NoCertificate = Annotated[
    bool,
    typer.Option(
        "--no-certificate", help="Do not compare the first loss and gradients with plainly computed ones."
    ),
]


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/ultrafeedback-cpu.yaml.")],
    overrides: Overrides = None,
    out: OutFolder = None,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke", help="Try the recipe: a tiny random model of its architecture, five steps a stage."
        ),
    ] = False,
    restart: Restart = False,
    accept: Accept = None,
    nproc: Ranks = None,
    no_certificate: NoCertificate = False,
) -> None:
    """Run a recipe, stage by stage. The same command continues an interrupted run."""
    from slimepo.pipeline.recipe.read import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    _on_ranks(nproc)
    _run(loaded, out or _folder(recipe, smoke), restart, not no_certificate, accept or [])


def certify(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/paper/qwen3-4b.yaml.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The run folder with the models that later stages start from."),
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Use a tiny random model.")] = False,
    nproc: Ranks = None,
) -> None:
    """Compare each stage's first loss and gradients with plainly computed ones, as a run does; trains nothing."""
    from slimepo.pipeline.recipe.read import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    _on_ranks(nproc)
    from slimepo.pipeline.certify import certify_recipe
    from slimepo.pipeline.run import runs_of

    run, folder = runs_of(loaded, out or _folder(recipe, smoke))[0]
    certify_recipe(run, folder, make_console())


def train(
    model: Annotated[str, typer.Option(help="A model folder or Hub id.")],
    data: Annotated[
        str, typer.Option(help="Pairs (or judged answers, for kto): a file, a folder or a Hub id.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of the stage or the recipe: learning_rate=1e-6 loss_options.hard_margin=2 data.max_length=512",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help=f"The objective: {', '.join(OBJECTIVES)}, a preset such as slime/without-hard, or your own as "
            "package.module:function or file.py:function (default: slime).",
        ),
    ] = None,
    out: OutFolder = None,
    restart: Restart = False,
    accept: Accept = None,
    nproc: Ranks = None,
    no_certificate: NoCertificate = False,
) -> None:
    """Train one stage: one model, one file of pairs, one objective."""
    from slimepo.pipeline.recipe.read import one_stage_recipe

    recipe = one_stage_recipe(model, data, loss, overrides or [])
    _on_ranks(nproc)
    _run(
        recipe,
        out or Path("runs") / f"{Path(model).name}-{recipe.stages[0].name}",
        restart,
        not no_certificate,
        accept or [],
    )


def _folder(recipe: Path, smoke: bool) -> Path:
    """The run folder of a recipe's file, where none is given."""
    return Path("runs") / (recipe.stem + ("-smoke" if smoke else ""))


def _on_ranks(nproc: int | None) -> None:
    """Hand this command over to ranks of this machine where `--nproc` asks for them, and end as they do."""
    if nproc is not None and not launched():
        raise typer.Exit(launch(nproc, sys.argv[1:]))


def _run(recipe: Any, out: Path, restart: bool, certificate: bool, accept: list[str]) -> None:
    from slimepo.pipeline.console import print_summary
    from slimepo.pipeline.run import run_recipe, runs_of

    console = make_console()
    if not certificate:
        for stage in recipe.stages:
            stage.args["certificate"] = False
    results = run_recipe(recipe, out, console, restart=restart, accept=accept)
    folders = [folder for _, folder in runs_of(recipe, out)]
    if len(folders) == 1:
        print_summary(results, out, console)
        return
    from slimepo.report.folders import read_sources
    from slimepo.report.tables import results_in_terminal

    console.print(results_in_terminal(read_sources(folders)))
    console.print(f"run folders: {', '.join(map(str, folders))}")
