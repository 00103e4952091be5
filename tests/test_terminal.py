"""How far work before training is: a bar in a terminal, now and then a line elsewhere."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from slimepo import terminal as progress
from slimepo.terminal import counted, make_console
from slimepo.training.callbacks import TrainingProgress
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import random_rows, tiny_model


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return make_console(file=file, force_terminal=terminal, width=100, color_system=None), file


def count_to_four(shown: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows, one in six seconds."""
    clock = iter(range(0, 60, 6))
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    with counted(shown, "dpo: reference log-probs") as report:
        for done in range(1, 5):
            report(done * 1000, 4000)


def test_elsewhere_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, file = console(terminal=False)
    count_to_four(shown, monkeypatch)
    assert file.getvalue().splitlines() == [
        "dpo: reference log-probs: 2,000/4,000",
        "dpo: reference log-probs: 4,000/4,000",
    ]


def test_in_a_terminal_a_bar_that_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, file = console(terminal=True)
    with counted(shown, "dpo: reference log-probs") as report:
        report(3, 4)
    assert "3/4" in file.getvalue()
    assert file.getvalue().endswith("\x1b[2K")


@pytest.mark.parametrize("terminal", [False, True])
def test_the_reference_is_counted_and_its_source_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("SLIMEPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(progress, "EVERY", 0.0)
    texts = []
    for _ in range(2):
        shown, file = console(terminal)
        PreferenceTrainer(
            model=tiny_model(),
            args=PreferenceConfig(
                output_dir=str(tmp_path), loss="dpo", per_device_train_batch_size=2, disable_tqdm=True
            ),
            train_dataset=random_rows(6),
            callbacks=[TrainingProgress(shown, "dpo")],
        )
        texts.append(file.getvalue())
    assert "6/6" in texts[0]
    assert "dpo: reference log-probs of 6 rows computed in 0 s" in texts[0]
    assert "dpo: reference log-probs of 6 rows from the cache" in texts[1]


def test_it_prints_no_secrets_on_either_stream(capsys: pytest.CaptureFixture[str]) -> None:
    for errors in (False, True):
        make_console(errors=errors).print("https://me:secret@host/v1")
    shown = capsys.readouterr()
    assert "host/v1" in shown.out
    assert "host/v1" in shown.err
    assert "secret" not in shown.out + shown.err
