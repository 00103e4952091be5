"""Every Python example in the README and the docs runs, and what they name exists."""

import re
import shlex
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

import slimepo
from slimepo.losses import LOSSES, hyperparameters
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.settings import read_mapping
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stands in for what an example takes from the Hub: a tiny model, a few rows."""
    import datasets

    tokenizer = build_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Add {i} and 2.", "chosen": str(i + 2), "rejected": str(i + 3)} for i in range(8)]
    labelled = [
        {"messages": [{"role": who, "content": row[what]} for who, what in said.items()], "label": label}
        for row in rows
        for label, said in enumerate(
            {"user": "prompt", "assistant": answer} for answer in ("chosen", "rejected")
        )
    ]
    found = {"labels.jsonl": labelled}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, data_files="", **__: datasets.Dataset.from_list(found.get(data_files, rows)),
    )
    monkeypatch.chdir(tmp_path)
    names = ("meta-llama/Llama-3.2-3B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct")
    return dict.fromkeys(names, str(tmp_path / "model"))


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_example_runs(code: str, laptop: dict[str, str]) -> None:
    for name, stand_in in laptop.items():
        code = code.replace(name, stand_in)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_every_objective_has_its_row_and_every_hyperparameter_a_mention() -> None:
    page = (ROOT / "docs" / "objectives.md").read_text()
    for name, objective in LOSSES.items():
        assert f"| `{name}` |" in page
        for option in hyperparameters(objective.function):
            assert option in page, f"docs/objectives.md does not mention {option} of {name}"


def test_every_public_name_can_be_had() -> None:
    assert sorted(slimepo.__all__) == sorted(slimepo._HOME)
    for name in slimepo.__all__:
        value: Any = getattr(slimepo, name)
        assert value is not None
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = slimepo.nothing_here


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} points to {target}"


COMMANDS = [
    pytest.param(line, id=f"{page.name}: {line[:50]}")
    for page in PAGES
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.lstrip().startswith("slimepo ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_has_the_arguments_and_options_that_a_page_gives_it(line: str) -> None:
    from slimepo.cli import app
    from slimepo.cli_data import app as data_app
    from slimepo.cli_eval import app as eval_app

    words = shlex.split(line, comments=True)
    while words:
        _, *given = words[: words.index("&&")] if "&&" in words else words
        words = words[len(given) + 2 :]
        group = {"data": data_app, "eval": eval_app}.get(given[0], app)
        name, *arguments = given[group is not app :]
        command: Any = typer.main.get_command(group)
        command.commands[name].make_context(name, arguments)


def test_what_the_guide_sets_in_the_recipe_for_own_pairs_can_be_set() -> None:
    from slimepo.pipeline.recipe.read import load_recipe

    guide, _, _ = (ROOT / "docs" / "guide.md").read_text().partition("## Data formats")
    found = re.findall(r"\b((?:data|stages|adapter|quantize|export_dtype)[.\w]*=(?:\{.*?\}|[^\s'`]+))", guide)
    assert len(found) > 8
    for override in found:
        given = ["model=a/model", "data.path=mine.jsonl", override]
        assert load_recipe(ROOT / "recipes" / "own-pairs.yaml", given).stages


def test_every_page_has_its_place_in_the_site() -> None:
    site = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    listed = re.findall(r"'([\w-]+\.md)'", str(site))
    assert sorted(listed) == sorted(["index.md", "recipes.md", *(page.name for page in PAGES[1:])])


def test_every_recipe_is_valid() -> None:
    from slimepo.pipeline.recipe.read import load_recipe

    told = (ROOT / "recipes" / "README.md").read_text()
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert str(path.relative_to(ROOT / "recipes")) in told
        # What it leaves to the command line.
        given = ["model=a/model", "data.path=mine.jsonl"] if path.stem == "own-pairs" else []
        assert path.parent.name in ("sweeps", "distributed") or load_recipe(path, given).stages


def cells_of(path: Path, *overrides: str, world: bool = False) -> dict[str, Any]:
    """A recipe for every arm of a sweep."""
    from slimepo.playground.quickstart import sweep_base
    from slimepo.settings import set_value
    from slimepo.sweep.cells import cell_recipe
    from slimepo.sweep.settings import WORLDS, arms_of, load_sweep

    sweep = load_sweep(path, overrides, world=world)
    if sweep.recipe in WORLDS:
        base, _ = sweep_base(Path("out"), sweep.overrides, kind=sweep.recipe.partition("/")[2])
    else:
        base = read_mapping(sweep.recipe, "recipe")
        for key, value in sweep.overrides.items():
            set_value(base, key, value)
    return {name: cell_recipe(base, sweep.stage, name, keys, seed=0) for name, keys in arms_of(sweep).items()}


@pytest.mark.parametrize("world", [False, True], ids=["as it is", "in the world"])
@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_arm_of_every_sweep_is_a_recipe(path: Path, world: bool) -> None:
    from slimepo.errors import InputError
    from slimepo.sweep.settings import WORLDS

    values = read_mapping(path, "sweep")
    if world and "world" not in values and values["recipe"] not in WORLDS:
        with pytest.raises(InputError, match="no key `world`"):
            cells_of(path, world=True)
        return
    for name, recipe in cells_of(path, world=world).items():
        assert [stage.name for stage in recipe.stages][-1] == name


@pytest.mark.parametrize("sweep", ["table3", "strong-baselines"])
@pytest.mark.parametrize("model", ["llama-3.2-3b", "qwen3-4b", "gemma-3-4b"])
def test_a_comparison_is_for_each_of_the_papers_models(sweep: str, model: str) -> None:
    path = ROOT / "recipes" / "sweeps" / f"{sweep}.yaml"
    own = read_mapping(ROOT / "recipes" / "paper" / f"{model}.yaml", "recipe")["model"]
    cells = cells_of(path, f"recipe=../paper/{model}.yaml")
    assert list(cells) == ["sft-on-chosen", "dpo", "simpo", "slime"]
    for recipe in cells.values():
        assert recipe.model == own
        assert recipe.stages[-1].batch_size == (128 if sweep == "strong-baselines" else 64)


def test_the_docs_sweep_of_the_world_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(
        r"```yaml\n# world-rates.yaml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL
    )
    (tmp_path / "rates.yaml").write_text(text)
    assert {name: recipe.stages[-1].loss for name, recipe in cells_of(tmp_path / "rates.yaml").items()} == {
        "dpo": "dpo", "slime": "slime",
    }  # fmt: skip


def test_the_guides_sweep_of_rates_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (text,) = re.findall(r"# rates.yaml\n(.*?)```", (ROOT / "docs/guide.md").read_text(), re.DOTALL)
    text = textwrap.dedent(text).replace("recipes/own", f"{ROOT}/recipes/own")
    (tmp_path / "rates.yaml").write_text(text)
    assert [recipe.stages[-1].learning_rate for recipe in cells_of(tmp_path / "rates.yaml").values()] == [
        5e-7, 2e-6, 1e-5, 5e-5,
    ]  # fmt: skip
