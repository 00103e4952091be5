"""Settings from YAML and the command line, checked against a pydantic model, with errors a user can act on."""

from __future__ import annotations

import io
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from slimepo.errors import InputError
from slimepo.files import DEEPEST
from slimepo.redaction import redacted
from slimepo.words import first_line, nearest, nearest_entry

# Characters and values of settings; more than any recipe has.
LONGEST, MOST = 1_000_000, 100_000


class Settings(BaseModel):
    """Base of every group of settings: no unknown keys, no empty words, not changed once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_min_length=1)


S = TypeVar("S", bound=Settings)


def read_mapping(path: str | Path, what: str) -> dict[str, Any]:
    """The keys of a YAML file (YAML 1.2: 2e-4 is a number, yes is a word).

    Raises:
        InputError: the file is absent, not YAML, or no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = nearest_entry(Path(path)) if isinstance(error, FileNotFoundError) else ""
        raise InputError(f"{what} {path}: {getattr(error, 'strerror', None) or error}{hint}") from error
    values = _yaml(text, f"{what} {path}")
    if not isinstance(values, dict):
        raise InputError(f"{what} {path}: it must be a mapping of keys")
    return values


def parse_value(text: str) -> Any:
    """A value given on the command line, read as YAML."""
    try:
        return _yaml(text, f"value {text!r}") if text.strip() else ""
    except InputError as error:
        if any(text.count(start) > text.count(end) for start, end in ("{}", "[]")):
            raise InputError(
                f"{error}; quote the whole argument in the shell, which splits at spaces"
            ) from error
        raise


def set_key(values: dict[str, Any], override: str) -> None:
    """Set one `key.of.a.part=value`, the value read as YAML.

    Raises:
        InputError: not key=value, or no such entry of a list.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"{override!r} is not key=value (for example stages.slime.learning_rate=1e-6)")
    set_value(values, key, parse_value(text))


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of one `key.of.a.part`; entries of a list are found by their name or loss, or by number.

    Raises:
        InputError: there is no such entry.
    """
    *parents, last = key.split(".")
    place: Any = values
    for parent in parents:
        place = _child(place, parent, key)
    if isinstance(place, list):
        raise InputError(f"{key}: name one entry of the list and one of its keys")
    place[last] = value


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `outer.inner`; an empty mapping inside is no setting."""
    if not isinstance(value, Mapping):
        return {prefix.removesuffix("."): value}
    return {
        key: item for name, inner in value.items() for key, item in flat(inner, f"{prefix}{name}.").items()
    }


def validate(model: type[S], values: Mapping[str, Any], place: str) -> S:
    """`values` as a checked `model`; the first thing wrong becomes one line that starts with `place`.

    Raises:
        InputError: with the nearest valid key where one is misspelt.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(f"{place}: {_explain(model, error, values)}") from error


def dump(settings: Settings) -> str:
    """The settings with every default written out, as YAML, without secrets."""
    buffer = io.StringIO()
    YAML(typ="safe", pure=True).dump(redacted(settings.model_dump()), buffer)
    return buffer.getvalue()


def _child(place: Any, name: str, key: str) -> Any:
    """What is under `name`; a plain value there becomes a mapping."""
    if isinstance(place, list):
        names = _names(place)
        if name in names:
            return place[names.index(name)]
        if name.isdigit() and int(name) < len(place):
            return place[int(name)]
        raise InputError(
            f"{key}: there is no {name!r}; there are: {', '.join(map(str, filter(None, names)))}"
        )
    if not isinstance(place.get(name), (dict, list)):
        place[name] = {}
    return place[name]


def _yaml(text: str, place: str) -> Any:
    if len(text) > LONGEST:
        raise InputError(f"{place}: {len(text):,} characters are no settings; {LONGEST:,} are the most")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except RecursionError as error:
        raise InputError(f"{place}: nested too deeply") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(
            f"{place}:{where} is not YAML: {getattr(error, 'problem', None) or error}"
        ) from error
    except Exception as error:
        # A date of a 13th month, a number of 5,000 digits, a key that is a list.
        raise InputError(f"{place}: is not YAML: {first_line(error)}") from error
    _refuse_boundless(value, place)
    return value


