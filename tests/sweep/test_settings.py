"""A sweep's file: arms, grids, search; wrong input."""

from pathlib import Path

import pytest

from slimepo.errors import InputError
from slimepo.sweep.settings import arms_of, label, load_sweep, points_of

SWEEP = """
recipe: ../base.yaml
arms: {dpo: {loss: dpo}, slime: {}}
seeds: [0, 1]
world: {arms: {slime: {}}, seeds: [5]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sweeps" / "one.yaml"
    path.parent.mkdir()
    path.write_text(SWEEP)
    return path


def test_a_recipe_is_seen_from_the_sweep_s_file(file: Path) -> None:
    assert load_sweep(file).recipe == str(file.parent / "../base.yaml")


def test_in_the_world_its_own_keys_count(file: Path) -> None:
    sweep = load_sweep(file, world=True)
    assert (sweep.recipe, list(sweep.arms), sweep.seeds) == ("world", ["slime"], [5])


def test_a_grid_multiplies_the_arms(file: Path) -> None:
    sweep = load_sweep(file, ["grid={learning_rate: [1e-6, 1e-5], epochs: [1]}"])
    assert list(arms_of(sweep)) == [
        "dpo-learning_rate=1e-6-epochs=1", "dpo-learning_rate=1e-5-epochs=1",
        "slime-learning_rate=1e-6-epochs=1", "slime-learning_rate=1e-5-epochs=1",
    ]  # fmt: skip
    assert arms_of(sweep)["dpo-learning_rate=1e-6-epochs=1"] == {
        "loss": "dpo",
        "learning_rate": 1e-6,
        "epochs": 1,
    }


def test_points_are_named_by_their_values() -> None:
    assert [label(point) for point in points_of({"learning_rate": [3e-5, 1e-4]})] == ["3e-5", "1e-4"]
    assert label({"loss_options.beta": 0.1, "loss": "dpo"}) == "beta=0.1-loss=dpo"
    assert label({}) == ""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("against=slim", "against 'slim' is no arm .did you mean 'slime'"),
        ("seeds=[]", "seeds"),
        ("arms={}", "arms"),
        ("sedes=[1]", "unknown key 'sedes' .did you mean 'seeds'"),
        (
            "search={by: accuracy, seeds: [1], grid: {epochs: [1, 2]}}",
            "a seed that chose the settings cannot judge them",
        ),
        ("search={by: accuracy, seeds: [7]}", "give grid, or range and trials"),
        ("search={by: accuracy, seeds: [7], range: {epochs: [1, 2]}}", "give grid, or range and trials"),
        (
            "search={by: accuracy, seeds: [7], range: {epochs: [2, 1]}, trials: 3}",
            "range.epochs: 2 is not below 1",
        ),
    ],
)
def test_wrong_input_is_named(file: Path, override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_sweep(file, [override])
