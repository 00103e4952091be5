"""The run folder: plain files that a reader, the report and a resumed run find by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimepo.checkpoints.identity import refuse_differences, source_digest
from slimepo.errors import DONE, PREEMPTED, BadFilesError, InputError, failure, unwritable
from slimepo.evaluation.settings import JUDGE_CALLS, LOCKS
from slimepo.files import MARKER, is_main_process, read_json, refuse_read_only, write_json, write_text
from slimepo.imports import find_function
from slimepo.losses import find_objective, hyperparameters
from slimepo.monitor.settings import monitor_settings
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.redaction import redact, redacted
from slimepo.settings import flat, read_mapping
from slimepo.versions import versions

if TYPE_CHECKING:
    from rich.console import Console

LOCK = ".lock"
# How the run stands: running, done, failed or preempted, with the exit code and the words of its end.
STATUS = "status.json"
# In the folder of a stage, or of pairs: what it is made from.
SETTINGS = "settings.json"
# Keys of a stage that are about time, memory and looking: its model is the same but for the last digits.
_NO_CHANGE = ("save_every", "micro_batch_size", "activation_checkpointing", "answer_every")
# Arguments that say how a stage is told of, stored or sent on, and change nothing of it.
_TELLS_ONLY = (
    "logging_", "log_level", "log_on", "report_to", "run_name", "project", "trackio_", "save_", "push_to_hub", "hub_",
    "disable_tqdm", "certificate",
)  # fmt: skip
# Keys that earlier versions did not have, with what stands for that: left out, so that runs of these can go on.
_SINCE = {"grammar": None, "repair": None, "cost": None, "keep": 2, "most": None, "dtype": "auto"}
# Keys of the recipe that say how a model trains, not what it is.
_OF_TRAINING = ("adapter", "dtype", "quantize")
# package.module:function or file.py:function
_FUNCTION = re.compile(r"[^\s:]*(\.py|\.\w+|^\w+):[A-Za-z_]\w*")
# What a run goes on from: stages that are done, checkpoints, samples for pairs.
_BEGUN = ("*/stage.json", "*/checkpoints/checkpoint-[0-9]*", "*/samples-*.jsonl", "*/pairs.json")
# Inside the run folder; what `slimepo eval --out` would be given.
EVAL_FOLDER = "eval"


def is_held(out: Path) -> bool:
    """Whether a process is at work in a run folder; taken for granted where locks tell nothing."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(out / LOCK, timeout=0):
            return False
    except (Timeout, NotImplementedError, OSError):
        return True


def refuse_other_folder(out: Path) -> None:
    """Nothing, where a folder is new, empty, or a run of slimepo.

    Raises:
        InputError: it is a file, or holds something else.
    """
    file = next((path for path in (out, *out.parents) if path.is_file()), None)
    if file is not None:
        raise InputError(f"--out {out}: {file} is a file; give a folder")
    refuse_read_only(out)
    # A kill may leave the lock, or half a file that was to be put in place, where nothing else is yet.
    others = [path for path in out.glob("*") if not path.name.endswith((LOCK, ".part"))]
    if others and not (out / MARKER).exists():
        raise InputError(f"{out} is not empty and no run of slimepo; give another --out")


@contextmanager
def held(out: Path, console: Console) -> Iterator[None]:
    """Hold a run folder for this process (rank 0 of several) alone.

    The lock is the operating system's, and ends with its process, also after `kill -9`.

    Raises:
        InputError: another process is at work in it, it cannot be written, or is no run of slimepo.
    """
    if not is_main_process():
        yield
        return
    refuse_other_folder(out)
    from filelock import FileLock, Timeout

    lock = FileLock(out / LOCK)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"{out}: another process is at work in this run folder; wait until it is done, or give another --out"
        ) from None
    except NotImplementedError:
        console.print(f"note: {out} is on a file system without locks; start no second process on it")
    except OSError as error:
        raise unwritable(f"--out {out}", error) from error
    try:
        yield
    finally:
        lock.release()
        if all(path.name == LOCK for path in out.iterdir()):
            # Wrong input was found before anything was put there.
            (out / LOCK).unlink(missing_ok=True)
            out.rmdir()


