"""Running a sweep: what arms share, then their cells, several processes side by side; a search before."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from slimepo.errors import PREEMPTED, RESOURCES, Failure, InputError, RunsFailed
from slimepo.files import write_json
from slimepo.pipeline.folder import check_folder, held, is_held, mark_folder
from slimepo.sweep.cells import (
    Cell,
    by_shared,
    cell_recipe,
    is_done,
    link_shared,
    shared_recipe,
    write_recipe,
)
from slimepo.sweep.settings import SEARCH, SHARED, Keys, Search, Sweep, arms_of, ends_of, label, points_of
from slimepo.sweep.table import figures_of, write_tables
from slimepo.words import nearest

if TYPE_CHECKING:
    from rich.console import Console

# Seconds between two looks at a run folder that another process holds.
EVERY = 2.0

# Folders of a stage that hold weights, beside its checkpoints.
WEIGHTS = ("model", "adapter", "base")

Ended = Callable[[Cell], None]


class Runner(Protocol):
    """Runs cells, each followed by `ended` once it is done; what became of those that failed, by name."""

    def __call__(self, cells: Sequence[Cell], /, *, ended: Ended = ...) -> Mapping[str, Failure]: ...


class Process(NamedTuple):
    """A run folder and the commands of `slimepo` that are run for it, one after another."""

    name: str
    folder: Path
    commands: list[list[str]]


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
        RunsFailed: a run failed, which hides no other.
    """
    # Every key is looked at before the first run starts.
    tried = [*points_of(sweep.search.grid), *ends_of(sweep.search)] if sweep.search else [{}]
    for name, keys in arms_of(sweep).items():
        for point in tried:
            cell_recipe(base, sweep.stage, name, keys | point, sweep.seeds[0])
    with held(out, console):
        mark_folder(out)
        run = functools.partial(run_cells, out=out, jobs=jobs, prepare=prepare, console=console)
        if sweep.search is None:
            points: Mapping[str, Keys] = {name: {} for name in arms_of(sweep)}
        else:
            points = searched(sweep, sweep.search, base, run, out, console)
        cells = [
            _cell(sweep, base, name, point, seed, out / name)
            # Seed by seed: a sweep that is cut short has whole seeds, and arms that can be compared.
            for seed in sweep.seeds
            for name, point in points.items()
        ]
        failed = run(cells)
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


def _cell(sweep: Sweep, base: Keys, arm: str, point: Keys, seed: int, folder: Path) -> Cell:
    recipe = cell_recipe(base, sweep.stage, arm, arms_of(sweep)[arm] | point, seed)
    return Cell(arm, point, recipe, folder / f"seed-{seed}")