def _refuse_boundless(value: Any, place: str) -> None:
    """Refuse values that a few words of YAML blow up: aliases of aliases, or of what they stand in.

    Raises:
        InputError: more than MOST values, deeper than DEEPEST, or a whole number beyond 64 bits.
    """
    count, left = 0, [(value, 0)]
    while left:
        each, deep = left.pop()
        count += 1
        if count > MOST or deep > DEEPEST:
            what = (
                f"nested more than {DEEPEST} levels deep" if deep > DEEPEST else f"more than {MOST:,} values"
            )
            raise InputError(f"{place}: {what}; settings have less (does an alias stand in itself?)")
        if isinstance(each, int) and abs(each) >= 2**63:
            raise InputError(f"{place}: a whole number of {each.bit_length()} bits; 63 are the most")
        if isinstance(each, Mapping):
            left += [(item, deep + 1) for item in each.values()]
        elif isinstance(each, list | tuple | set):
            left += [(item, deep + 1) for item in each]


def _explain(model: type[BaseModel], error: ValidationError, values: Mapping[str, Any]) -> str:
    # A union reports every branch; the branch that got furthest is the one that was meant.
    plain = ("extra_forbidden", "string_too_short")
    first = max(error.errors(), key=lambda e: (e["type"] in plain, len(e["loc"])))
    known, words = _walk(model, first["loc"], values)
    where = ".".join(words)
    if first["type"] == "extra_forbidden":
        hint = _deeper(model, words) or nearest(words[-1], known) or f"; known here: {', '.join(known)}"
        return f"unknown key {where!r}{hint}"
    if first["type"] == "missing":
        return f"{where} is missing: give {where}=VALUE, or the key in the file"
    if first["type"] == "string_too_short":
        return f"{where.removesuffix('.constrained-str')} is empty: give a value, or leave it out"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _deeper(model: type[BaseModel], words: Sequence[str]) -> str:
    """Where a key is known that stands at the top, if that is one level deeper."""
    places = []
    for name, field in model.model_fields.items() if len(words) == 1 else ():
        inner = _model_in(field.annotation)
        if inner is not None and words[0] in inner.model_fields:
            # An entry of a list is called by its name, where it has one.
            kind = typing.get_origin(field.annotation)
            named = kind is dict or "name" in inner.model_fields
            entry = ("NAME." if named else "0.") if kind in (list, dict) else ""
            places.append(f"{name}.{entry}{words[0]}")
    return f": it belongs elsewhere; give {' or '.join(places)}" if places else ""


def _walk(
    model: type[BaseModel], location: tuple[int | str, ...], values: Any
) -> tuple[list[str], list[str]]:
    """The keys known where `location` ends, and its words: those by which `set_value` finds what is there.

    Without the marks of pydantic's unions.
    """
    owner, words = model, []
    for step in location:
        if isinstance(step, str) and step not in owner.model_fields and step != location[-1]:
            continue
        words.append(_called(values, step) if isinstance(step, int) else str(step))
        try:
            values = values[step]
        except (KeyError, IndexError, TypeError):
            values = None
        if isinstance(step, str) and step in owner.model_fields and step != location[-1]:
            owner = _model_in(owner.model_fields[step].annotation) or owner
    return list(owner.model_fields), words


def _names(entries: Sequence[Any]) -> list[Any]:
    """What the entries of a list are called, those that have a name or a loss."""
    return [
        (entry.get("name") or entry.get("loss")) if isinstance(entry, Mapping) else None for entry in entries
    ]


def _called(entries: Any, number: int) -> str:
    """The name of an entry of a list, where no other one has it, else its number."""
    names = _names(entries) if isinstance(entries, list) else []
    name = names[number] if number < len(names) else None
    plain = isinstance(name, str) and "." not in name and names.count(name) == 1
    return str(name) if plain else str(number)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _model_in(part))), None)