def check_folder(recipe: Recipe, out: Path, restart: bool, accept: Collection[str] = ()) -> None:
    """Refuse a folder in which something else has been done; with `restart`, clear this run's stages away.

    What has been begun is compared stage by stage: what does not change a stage that is there may change, and what is
    in `accept` by its name.

    Raises:
        InputError: a stage, or pairs, are there that another recipe made, or the folder is no run.
    """
    if not is_main_process():
        return
    refuse_other_folder(out)
    if not out.exists():
        return
    if restart:
        patterns = (*_BEGUN, "*/checkpoints", f"*/{SETTINGS}")
        for made in {path.parent for pattern in patterns for path in out.glob(pattern)} - {out}:
            shutil.rmtree(made.parent if made.name == "checkpoints" else made, ignore_errors=True)
        for path in (out / EVAL_FOLDER).glob("*"):
            if path.is_file():
                path.unlink()
            elif path.name not in (JUDGE_CALLS, LOCKS):
                # What judges replied stays: it is paid for, and still true.
                shutil.rmtree(path)
        return
    for name in (*(stage.name for stage in recipe.stages), *recipe.pairs):
        if not begun(out / name):
            continue
        old, new = _recorded(out, name), flat(made_from(recipe, name))
        found = {
            key: f"{name}: {key} was {old.get(key)!r}, is now {new.get(key)!r}"
            for key in new | old
            if not _same(old.get(key), new.get(key))
        }
        refuse_differences(
            found, accept, f"{out} holds a run of another recipe",
            f"give another --out, delete {out / name} to make that again, or --restart to throw the whole run away",
        )  # fmt: skip


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are equal, or two ways to name one path."""
    paths = [Path(each) for each in (one, other) if isinstance(each, str) and each]
    return one == other or (
        len(paths) == 2 and all(path.exists() for path in paths) and paths[0].samefile(paths[1])
    )


def _recorded(out: Path, name: str) -> dict[str, Any]:
    """What the stage or pairs in a run folder were made from."""
    try:
        settings = read_json(out / name / SETTINGS)
        if settings is None:
            # A run of an earlier version: its recipe tells.
            settings = made_from(make_recipe(read_mapping(out / "recipe.yaml", "recipe")), name)
        # Earlier versions held these against pairs of the recipe's own model.
        for made in (settings, settings.get("stage", {}).get("pairs", {})):
            if "pairs" in made and "sampled" not in made:
                for key in _OF_TRAINING:
                    made.pop(key, None)
        return flat(settings)
    except (InputError, StopIteration) as error:
        reason = str(error) or f"recipe.yaml does not name {name!r}"
        raise InputError(
            f"{out}: what {name!r} was made from cannot be told ({reason}); give another --out, or --restart"
        ) from error


def made_from(recipe: Recipe, name: str) -> dict[str, Any]:
    """What a stage's model and figures, or the pairs of this name, depend on: plain data, with every default.

    Two recipes for which this is equal make the same of the same files; whatever else they say may differ.
    """
    values = recipe.model_dump(mode="json")
    common = (
        "model",
        "tokenizer",
        "chat_template",
        "template_options",
        "dtype",
        "quantize",
        "adapter",
        "smoke",
        "seed",
        "tasks",
    )
    found: dict[str, Any] = {key: values[key] for key in common}
    found["tasks"] = values["tasks"] and _without_new(values["tasks"])
    if recipe.between_stages != "merge":
        found["between_stages"] = recipe.between_stages
    if name in recipe.pairs:
        asked = values["pairs"][name]
        found |= {"pairs": _without_new(asked)}
        if asked["model"]:
            found |= {"sampled": made_from(recipe, asked["model"])["stage"]}
        else:
            # Samples of the recipe's own model are the same whatever trains on them: all of it, or an adapter.
            found = {key: value for key, value in found.items() if key not in _OF_TRAINING}
    else:
        stage = next(stage for stage in recipe.stages if stage.name == name)
        monitor = monitor_settings(stage.monitor)
        own = stage.model_dump(mode="json", exclude=set(_NO_CHANGE))
        options = hyperparameters(find_objective(stage.loss).function) | own["loss_options"]
        args = {key: value for key, value in own["args"].items() if not key.startswith(_TELLS_ONLY)}
        # Of the monitor only what may end the stage, or cure it, changes it.
        acts = monitor is not None and (monitor.stop_on or monitor.on_unlearning)
        watch = monitor.model_dump(mode="json") if monitor and acts else None
        own |= {"loss_options": options, "args": args, "monitor": watch, "start": recipe.start_of(stage)}
        made = {"pairs": made_from(recipe, stage.part)} if stage.part in recipe.pairs else {}
        before = {}
        for needed in recipe.needs(stage):
            whole = made_from(recipe, needed)
            before[needed] = {key: whole[key] for key in ("stage", "before")}
        found |= {"stage": own | made, "before": before, "export_dtype": values["export_dtype"]}
        found |= {"data": values["data"] | {"parts": recipe.parts}}
    sources = {spec: source for spec in _own_functions(found) if (source := _source(spec))}
    found |= {"sources": sources} if sources else {}
    # As it comes back from its file.
    plain: dict[str, Any] = json.loads(json.dumps(redacted(found), default=str))
    return plain


def _without_new(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in _SINCE or value != _SINCE[key]}


def _own_functions(values: Any) -> list[str]:
    """The paths of a user's functions in what something is made from: losses, rewards and checkers."""
    if isinstance(values, Mapping):
        own = [_own_functions(value) for key, value in values.items()]
        # A reward's weight stands under its name.
        return [*chain(*own), *(key for key in values if _FUNCTION.fullmatch(key))]
    if isinstance(values, list):
        return [*chain(*map(_own_functions, values))]
    if not isinstance(values, str):
        return []
    # A sum of objectives names several.
    return [name for name in map(str.strip, re.split(r"[*+]", values)) if _FUNCTION.fullmatch(name)]


