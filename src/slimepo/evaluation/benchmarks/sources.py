"""Where the benchmarks' questions, prompts, references and baselines come from: official files, pinned.

Nothing of theirs is part of slimepo. Each file is fetched once from the commit named here, checked, and kept in the
user's cache folder; a data folder with the same layout (plain or .gz) stands in for both where there is no network.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimepo.errors import InputError
from slimepo.files import cache_folder

_GITHUB = "https://raw.githubusercontent.com"
_FASTCHAT = f"{_GITHUB}/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d/fastchat/llm_judge/data"
_SIMPO = f"{_GITHUB}/princeton-nlp/SimPO/1b3e8f3528a23bce3da514a2dce8ea7490d4bc75/eval"
_ARENA = f"{_GITHUB}/lmarena/arena-hard-auto/196f6b826783b3da7310e361a805fa36f0be83f3"
_ALPACA = f"{_GITHUB}/tatsu-lab/alpaca_eval/cd543a149df89434d8a54582c0151c0b945c3d20"
_ALPACA_HUB = (
    "https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/2edc6fad8be6b14ea7230aabfd08188da6b8b814"
)
_GOOGLE = f"{_GITHUB}/google-research/google-research/8dadc6c56e2c2e51a9dd7e0d4bf2840922b4b6c0"
_TIMEOUT_S = 60

Check = Literal["checked", "git id", "reported", "derived"]


@dataclass(frozen=True)
class Source:
    """One file: its place in a data folder and in the cache, its address, and what its content must hash to.

    `check` says how the hash is known. checked: computed from the repository's own file at the commit in `url`.
    git id: the commit's id of the file (`digest` is git's SHA-1 of it); the content was not at hand. reported: other
    projects publish this SHA-256 for this revision; the content was not at hand. derived: not a file of the upstream
    repository but made from its published files; only a data folder has it, so `url` is empty. `also` is the SHA-256 of
    the same rows in another order, where the order does not matter.
    """

    path: str
    url: str
    digest: str
    check: Check = "checked"
    also: str = ""


@dataclass(frozen=True)
class Fetched:
    """A checked file on this machine (plain or .gz), the SHA-256 of its content and how that was vouched for."""

    path: str
    file: Path
    sha256: str
    check: Check


# fmt: off
_SOURCES = [
    Source("ifeval/input_data.jsonl", f"{_GOOGLE}/instruction_following_eval/data/input_data.jsonl",
           "67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
           also="10b1382e0f61e429eca07607bd5757a6e5e72dee7d70b9c1e0fbfe453889e198"),
    Source("mt_bench/question.jsonl", f"{_FASTCHAT}/mt_bench/question.jsonl",
           "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"),
    Source("mt_bench/judge_prompts.jsonl", f"{_FASTCHAT}/judge_prompts.jsonl",
           "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6"),
    Source("mt_bench/reference_answer/gpt-4.jsonl", f"{_FASTCHAT}/mt_bench/reference_answer/gpt-4.jsonl",
           "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f"),
    Source("mt_bench/reference_answer/gpt-4-1106-preview.jsonl", f"{_SIMPO}/mt-bench/gpt-4-1106-preview.jsonl",
           "fe030678a33dbbd3d729e7569375150b8830a53f5b11f820a75b630db317f56f"),
    Source("arena_hard/v0.1/question.jsonl", f"{_ARENA}/data/arena-hard-v0.1/question.jsonl",
           "2650242d2883f22b2abd498f273b6a7e02253cce533f5c91a858e1d44aa3002f"),
    Source("arena_hard/v0.1/answer.gpt-4-0314.jsonl", f"{_ARENA}/data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl",
           "0f6abc84de4600fde987d9db70f838f4ecdbd27a2f1f4058c12aa322a6f791b2"),
    Source("arena_hard/v2.0/question.jsonl", f"{_ARENA}/data/arena-hard-v2.0/question.jsonl",
           "a75cef6623db6b27aec810497b059f0659705d7ff48dcbccc5bd5b130728ac73"),
    Source("arena_hard/v2.0/answer.o3-mini-2025-01-31.jsonl",
           f"{_ARENA}/data/arena-hard-v2.0/model_answer/o3-mini-2025-01-31.jsonl",
           "c23a7c255eead99f7f86ad48aa1d8ccdb5b3334f2097e0e1e09184df87265e03"),
    Source("arena_hard/v2.0/answer.gemini-2.0-flash-001.jsonl",
           f"{_ARENA}/data/arena-hard-v2.0/model_answer/gemini-2.0-flash-001.jsonl",
           "75513a4feb8e2f642a9bdb952d1c3ed245b9c952", "git id"),
    Source("arena_hard/config/arena-hard-v0.1.yaml", f"{_ARENA}/config/arena-hard-v0.1.yaml",
           "87ac45a188421218349697b5eda95cc77f6e60b6f61495d67d8cfebba3210528"),
    Source("arena_hard/config/arena-hard-v2.0.yaml", f"{_ARENA}/config/arena-hard-v2.0.yaml",
           "ee68e5c6ac98a79720bf11014fc3f7fc3c3e5899153b3b08efe3db0e174215a0"),
    Source("arena_hard/config/judge_utils.py", f"{_ARENA}/utils/judge_utils.py",
           "cbb093f4fc27408d8447e946392f26f98538b1e3950f574aca91a0f7595167b4"),
    Source("arena_hard/config/judge_settings.json", "",
           "b66f754e88b34cfae0bfa226b19a2f3d19252879393947525effc26d2795d8b2", "derived"),
    Source("alpaca_eval/baseline_gpt4_1106_preview.model_outputs.json",
           f"{_ALPACA}/results/gpt4_1106_preview/model_outputs.json",
           "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4"),
    Source("alpaca_eval/alpaca_eval_clf.txt",
           f"{_ALPACA}/src/alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt",
           "784227e6dc2832fc08c43d2c8ea3a308e7523780187a1aaad2f85e30bac85f62"),
    Source("alpaca_eval/df_gamed.csv", f"{_ALPACA_HUB}/df_gamed.csv",
           "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d", "reported"),
    Source("alpaca_eval/df_gamed_surrogate.csv", "",
           "050afb459bbe77576c30f5082ab7a4f338cface3c8a759222cac784d3818ae72", "derived"),
]
# fmt: on
SOURCES = {source.path: source for source in _SOURCES}


def fetch(*paths: str, data_dir: Path | str | None = None) -> Fetched:
    """The first of `paths` (keys of SOURCES that may stand for each other) that can be had, checked.

    From `data_dir` where it is given, and then from nowhere else; else from the cache or the source's address.

    Raises:
        InputError: the content has another hash than the pinned one (with the file's name), or there is no content.
    """
    folder = Path(data_dir) if data_dir is not None else cache_folder("eval")
    for path in paths:
        file, content = _read(folder / path)
        if file is not None:
            return _checked(SOURCES[path], content, file, str(file))
    if data_dir is not None and not folder.is_dir():
        raise InputError(f"--data-dir {data_dir}: no such folder")
    if data_dir is not None:
        raise InputError(
            f"--data-dir {data_dir}: no {' or '.join(paths)} in it (plain or .gz); "
            f"it can be had from {_addresses(paths)}"
        )
    source = next((SOURCES[path] for path in paths if SOURCES[path].url), None)
    if source is None:
        raise InputError(
            f"{' or '.join(paths)} is in no repository; give a folder that has it with --data-dir"
        )
    try:
        with urllib.request.urlopen(source.url, timeout=_TIMEOUT_S) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"{source.path} cannot be fetched from {source.url} ({reason}); give a folder that has it with --data-dir"
        ) from error
    fetched = _checked(source, content, folder / source.path, source.url)
    fetched.file.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two runs may fetch the same file at once.
    temporary = fetched.file.with_name(f"{fetched.file.name}.{os.getpid()}.part")
    temporary.write_bytes(content)
    os.replace(temporary, fetched.file)
    return fetched


def git_blob_id(content: bytes) -> str:
    """The id that git gives to a file of this content: SHA-1 over a header with its length and the content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _read(path: Path) -> tuple[Path | None, bytes]:
    if not path.is_file():
        path = path.with_name(path.name + ".gz")
    if not path.is_file():
        return None, b""
    try:
        content = path.read_bytes()
        return path, gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _checked(source: Source, content: bytes, file: Path, place: str) -> Fetched:
    sha256 = hashlib.sha256(content).hexdigest()
    found = git_blob_id(content) if source.check == "git id" else sha256
    if found not in (source.digest, source.also):
        raise InputError(
            f"{place}: not the pinned file ({source.check} {source.digest[:12]}…, found {found[:12]}…); delete it, or "
            f"put the file of {_addresses([source.path])} there"
        )
    return Fetched(source.path, file, sha256, source.check)


def _addresses(paths: tuple[str, ...] | list[str]) -> str:
    return " or ".join(SOURCES[path].url for path in paths if SOURCES[path].url) or "nowhere public"
