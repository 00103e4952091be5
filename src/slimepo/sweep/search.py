"""The search before a sweep: the best point of every arm, found on seeds of its own."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from slimepo.errors import Failure, InputError
from slimepo.files import write_json
from slimepo.sweep.cells import Cell, cell_at
from slimepo.sweep.settings import SEARCH, Keys, Search, Sweep, arms_of, label, points_of
from slimepo.sweep.table import figures_of, write_csv
from slimepo.words import nearest

if TYPE_CHECKING:
    from rich.console import Console

# Folders of a stage that hold weights, beside its checkpoints.
WEIGHTS = ("model", "adapter", "base")

Ended = Callable[[Cell], None]


class Runner(Protocol):
    """Runs cells, each followed by `ended` once it is done; what became of those that failed, by name."""

    def __call__(self, cells: Sequence[Cell], /, *, ended: Ended = ...) -> Mapping[str, Failure]: ...


def searched(
    sweep: Sweep, search: Search, base: Keys, run: Runner, out: Path, console: Console
) -> dict[str, Keys]:
    """The best point of every arm; all that were tried are in search.json of `out`, their figures in search-runs.csv.

    Of the recipe's benchmarks the search runs the one that it goes by, if it goes by one. Weights of its runs are
    removed once that figure is known.
    """
    arms = arms_of(sweep)

    def cell_of(name: str, point: Keys, seed: int) -> Cell:
        cell = cell_at(sweep, base, name, point, seed, out / SEARCH / f"{name}-{label(point)}")
        asked = [each for each in cell.recipe.evaluate if search.by.startswith(each.benchmark)]
        return replace(cell, recipe=cell.recipe.model_copy(update={"evaluate": asked}))

    def ended(cell: Cell) -> None:
        if search.by in figures_of(cell):
            drop_weights(cell)

    tried: dict[str, list[tuple[Keys, float | None]]] = {name: [] for name in arms}
    runs: list[tuple[Cell, dict[str, float]]] = []

    def attempt(asked: Mapping[str, Sequence[Keys]]) -> None:
        cells = {
            (name, label(point)): [cell_of(name, point, seed) for seed in search.seeds]
            for name, points in asked.items()
            for point in points
        }
        run([cell for alike in cells.values() for cell in alike], ended=ended)
        figures = {cell.folder: figures_of(cell) for alike in cells.values() for cell in alike}
        runs.extend((cell, figures[cell.folder]) for alike in cells.values() for cell in alike)
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
    write_csv(out / "search-runs.csv", runs)
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
