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
from slimepo.sweep.settings import SEARCH, Keys, Search, Sweep, arms_of, label, of_benchmark, points_of
from slimepo.sweep.table import check_names, figures_of, write_csv

if TYPE_CHECKING:
    from rich.console import Console

# Folders of a stage that hold weights, beside its checkpoints.
WEIGHTS = ("model", "adapter", "base")

Ended = Callable[[Cell], None]
# A point and the figure that the search goes by, the mean over its seeds; None where one of them broke.
Tried = tuple[Keys, float | None]


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
    tried: dict[str, list[Tried]] = {name: [] for name in arms_of(sweep)}
    runs: list[tuple[Cell, dict[str, float]]] = []

    def attempt(asked: Mapping[str, Sequence[Keys]]) -> None:
        """Run these points of every arm, with every seed of the search."""
        cells = [
            (name, point, [_cell(sweep, search, base, name, point, seed, out) for seed in search.seeds])
            for name, points in asked.items()
            for point in points
        ]
        run(
            [cell for *_, alike in cells for cell in alike],
            ended=lambda cell: drop_weights(cell) if search.by in figures_of(cell) else None,
        )
        found = [(cell, figures_of(cell)) for *_, alike in cells for cell in alike]
        runs.extend(found)
        known = list(dict.fromkeys(key for _, figures in found for key in figures))
        check_names("search.by", [search.by], known)
        # Names of benchmarks are not looked for: the search runs but one of these.
        check_names("measures", [name for name in sweep.measures if not of_benchmark(name)], known)
        of_cell = {cell.folder: figures.get(search.by) for cell, figures in found}
        for name, point, alike in cells:
            values = [value for cell in alike if (value := of_cell[cell.folder]) is not None]
            # A point at which one seed broke is out of the question.
            tried[name].append((point, statistics.fmean(values) if len(values) == len(alike) else None))

    if search.range:
        studies = {name: _study(search) for name in tried}
        for _ in range(search.trials):
            trials = {name: study.ask(_distributions(search)) for name, study in studies.items()}
            attempt({name: [trial.params] for name, trial in trials.items()})
            for name, trial in trials.items():
                value = tried[name][-1][1]
                studies[name].tell(trial, value, **({} if value is not None else {"state": _failed()}))
    else:
        attempt({name: [*points_of(search.grid)] for name in tried})
    write_csv(out / "search-runs.csv", runs)
    points = {
        name: [{"point": point, search.by: value} for point, value in found] for name, found in tried.items()
    }
    write_json(out / "search.json", {"by": search.by, "seeds": search.seeds, "arms": points})
    return best_points(search, tried, console)


def best_points(search: Search, tried: Mapping[str, Sequence[Tried]], console: Console) -> dict[str, Keys]:
    """The best point of every arm that has one, said with all that were tried."""
    best: dict[str, Keys] = {}
    sign = -1 if search.smallest else 1
    for name, found in tried.items():
        known = [(point, value) for point, value in found if value is not None]
        if not known:
            console.print(f"{name}: no point of the search came to its end", style="red")
            continue
        best[name], _ = max(known, key=lambda each: sign * each[1])
        told = ", ".join(f"{label(point)}: {'failed' if at is None else f'{at:.4g}'}" for point, at in found)
        console.print(f"{name}: {search.by} {told}; taken: {label(best[name])}")
    return best


def drop_weights(cell: Cell) -> None:
    """Remove the models and checkpoints that a cell has made, but for what it shares with others, which is linked."""
    drop_checkpoints(cell)
    for stage in cell.recipe.stages:
        folder = cell.folder / stage.name
        if not folder.is_symlink():
            for made in (folder / name for name in WEIGHTS if (folder / name).exists()):
                shutil.rmtree(made)


def drop_checkpoints(cell: Cell) -> None:
    """Remove the checkpoints of a cell that is done: with the optimizer's state, two are six times the model's size."""
    for stage in cell.recipe.stages:
        for checkpoint in (cell.folder / stage.name / "checkpoints").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def _cell(sweep: Sweep, search: Search, base: Keys, name: str, point: Keys, seed: int, out: Path) -> Cell:
    cell = cell_at(sweep, base, name, point, seed, out / SEARCH / f"{name}-{label(point)}")
    asked = [each for each in cell.recipe.evaluate if each.benchmark == of_benchmark(search.by)]
    return replace(cell, recipe=cell.recipe.model_copy(update={"evaluate": asked}))


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