def searched(
    sweep: Sweep, search: Search, base: Keys, run: Runner, out: Path, console: Console
) -> dict[str, Keys]:
    """The best point of every arm; all that were tried, with their figures, are in search.json of `out`.

    Of the recipe's benchmarks the search runs the one that it goes by, if it goes by one. Weights of its runs are
    removed once that figure is known.
    """
    arms = arms_of(sweep)

    def cell_of(name: str, point: Keys, seed: int) -> Cell:
        cell = _cell(sweep, base, name, point, seed, out / SEARCH / f"{name}-{label(point)}")
        asked = [each for each in cell.recipe.evaluate if search.by.startswith(each.benchmark)]
        return replace(cell, recipe=cell.recipe.model_copy(update={"evaluate": asked}))

    def ended(cell: Cell) -> None:
        if search.by in figures_of(cell):
            drop_weights(cell)

    tried: dict[str, list[tuple[Keys, float | None]]] = {name: [] for name in arms}

    def attempt(asked: Mapping[str, Sequence[Keys]]) -> None:
        cells = {
            (name, label(point)): [cell_of(name, point, seed) for seed in search.seeds]
            for name, points in asked.items()
            for point in points
        }
        run([cell for alike in cells.values() for cell in alike], ended=ended)
        figures = {cell.folder: figures_of(cell) for alike in cells.values() for cell in alike}
        known = dict.fromkeys(key for found in figures.values() for key in found)
        if known and search.by not in known:
            raise InputError(
                f"sweep: search.by: nothing is called {search.by!r}{nearest(search.by, known)}; there are: "
                f"{', '.join(key for key in known if not key.startswith('train/'))}"
            )
        for (name, _), alike in cells.items():
            found = [figures[cell.folder].get(search.by) for cell in alike]
            values = [value for value in found if value is not None]
            # A point at which one seed broke is out of the question.
            tried[name].append(
                (alike[0].point, statistics.fmean(values) if len(values) == len(found) else None)
            )

    if search.range:
        studies = {name: _study(search) for name in arms}
        for _ in range(search.trials):
            trials = {name: study.ask(_distributions(search)) for name, study in studies.items()}
            attempt({name: [trial.params] for name, trial in trials.items()})
            for name, trial in trials.items():
                value = tried[name][-1][1]
                studies[name].tell(trial, value, **({} if value is not None else {"state": _failed()}))
    else:
        attempt({name: [*points_of(search.grid)] for name in arms})
    write_json(
        out / "search.json",
        {
            "by": search.by,
            "seeds": search.seeds,
            "arms": {
                name: [{"point": point, search.by: value} for point, value in found]
                for name, found in tried.items()
            },
        },
    )
    best: dict[str, Keys] = {}
    sign = -1 if search.smallest else 1
    for name, found in tried.items():
        known = [(point, value) for point, value in found if value is not None]
        if not known:
            console.print(f"{name}: no point of the search came to its end", style="red")
            continue
        best[name], value = max(known, key=lambda each: sign * each[1])
        told = ", ".join(f"{label(point)}: {'failed' if at is None else f'{at:.4g}'}" for point, at in found)
        console.print(f"{name}: {search.by} {told}; taken: {label(best[name])}")
    return best


def drop_weights(cell: Cell) -> None:
    """Remove the models and checkpoints that a cell has made, but for what it shares with others, which is linked."""
    for stage in cell.recipe.stages:
        folder = cell.folder / stage.name
        if not folder.is_symlink():
            weights = [folder / name for name in WEIGHTS if (folder / name).exists()]
            for made in (*weights, *(folder / "checkpoints").glob("checkpoint-*")):
                shutil.rmtree(made)


def _study(search: Search) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError(
            "search.range is searched by optuna: pip install 'slimepo[sweep]', or give search.grid"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # The same points are asked for again by the same sweep, whose finished runs are then not run twice.
    directions = optuna.study.StudyDirection
    direction = directions.MINIMIZE if search.smallest else directions.MAXIMIZE
    return optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=search.seeds[0]))


def _distributions(search: Search) -> dict[str, Any]:
    from optuna.distributions import FloatDistribution

    return {
        key: FloatDistribution(low, high, log=0 < 10 * low <= high)
        for key, (low, high) in search.range.items()
    }


def _failed() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL


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
    together = by_shared(missing, out / SHARED)
    shared = []
    for folder, alike in together.items():
        recipe = shared_recipe(alike[0])
        file = str(write_recipe(recipe, folder))
        commands = []
        own_stages = recipe.stages != alike[0].recipe.stages
        if own_stages and not all(is_done(recipe, folder, stage.name) for stage in recipe.stages):
            commands.append(["run", file, "--out", str(folder)])
        if not all((folder / name / "pairs.json").exists() for name in recipe.pairs):
            commands.append(["pairs", file, "--out", str(folder)])
        if commands:
            shared.append(Process(f"{SHARED} {folder.name}", folder, commands))
    broken = run_processes(shared, jobs, console)
    failed = {
        cell.name: broken[process.name]._replace(
            words=f"{process.folder}, which it starts from, failed: {broken[process.name].words}"
        )
        for process in shared
        if process.name in broken
        for cell in together[process.folder]
    }
    processes = []
    for cell in missing:
        if cell.name in failed:
            continue
        file = str(write_recipe(cell.recipe, cell.folder))
        for folder, alike in together.items():
            if cell in alike:
                link_shared(cell, folder)
        processes.append(Process(cell.name, cell.folder, [["run", file, "--out", str(cell.folder)]]))
    if len(missing) < len(cells):
        console.print(f"{len(cells) - len(missing)} of {len(cells)} runs are done")
    by_name = {cell.name: cell for cell in missing}
    return failed | run_processes(processes, jobs, console, lambda name: ended(by_name[name]))


