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


@pytest.mark.parametrize(
    ("override", "place", "keys"),
    [
        ("overrides.data.path=x", ("overrides",), {"data.max_length": 9, "data.path": "x"}),
        ("arms.slime.loss_options.hard_margin=2", ("arms", "slime"), {"loss_options.hard_margin": 2}),
        ("arms.dpo-0.1.loss_options.beta=2", ("arms", "dpo-0.1"), {"loss": "dpo", "loss_options.beta": 2}),
        ("grid.args.max_steps=[1, 2]", ("grid",), {"args.max_steps": [1, 2]}),
        ("search.grid.loss_options.hard_margin=[1]", ("search", "grid"), {"loss_options.hard_margin": [1]}),
    ],
)
def test_a_key_of_the_recipe_given_on_the_command_line_leaves_the_rest_of_its_section(
    file: Path, override: str, place: tuple[str, ...], keys: dict[str, object]
) -> None:
    file.write_text(
        "{recipe: r, overrides: {data.max_length: 9}, arms: {dpo-0: {}, dpo-0.1: {loss: dpo}, slime: {}}, seeds: [0], "
        "search: {by: accuracy, seeds: [9], grid: {}}}"
    )
    found: object = load_sweep(file, [override, "search=null"] if place[0] != "search" else [override])
    for each in place:
        found = found[each] if isinstance(found, dict) else getattr(found, each)
    assert found == keys


def test_a_search_may_be_given_key_by_key_and_what_is_no_mapping_takes_none(file: Path) -> None:
    file.write_text("{recipe: r, search: null, overrides: 3, arms: {slime: }, seeds: [0]}")
    with pytest.raises(InputError, match=r"overrides.epochs=1: overrides is no mapping of keys"):
        load_sweep(file, ["overrides.epochs=1"])
    given = ["search.by=accuracy", "search.seeds=[9]", "search.grid.epochs=[1, 2]", "arms.slime.epochs=3"]
    with pytest.raises(InputError, match="'epochs' is set twice"):
        load_sweep(file, ["overrides={}", *given])
    sweep = load_sweep(file, ["overrides={}", *given[:3], "arms.slime.loss=slime"])
    assert (sweep.search and sweep.search.grid, sweep.arms) == (
        {"epochs": [1, 2]},
        {"slime": {"loss": "slime"}},
    )


def test_points_are_named_by_their_values() -> None:
    assert [label(point) for point in points_of({"learning_rate": [3e-5, 1e-4]})] == ["3e-5", "1e-4"]
    assert label({"loss_options.beta": 0.1, "loss": "dpo"}) == "beta=0.1-loss=dpo"
    assert label({}) == ""
    assert label({"loss": "slime/without-hard"}) == "slime-without-hard", "a folder is called so"
    assert label({"args.max_steps": 2, "max_steps": 1}) == "args.max_steps=2-max_steps=1"
    assert label({"data.skip_bad_rows": True}) == "True"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "overrides={data.path: x, data: {limit: 3}}",
            "'data' replaces all of data and with it 'data.path', set before",
        ),
        ("arms.dpo={loss_options.beta: 1, loss_options: {}}", "'loss_options' replaces all of loss_options"),
        ("overrides=[1]", "overrides"),
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
        ("seeds=[0, 1, 0]", "seeds: 0 stands there twice"),
        ("search={by: accuracy, seeds: [7, 7], grid: {epochs: [1]}}", "search.seeds: 7 stands there twice"),
        ("grid={epochs: []}", "grid.epochs: .*at least 1 item"),
        ("grid={epochs: [1, 1]}", "grid.epochs: 1 stands there twice"),
        ("arms={shared: {}}", "'shared' cannot be an arm's name"),
        ("arms={a/b: {}}", "'a/b' cannot be an arm's name"),
        ("arms.dpo.name=x", "arm 'dpo' cannot set 'name': an arm's stage is called after it"),
        ("arms.dpo.seed=3", "arm 'dpo' cannot set 'seed': every arm runs with the sweep's seeds"),
        ("arms.dpo.stages=[]", "arm 'dpo' cannot set 'stages'"),
        ("grid={loss: [dpo, ipo]}", "'loss' is set twice, by arm 'dpo', the grid or the search"),
    ],
)
def test_wrong_input_is_named(file: Path, override: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_sweep(file, [override])


def test_two_arms_are_not_run_in_one_folder(file: Path) -> None:
    with pytest.raises(InputError, match="two arms are called 'a-1-1'"):
        load_sweep(file, ["arms={a-1: {}, a: {}}", "grid={loss_options.x: [1, '1-1']}"])


def test_the_key_world_is_used_or_refused(file: Path) -> None:
    file.write_text(SWEEP.replace("../base.yaml", "world/online"))
    assert load_sweep(file, world=True).seeds == [5]
    file.write_text("recipe: world\narms: {a: {}}\nseeds: [0]\nworld: [1]\n")
    with pytest.raises(InputError, match="world: it must be a mapping"):
        load_sweep(file)
