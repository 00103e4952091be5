"""Official files: from the data folder, the cache or their address, and only with the pinned content."""

import gzip
import hashlib
import http.client
import io
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from slimepo.errors import InputError
from slimepo.evaluation.benchmarks.sources import SOURCES, Source, fetch, git_blob_id
from slimepo.files import cache_folder

QUESTIONS = "mt_bench/question.jsonl"
CONTENT = b'{"question_id": 1}\n'


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One made-up source, a cache of its own, and no network; returns the cache."""
    source = Source(QUESTIONS, "https://example.org/q.jsonl", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(SOURCES, QUESTIONS, source)
    monkeypatch.setenv("SLIMEPO_CACHE", str(tmp_path / "cache"))

    def no_network(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return tmp_path / "cache" / "eval"


def test_every_official_file_at_hand_has_the_pinned_hash(official_data: Path) -> None:
    at_hand = [path for path in SOURCES if _there(official_data / "eval" / path)]
    assert len(at_hand) >= 15
    for path in at_hand:
        found = fetch(path, data_dir=official_data / "eval").sha256
        assert found in (SOURCES[path].digest, SOURCES[path].also)


def _there(path: Path) -> bool:
    return path.exists() or path.with_name(path.name + ".gz").exists()


def test_every_address_names_a_commit() -> None:
    for source in SOURCES.values():
        assert source.check == "derived" or any(len(part) == 40 for part in source.url.split("/")), source


def test_a_wrong_hash_stops_with_the_files_name(pinned: Path, tmp_path: Path) -> None:
    path = tmp_path / "data" / QUESTIONS
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT + b" ")
    with pytest.raises(InputError, match=r"question\.jsonl: not the pinned file"):
        fetch(QUESTIONS, data_dir=tmp_path / "data")
    path.write_bytes(CONTENT)
    assert fetch(QUESTIONS, data_dir=tmp_path / "data").file == path


def test_gzip_is_hashed_unpacked(pinned: Path, tmp_path: Path) -> None:
    path = tmp_path / "data" / (QUESTIONS + ".gz")
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(CONTENT))
    assert fetch(QUESTIONS, data_dir=tmp_path / "data").file == path


def test_a_data_folder_is_the_only_place_that_is_looked_at(pinned: Path, tmp_path: Path) -> None:
    (pinned / "mt_bench").mkdir(parents=True)
    (pinned / QUESTIONS).write_bytes(CONTENT)
    with pytest.raises(InputError, match=r"no mt_bench/question.jsonl in it .* https://example.org/q.jsonl"):
        fetch(QUESTIONS, data_dir=tmp_path)


def test_fetched_once_then_from_the_cache(pinned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"cannot be fetched .*no network here.*--data-dir"):
        fetch(QUESTIONS)
    asked = []

    def answer(url: str, **_: Any) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(CONTENT)

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert fetch(QUESTIONS).file.read_bytes() == CONTENT
    assert fetch(QUESTIONS).file == pinned / QUESTIONS
    assert asked == ["https://example.org/q.jsonl"]


def test_a_wrong_download_is_not_kept(pinned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>sorry</html>"))
    with pytest.raises(InputError, match=r"https://example\.org/q\.jsonl: not the pinned file"):
        fetch(QUESTIONS)
    assert not any(path.is_file() for path in pinned.rglob("*"))


def test_a_file_pinned_by_gits_own_id(pinned: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    git = shutil.which("git")
    if git:
        known = subprocess.run(
            [git, "hash-object", "--stdin"], input=CONTENT, capture_output=True
        ).stdout.decode()
        assert git_blob_id(CONTENT) == known.strip()
    source = Source(QUESTIONS, "https://example.org/q.jsonl", git_blob_id(CONTENT), "git id")
    monkeypatch.setitem(SOURCES, QUESTIONS, source)
    path = tmp_path / QUESTIONS
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    fetched = fetch(QUESTIONS, data_dir=tmp_path)
    assert (fetched.check, fetched.sha256) == ("git id", hashlib.sha256(CONTENT).hexdigest())
    path.write_bytes(CONTENT + b"x")
    with pytest.raises(InputError, match="not the pinned file"):
        fetch(QUESTIONS, data_dir=tmp_path)


def test_where_files_may_stand_for_each_other_the_first_that_is_there_is_taken(data_dir: Path) -> None:
    names = ("alpaca_eval/df_gamed.csv", "alpaca_eval/df_gamed_surrogate.csv")
    assert fetch(*names, data_dir=data_dir).check == "derived"


def test_what_no_repository_has_is_asked_for(pinned: Path) -> None:
    with pytest.raises(InputError, match="is in no repository"):
        fetch("alpaca_eval/df_gamed_surrogate.csv")
    assert cache_folder("eval") == pinned


def test_a_broken_packed_file_is_named(pinned: Path, tmp_path: Path) -> None:
    path = tmp_path / "data" / (QUESTIONS + ".gz")
    path.parent.mkdir(parents=True)
    content = bytearray(gzip.compress(CONTENT))
    content[10:14] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"question\.jsonl\.gz cannot be read"):
        fetch(QUESTIONS, data_dir=tmp_path / "data")


def test_a_download_that_breaks_off_is_one_line(pinned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Broken())
    with pytest.raises(InputError, match="cannot be fetched from"):
        fetch(QUESTIONS)
    assert not (pinned / QUESTIONS).exists()