def run_processes(
    processes: Sequence[Process],
    jobs: int,
    console: Console,
    ended: Callable[[str], None] = lambda name: None,
) -> dict[str, Failure]:
    """Run them, `jobs` at a time, each with its share of the processors; what each that failed ended with, by name.

    ended: called with the name of each that did not fail.

    What they print is in log.txt of their folders. With several GPUs each place has one of them.
    """
    # Modules are found where this process finds them: a checker, say, that lies beside the recipe.
    modules = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    places: queue.Queue[dict[str, str]] = queue.Queue()
    for environment in _places(jobs):
        places.put(environment)
    failed: dict[str, Failure] = {}
    states = {process.name: "waiting" for process in processes}
    started, stopped = time.monotonic(), threading.Event()

    def run(process: Process) -> Failure | None:
        environment = places.get()
        try:
            while process.folder.exists() and is_held(process.folder):
                # A process that outlived a sweep which was killed.
                states[process.name] = "at work in another process"
                if stopped.wait(EVERY):
                    return Failure(PREEMPTED, "stopped")
            states[process.name] = "running"
            file, python = process.folder / "log.txt", [sys.executable, "-m", "slimepo.cli"]
            code = 0
            with file.open("a") as log:
                for command in process.commands:
                    env = {**os.environ, **modules, **environment}
                    code = subprocess.run([*python, *command], stdout=log, stderr=log, env=env).returncode
                    if code:
                        break
            if code < 0:
                # As the system does where memory has run out.
                return Failure(RESOURCES, f"killed by signal {-code}; see {file}")
            return Failure(code, _last_line(file) or f"exit code {code}") if code else None
        finally:
            places.put(environment)

    with _progress(states, console), ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(run, process): process for process in processes}
        try:
            for done in as_completed(waiting):
                name, why = waiting[done].name, done.result()
                states[name] = f"failed: {why.words}" if why else "done"
                over = sum(state == "done" or state.startswith("failed") for state in states.values())
                told = f"[{over}/{len(processes)}] {name}: {states[name]}, {time.monotonic() - started:.0f} s"
                console.print(told, style="red" if why else None)
                if why:
                    failed[name] = why
                else:
                    ended(name)
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _places(jobs: int) -> list[dict[str, str]]:
    """The environment of each process that runs beside others: its threads, and its GPU where there are several."""
    if jobs == 1:
        return [{}]
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [*map(str, range(torch.cuda.device_count()))]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // jobs, 1))
    return [
        {
            "OMP_NUM_THREADS": threads,
            **({"CUDA_VISIBLE_DEVICES": devices[at % len(devices)]} if devices else {}),
        }
        for at in range(jobs)
    ]


def _last_line(file: Path) -> str:
    """What a command said went wrong, or else the last thing that it said."""
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip(" │") for line in text.splitlines() if any(map(str.isalnum, line))]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")


@contextlib.contextmanager
def _progress(states: Mapping[str, str], console: Console) -> Any:
    """A table of what runs, in a terminal; elsewhere the lines of what ended tell."""
    if not console.is_terminal:
        yield
        return
    from rich.live import Live
    from rich.table import Table

    def table() -> Table:
        shown = Table(
            "run", "state", title=f"{sum(s == 'done' for s in states.values())} of {len(states)} done"
        )
        for name, state in states.items():
            if state != "done":
                shown.add_row(name, state)
        return shown

    with Live(get_renderable=table, console=console, refresh_per_second=1, transient=True):
        yield
