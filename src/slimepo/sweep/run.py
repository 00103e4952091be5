"""Running a sweep: what arms share, then their cells; a search before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slimepo.errors import Failure, InputError, RunsFailed
from slimepo.pipeline.folder import check_folder, held, mark_folder
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.run import check_space
from slimepo.sweep.cells import (
    Cell,
    by_shared,
    cell_at,
    cell_recipe,
    is_done,
    link_shared,
    shared_recipe,
    write_recipe,
)
from slimepo.sweep.processes import Process, run_processes
from slimepo.sweep.search import Ended, drop_checkpoints, searched
from slimepo.sweep.settings import SEARCH, SHARED, Keys, Sweep, arms_of, ends_of, of_benchmark, points_of
from slimepo.sweep.table import write_tables

if TYPE_CHECKING:
    from rich.console import Console


def run_sweep(
    sweep: Sweep,
    base: Keys,
    out: Path,
    console: Console,
    *,
    jobs: int = 1,
    prepare: Callable[[int], None] = lambda seed: None,
) -> None:
    """Run what is not done yet, `jobs` runs side by side, and write the tables to `out`.

    base: the keys of the recipe. prepare: called with a seed before anything of it runs.

    Raises:
        InputError: wrong input, found before anything runs where it can be.
        ResourceError: the disk has no room for the models that are not there yet.
        RunsFailed: a run failed, which hides no other.
    """
    recipe = check_sweep(sweep, base)
    if recipe.smoke:
        # It runs no benchmark.
        shown = [name for name in sweep.measures if not of_benchmark(name)]
        sweep = sweep.model_copy(update={"measures": shown})
    models = [out / name / f"seed-{seed}" / name / "model" for name in arms_of(sweep) for seed in sweep.seeds]
    missing = sum(not model.exists() for model in models)
    with held(out, console):
        mark_folder(out)
        if missing and not recipe.smoke:
            # The size of a world's model is told by its tokenizer, which is part of the world.
            prepare(sweep.seeds[0])
            check_space(recipe, missing, out)
        run = functools.partial(run_cells, out=out, jobs=jobs, prepare=prepare, console=console)
        if sweep.search is None:
            points: Mapping[str, Keys] = {name: {} for name in arms_of(sweep)}
        else:
            points = searched(sweep, sweep.search, base, run, out, console)
        cells = [
            cell_at(sweep, base, name, point, seed, out / name)
            # Seed by seed: a sweep that is cut short has whole seeds, and arms that can be compared.
            for seed in sweep.seeds
            for name, point in points.items()
        ]
        failed = run(cells, ended=drop_checkpoints)
        write_tables(cells, sweep, out, console)
    lost = [name for name in arms_of(sweep) if name not in points]
    if lost:
        raise InputError(
            f"sweep: no point of the search came to its end for {', '.join(lost)}; see {out / SEARCH}"
        )
    if failed:
        name, first = next(iter(failed.items()))
        raise RunsFailed(
            f"sweep: {len(failed)} of {len(cells)} runs failed; {name}: {first.words}",
            [each.code for each in failed.values()],
        )


def check_sweep(sweep: Sweep, base: Keys) -> Recipe:
    """Look at every key and figure of a sweep before its first run; the recipe of an arm.

    Raises:
        InputError: a key is none or its value is wrong, or a figure is asked for of a benchmark that no arm runs.
    """
    tried = [*points_of(sweep.search.grid), *ends_of(sweep.search)] if sweep.search else [{}]
    recipes = [
        cell_recipe(base, sweep.stage, name, keys | point, sweep.seeds[0])
        for name, keys in arms_of(sweep).items()
        for point in tried
    ]
    evaluated = {each.benchmark for recipe in recipes for each in recipe.evaluate}
    asked = [("search.by", sweep.search.by)] if sweep.search else []
    for key, name in [*asked, *(("measures", name) for name in sweep.measures)]:
        if (benchmark := of_benchmark(name)) and benchmark not in evaluated:
            raise InputError(
                f"sweep: {key}: {name} is a figure of {benchmark}, which evaluate of the recipe does not name"
            )
    return recipes[0]


def run_cells(
    cells: Sequence[Cell],
    *,
    out: Path,
    jobs: int,
    prepare: Callable[[int], None],
    console: Console,
    ended: Ended = lambda cell: None,
) -> dict[str, Failure]:
    """Run the cells that are not done, first what they share; what each that failed ended with, by name.

    ended: called with each cell that is done, those that were done before among them.

    Raises:
        InputError: a cell's folder holds something else.
    """
    for cell in cells:
        # Also of what is done: figures of another sweep must not be taken for this one's.
        check_folder(cell.recipe, cell.folder, restart=False)
    missing = []
    for cell in cells:
        if cell.done:
            ended(cell)
            continue
        missing.append(cell)
        stage = cell.folder / cell.stage.name
        if not (stage / "model").exists():
            # More is asked of it than when its weights were removed: it is trained again.
            (stage / "stage.json").unlink(missing_ok=True)
    for seed in dict.fromkeys(cell.recipe.seed for cell in cells):
        prepare(seed)
    starts: dict[str, tuple[Path, Process | None]] = {}
    for folder, alike in by_shared(missing, out / SHARED).items():
        made = _shared_process(alike[0], folder)
        for cell in alike:
            starts[cell.name] = folder, made
    processes: list[Process] = []
    # A start right before the first cell that needs it.
    for cell in missing:
        file = str(write_recipe(cell.recipe, cell.folder))
        start = None
        if cell.name in starts:
            folder, start = starts[cell.name]
            link_shared(cell, folder)
            if start is not None and start not in processes:
                processes.append(start)
        processes.append(Process(cell.name, cell.folder, [["run", file, "--out", str(cell.folder)]], start))
    if len(missing) < len(cells):
        console.print(f"{len(cells) - len(missing)} of {len(cells)} runs are done")
    by_name = {cell.name: cell for cell in missing}

    def done(name: str) -> None:
        if name in by_name:
            ended(by_name[name])

    failed = run_processes(processes, jobs, console, done)
    return {name: why for name, why in failed.items() if name in by_name}


def _shared_process(cell: Cell, folder: Path) -> Process | None:
    """What makes the start that a cell shares with others in `folder`; None where it is made."""
    recipe = shared_recipe(cell)
    file, commands = str(write_recipe(recipe, folder)), []
    own_stages = recipe.stages != cell.recipe.stages
    if own_stages and not all(is_done(recipe, folder, stage.name) for stage in recipe.stages):
        commands.append(["run", file, "--out", str(folder)])
    if not all((folder / name / "pairs.json").exists() for name in recipe.pairs):
        commands.append(["pairs", file, "--out", str(folder)])
    return Process(f"{SHARED} {folder.name}", folder, commands) if commands else None