def _source(spec: str) -> str | None:
    try:
        return source_digest(find_function(spec, "function"))
    except InputError:
        # Whoever needs it says what is wrong with it.
        return None


def mark_folder(out: Path) -> None:
    """Say that a folder is a run of slimepo, before anything else is put into it."""
    write_text(out / MARKER, "A run of slimepo; see recipe.yaml.\n")


def claim_folder(
    recipe: Recipe, out: Path, facts: dict[str, Any], console: Console, accept: Collection[str] = ()
) -> None:
    """Write down what runs here: the libraries' versions, the facts of the data and of what makes tokens of it.

    Raises:
        InputError: the run was begun on other data or with another template, so that going on would mix the two; all
            differences that are not in `accept`.
    """
    if not is_main_process():
        return
    names = [name for name in (*(stage.name for stage in recipe.stages), *recipe.pairs) if begun(out / name)]
    going_on = bool(names)
    before = (read_json(out / "data.json") if going_on else None) or facts
    found: dict[str, str] = {}
    used = {"heldout", *(stage.part for stage in recipe.stages if stage.name in names)}
    for key, name, what in (("parts", "data", recipe.data.path), ("tasks", "tasks", "a file of tasks")):
        was, now = before.get(key) or {}, facts.get(key) or {}
        # Of the parts those that something was trained on.
        for part in used if key == "parts" else {*was, *now}:
            one, other = was.get(part) or {}, now.get(part) or {}
            # What an earlier version did not write down cannot be compared.
            differ = {fact for fact in one.keys() & other.keys() if one[fact] != other[fact]}
            if differ == {"order"}:
                found["row_order"] = f"the rows of {part!r} stand in another order than when {out} was begun"
            elif differ or bool(one) != bool(other):
                found[name] = f"{what} has changed since {out} was begun"
    for name, what in (("template", "the chat template is another"), ("tokens", "the tokenizer is another")):
        if before.get(name, facts.get(name)) != facts.get(name):
            found[name] = f"{what} than when {out} was begun"
    refuse_differences(
        found,
        accept,
        f"{out} holds a run on other data",
        "put back what it was, give another --out, or --restart",
    )
    old: dict[str, str] = (read_json(out / "versions.json") if going_on else None) or {}
    new = versions()
    changed = [f"{name} {old[name]} then, {new[name]} now" for name in old if old[name] != new.get(name)]
    if changed:
        console.print(f"note: the run was begun with other versions: {', '.join(changed)}")
    mark_folder(out)
    write_json(out / STATUS, {"status": "running"})
    write_json(out / "versions.json", old or new)
    write_json(out / "data.json", facts)


def record_end(out: Path, error: BaseException | None, results: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write down how a run ended, and with which exit code; where nothing has been claimed nothing is written.

    results: the figures of its stages. Those that the monitor ended, as it was asked to, make the run `stopped`.
    """
    if not is_main_process() or not (out / MARKER).exists():
        return
    code, words = (DONE, None) if error is None else failure(error)
    ended = {each["name"]: (each.get("monitor") or {}).get("stopped") for each in results}
    stopped = {"stopped": found} if (found := {name: why for name, why in ended.items() if why}) else {}
    status = {DONE: "stopped" if stopped else "done", PREEMPTED: "preempted"}.get(code, "failed")
    # A full disk, which may be what ended it, takes no further file.
    with suppress(OSError):
        write_json(
            out / STATUS,
            {"status": status, "code": code, **stopped} | ({"error": redact(words)} if words else {}),
        )


def stage_result(folder: Path) -> dict[str, Any] | None:
    """The figures of a stage that is done; None of one that is not.

    Raises:
        BadFilesError: its file is damaged.
    """
    try:
        result = read_json(folder / "stage.json")
        if result is None or {"name", "steps", "seconds"} <= result.keys():
            return result  # type: ignore[no-any-return]
    except (InputError, AttributeError):
        pass
    raise BadFilesError(f"{folder / 'stage.json'} is damaged; delete {folder} to make that stage again")


def begun(folder: Path) -> bool:
    """Whether the folder of a stage, or of pairs, has something to go on from."""
    return any(any(folder.glob(pattern.removeprefix("*/"))) for pattern in _BEGUN)


def record_settings(recipe: Recipe, out: Path, name: str) -> None:
    """Write down what a stage, or pairs, are made from, before anything is made."""
    if is_main_process():
        write_json(out / name / SETTINGS, made_from(recipe, name))
