"""An exported model on the Hub, with its card: on request, and private unless it is asked to be public."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from slimepo.errors import InputError
from slimepo.files import is_main_process, read_json, write_json
from slimepo.hub import offline
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.settings import read_mapping
from slimepo.words import first_line

if TYPE_CHECKING:
    from rich.console import Console

# In a stage's folder: where its model has been pushed to.
PUSHED = "pushed.json"


def check_push(name: str, *, public: bool = False) -> None:
    """Refuse a push that could not succeed, before anything is trained for it. Sends no model.

    Raises:
        InputError: `name` is no owner/name, the Hub cannot be reached, no token lets its owner in, or the repository
            is there already and shows itself to others than is asked for.
    """
    try:
        if name.count("/") != 1:
            raise HFValidationError("it has to be owner/name")
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"push_to_hub: {name!r} is no name of a repository: {first_line(error)}") from error
    if get_token() is None:
        raise InputError(
            "push_to_hub: there is no token of the Hugging Face Hub: set HF_TOKEN, or `hf auth login`"
        )
    if offline():
        raise InputError(f"push_to_hub: {name}: the Hugging Face Hub cannot be reached")
    owner = name.partition("/")[0]
    try:
        who = HfApi().whoami()
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"push_to_hub: {name}: {first_line(error)}") from error
    owners = [who["name"], *(each["name"] for each in who.get("orgs", []))]
    if owner not in owners:
        raise InputError(f"push_to_hub: {name}: the token is one of {', '.join(owners)}, not of {owner}")
    with suppress(RepositoryNotFoundError):
        _refuse_other_visibility(name, public)


def _refuse_other_visibility(name: str, public: bool) -> None:
    try:
        private = HfApi().repo_info(name).private
    except RepositoryNotFoundError:
        raise
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"push_to_hub: {name}: {first_line(error)}") from error
    if not public and not private:
        raise InputError(f"push_to_hub: {name} is there and public: give another name, or say --public")
    if public and private:
        raise InputError(
            f"push_to_hub: {name} is there and private: make it public in its settings on the Hub, or leave --public "
            "out"
        )


def push_model(folder: Path, name: str, *, public: bool = False) -> str:
    """Send a model folder to the Hub, its README.md as the card; makes the repository where there is none.

    Returns its address.

    Raises:
        InputError: the Hub refuses, or the repository is there already and shows itself to others than is asked for.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(name, private=not public, exist_ok=True))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"push_to_hub: {name}: {first_line(error)}") from error
    _refuse_other_visibility(name, public)
    try:
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload of slimepo")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise InputError(f"push_to_hub: {name}: {first_line(error)}") from error
    return address


def check_push_of(recipe: Recipe, out: Path) -> None:
    """`check_push` for a run that is to be pushed and has not been. Raises InputError."""
    if recipe.push_to_hub is None or recipe.smoke or not is_main_process():
        return
    if read_json(out / recipe.stages[-1].name / PUSHED) is None:
        check_push(recipe.path(recipe.push_to_hub))


def push_run(recipe: Recipe, out: Path, console: Console) -> list[Exception]:
    """Push the model of a run's last stage where the recipe asks for it and it is done.

    What goes wrong is said and returned: the model is there, and the same command tries again.
    """
    stage = out / recipe.stages[-1].name
    if recipe.push_to_hub is None or not is_main_process() or not (stage / "stage.json").exists():
        return []
    name = recipe.path(recipe.push_to_hub)
    if recipe.smoke:
        console.print(f"{stage.name}: not pushed to {name}, for this is a smoke run")
        return []
    before = read_json(stage / PUSHED)
    if before is not None and before["name"] == name:
        console.print(f"{stage.name}: pushed before, {before['address']}")
        return []
    try:
        address = push_model(stage / "model", name)
    except InputError as error:
        console.print(f"{stage.name}: {error}", style="red")
        return [error]
    write_json(stage / PUSHED, {"name": name, "address": address})
    console.print(f"{stage.name}: pushed to {address}")
    return []


def model_of(source: Path) -> Path:
    """The model folder that is meant by a run (its last stage that is done), a stage, or a model folder.

    Raises:
        InputError: there is no exported model.
    """
    if (source / "recipe.yaml").is_file():
        names = [str(stage.get("name")) for stage in read_mapping(source / "recipe.yaml", "recipe")["stages"]]
        done = [source / name for name in names if (source / name / "stage.json").exists()]
        source = done[-1] if done else source
    for folder in (source / "model", source):
        if (folder / "config.json").is_file():
            return folder
    raise InputError(
        f"{source}: no exported model there (config.json); give a run, a stage, or what slimepo export wrote"
    )
