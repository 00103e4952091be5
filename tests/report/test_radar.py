"""The radar plot: a line a model in its run's colour, its figures as text too, and nothing made up."""

import re
from pathlib import Path

import pytest

from slimepo.report.benchmarks import ScoreColumn, score_columns
from slimepo.report.figures import COLOURS, styles
from slimepo.report.page import read_report, report_page
from slimepo.report.radar import model_styles, radar_panels
from tests.report.conftest import mt_bench_row, write_json, write_run


def column_of(folder: Path, *models: str, most: int = 8) -> ScoreColumn:
    for at, model in enumerate(models):
        row = mt_bench_row(model, at / 10, most=most)
        write_json(folder / "eval" / "scores" / f"{at:02}.json", {"scores": [row]})
    (column,) = score_columns(read_report([folder / "eval"]).sources)
    return column


def test_a_model_has_the_colour_of_its_run(tmp_path: Path) -> None:
    groups = read_report(
        [
            write_run(tmp_path / "mine", "slime"),
            *(write_run(tmp_path / f"theirs-s{seed}", "dpo", seed=seed) for seed in (0, 1)),
        ]
    ).groups
    look = model_styles(column_of(tmp_path, "gpt-4", "theirs-s0-dpo", "mine-slime", "theirs-s1-dpo"), groups)
    mine, theirs = (styles(groups)[group.label] for group in groups)
    assert (look["mine-slime"], look["theirs-s0-dpo"]) == (mine, theirs)
    # Seeds share the colour, not the line; who has no run here has a colour of its own.
    assert look["theirs-s1-dpo"].colour == theirs.colour
    assert look["theirs-s1-dpo"].line != theirs.line
    assert look["gpt-4"].colour not in (mine.colour, theirs.colour)


@pytest.mark.parametrize("number", [2, 13])
def test_every_model_is_told_apart_and_drawn_once(tmp_path: Path, number: int) -> None:
    names = [f"model {at}" for at in range(number)]
    column = column_of(tmp_path, *names)
    look = model_styles(column, [])
    assert len({(style.colour, str(style.line), style.marker) for style in look.values()}) == number
    panels = radar_panels(column, "MT-Bench", look)
    assert [len(re.findall(r"model \d+: writing", panel.svg)) for panel in panels] == (
        [2] if number == 2 else [5, 5, 3]
    )


def test_the_picture_tells_its_figures_and_names_every_category(tmp_path: Path) -> None:
    column = column_of(tmp_path, "ours")
    (panel,) = radar_panels(column, "MT-Bench", model_styles(column, []))
    label = re.search(r'aria-label="([^"]*)"', panel.svg)
    assert label
    assert "ours: writing 3.00, roleplay 3.50, reasoning 4.00" in label.group(1)
    assert all(f">{name}</text>" in panel.svg for name in ("writing", "extraction", "humanities"))
    # The page's own colours, whatever its scheme.
    assert "var(--c0)" in panel.svg
    assert not any(colour in panel.svg for colour in COLOURS)


def test_two_categories_are_no_radar(tmp_path: Path) -> None:
    column = column_of(tmp_path, "ours", most=2)
    assert radar_panels(column, "MT-Bench", model_styles(column, [])) == []
    page = report_page(read_report([tmp_path / "eval"]))
    assert "MT-Bench by category" in page
    assert "radar" not in page
