"""The tables of docs/trl.md, from the code and the installed TRL: `python -m tests.training.trl_tables` writes them."""

import dataclasses
import inspect
import os
import re
from pathlib import Path
from typing import Any

from slimepo.losses import LOSSES, hyperparameters
from slimepo.training.config import PreferenceConfig
from slimepo.training.trl_names import LOSS_TYPES, TRL_ARGUMENTS, TRL_NAMES

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"
# What a default is on a machine rather than in the class, or for transformers' own use.
_NO_DEFAULT = {
    "bf16",
    "logging_nan_inf_filter",
    "remove_unused_columns",
    "activation_checkpointing",
    "output_dir",
}


def trl_configs() -> dict[str, Any]:
    """TRL's config classes, by the objective that they are for."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl import DPOConfig, KTOConfig, SFTConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig
    from trl.experimental.tpo import TPOConfig

    return {
        "dpo": DPOConfig, "kto": KTOConfig, "cpo": CPOConfig, "orpo": ORPOConfig, "tpo": TPOConfig, "sft": SFTConfig,
    }  # fmt: skip


def defaults(config: Any) -> dict[str, Any]:
    missing = dataclasses.MISSING
    return {
        field.name: field.default if field.default is not missing else field.default_factory()
        for field in dataclasses.fields(config)
        if field.default is not missing or field.default_factory is not missing
    }


def names() -> str:
    """What each name of TRL's configs stands for."""
    rows = []
    for name, meant in TRL_NAMES.items():
        stands = [f"`{meant.ours}`"] if meant.ours else []
        stands += [
            f"`{value!r}`: {', '.join(f'`{k}: {to!r}`' for k, to in settings.items()) or 'as it is anyway'}"
            for value, settings in meant.values.items()
        ]
        if name == "loss_type":
            stands = ["`loss`, by the table below"]
        elif name == "beta":
            stands = ["`loss_options.beta`; `loss_options.tau` of `ipo`"]
        elif not meant.ours and meant.instead:
            stands.append(f"{'else ' if stands else ''}refused: {meant.instead}")
        rows.append(f"| `{name}` | {'; '.join(stands)} |")
    rows += [
        f"| `{name}`, an argument of a trainer | refused: {instead} |"
        for name, instead in TRL_ARGUMENTS.items()
    ]
    return "\n".join(["| TRL | here |", "|---|---|", *rows])


def variants() -> str:
    """The objective of each variant of TRL's losses."""
    rows = [
        f"| `{loss}` | `{kind}` | `{ours}`{''.join(f', `{k}: {v}`' for k, v in options.items())} |"
        for loss, kinds in LOSS_TYPES.items()
        for kind, (ours, options) in kinds.items()
    ]
    return "\n".join(["| `loss` | `loss_type` | here |", "|---|---|---|", *rows])


def differing_defaults() -> str:
    """Settings and hyperparameters of the same name whose default is another one in TRL."""
    ours, rows = defaults(PreferenceConfig), []
    theirs = {loss: defaults(kind) for loss, kind in trl_configs().items()}
    for name in sorted(ours.keys() - TRL_NAMES.keys() - _NO_DEFAULT):
        found: dict[str, list[str]] = {}
        for loss, values in theirs.items():
            if name in values and values[name] != ours[name]:
                found.setdefault(repr(values[name]), []).append(loss)
        told = "; ".join(f"{value} ({', '.join(losses)})" for value, losses in found.items())
        if told and name != "model_init_kwargs":
            rows.append(
                f"| `{name}` | {ours[name]!r} | {told.replace(' (dpo, kto, cpo, orpo, tpo, sft)', '')} |"
            )
    for loss, values in theirs.items():
        options = hyperparameters(LOSSES[loss].function)
        for name, meant in TRL_NAMES.items():
            option = meant.ours.removeprefix("loss_options.")
            if option in options and name in values and values[name] != options[option]:
                rows.append(f"| `{option}` of `{loss}` | {options[option]!r} | {values[name]!r} |")
    return "\n".join(["| setting | here | TRL |", "|---|---|---|", *rows])


def written(page: str) -> str:
    """The page with its tables as they are now."""
    for table in (names, variants, differing_defaults):
        assert inspect.getdoc(table)
        mark = table.__name__
        page = re.sub(
            rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)",
            lambda found, table=table: f"{found[1]}{table()}\n{found[2]}",
            page,
            flags=re.DOTALL,
        )
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
