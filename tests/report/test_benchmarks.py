"""Scores on the page: never two judges in one column, MT-Bench by category and as a radar plot, and the canaries."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slimepo.evaluation.benchmarks import ifeval
from slimepo.evaluation.benchmarks.mt_bench import CATEGORIES
from slimepo.report.benchmarks import (
    ScoreColumn,
    benchmark_table,
    benchmark_verdict,
    canary_table,
    category_tables,
    model_styles,
    paired_tables,
    radar_panels,
    score_columns,
)
from slimepo.report.figures import COLOURS, styles
from slimepo.report.page import read_report, report_markdown, report_page
from slimepo.report.records import Source
from slimepo.report.tables import Table
from tests.report.conftest import CANARIES, mt_bench_row, scores_row, write_evaluation, write_json, write_run


def sources(*folders: Path) -> tuple[Source, ...]:
    return read_report(folders).sources


def benchmarks(*folders: Path) -> tuple[Table, list[str]]:
    return benchmark_table(score_columns(sources(*folders)))


def write_scores(folder: Path, *rows: dict[str, Any], **more: Any) -> Path:
    for at, row in enumerate(rows):
        write_json(folder / "scores" / f"{at}.json", {"scores": [row], **more})
    return folder


def test_each_identity_has_a_column_and_each_score_its_interval(tmp_path: Path) -> None:
    table, notes = benchmarks(write_evaluation(tmp_path / "evaluation"))
    assert [line.label for line in table.lines] == ["base", "slime"]
    assert [line.cells for line in table.lines] == [
        ("21.0 [18.8, 22.5]", "–", "5.00", "–"),
        ("34.1 [31.9, 35.6]", "50.0 [47.8, 51.5]", "6.25", "5.00"),
    ]
    assert table.heads[1:] == (
        "Arena-Hard, win_rate (%) a)",
        "Arena-Hard, win_rate (%) b)",
        "MT-Bench, overall (1-10) c)",
        "MT-Bench, overall (1-10) d)",
    )
    assert "judge gpt-4" in notes[0]
    assert "slime: 499 items scored, 1 not" in notes[0]
    assert "judge other" in notes[1]


def test_a_score_without_an_interval_has_its_standard_error(tmp_path: Path) -> None:
    row = scores_row("slime", 7.125)
    row |= {"unit": "1-10", "measures": {"win_rate": {"value": 7.125, "n": 160, "standard_error": 0.15}}}
    row["identity"] |= {"settings": {"category": "hard_prompt"}}
    write_scores(tmp_path / "eval", row)
    # The folder is given twice, by itself and in the other one; its scores stand there once.
    table, _ = benchmarks(tmp_path, tmp_path / "eval")
    assert table.heads == ("model", "Arena-Hard hard_prompt, win_rate (1-10)")
    assert [line.cells for line in table.lines] == [("7.12 ± 0.15",)]


def test_an_unofficial_score_is_marked_and_has_a_column_of_its_own(tmp_path: Path) -> None:
    row = scores_row("slime", 30.0) | {"official": False, "notes": ["the first 20 questions only"]}
    write_scores(tmp_path, row, scores_row("base", 20.0))
    table, notes = benchmarks(tmp_path)
    assert [line.cells for line in table.lines] == [("30.0 [27.8, 31.5] *", "–"), ("–", "20.0 [17.8, 21.5]")]
    assert "* the first 20 questions only" in notes[0]
    assert "30.0 [27.8, 31.5] *" in report_page(read_report([tmp_path]))


def test_a_model_of_two_evaluations_is_told_apart(tmp_path: Path) -> None:
    folders = [
        write_scores(tmp_path / run / "eval", scores_row("ours", value))
        for run, value in (("a", 10.0), ("b", 20.0))
    ]
    table, _ = benchmarks(*folders)
    assert [(line.label, line.cells[0][:4]) for line in table.lines] == [
        ("a/eval: ours", "10.0"),
        ("b/eval: ours", "20.0"),
    ]


def test_one_score_in_two_files_is_one_line_and_two_scores_are_two(tmp_path: Path) -> None:
    row = scores_row("ours", 10.0)
    write_json(tmp_path / "eval" / "scores" / "all.json", {"scores": [row, scores_row("ours", 1.0, "other")]})
    write_json(tmp_path / "eval" / "scores" / "part.json", {"scores": [row]})
    assert [line.label for line in benchmarks(tmp_path)[0].lines] == ["ours"]
    write_json(tmp_path / "eval" / "scores" / "part.json", {"scores": [scores_row("ours", 11.0)]})
    lines = benchmarks(tmp_path)[0].lines
    assert sorted(line.cells[0][:4] for line in lines) == ["10.0", "11.0"]


def test_mt_bench_has_a_table_a_judge_with_every_category(tmp_path: Path) -> None:
    (column, title, table), (_, other, second) = category_tables(
        score_columns(sources(write_evaluation(tmp_path)))
    )
    assert [score.model for score in column.scores] == ["base", "slime"]
    assert table.heads == ("model", *CATEGORIES, "turn 1", "turn 2", "overall")
    assert table.lines[1].cells[0] == "4.25"
    assert table.lines[1].cells[-3:] == ("6.75", "5.75", "6.25")
    assert (title, other) == (
        "MT-Bench by category, judge gpt-4 c)",
        "MT-Bench by category, judge b d)",
    )
    assert [line.label for line in second.lines] == ["slime"]


def test_a_category_without_a_score_is_absent_not_zero(tmp_path: Path) -> None:
    columns = score_columns(
        sources(write_scores(tmp_path, mt_bench_row("a", most=3), mt_bench_row("b", most=2)))
    )
    ((_, _, table),) = category_tables(columns)
    assert table.heads[1:4] == CATEGORIES[:3]
    assert table.lines[1].cells[:3] == ("3.00", "3.50", "–")


def ifeval_row(model: str, verdicts: list[list[int]] | None) -> dict[str, Any]:
    """A score of IFEval with these verdicts in all four figures, or of a version that did not keep them."""
    row = scores_row(model, 50.0) | {"headline": "prompt_strict", "measures": {}}
    row["identity"] = {"benchmark": "ifeval", "judge": "", "rules": "if-verifiable 0.1.2", "settings": {}}
    return row | ({"items": dict.fromkeys(ifeval.FIGURES, verdicts)} if verdicts else {})


@pytest.mark.parametrize("write", [report_page, report_markdown])
def test_ifeval_has_the_differences_to_the_model_named_first(tmp_path: Path, write: Any) -> None:
    run = write_scores(tmp_path / "run", ifeval_row("slime", [[1], [1]]), ifeval_row("old", None))
    before = write_scores(tmp_path / "later-by-name", ifeval_row("start", [[0], [0]]))
    found = sources(before, run)
    ((title, table),) = paired_tables(score_columns(found), found)
    assert title == "IFEval: paired differences to start"
    assert table.heads == (
        "model", "prompt strict", "prompt loose", "instruction strict", "instruction loose",
    )  # fmt: skip
    assert [(line.label, line.cells) for line in table.lines] == [
        ("slime", ("+100.0 [+100.0, +100.0]",) * 4),
        ("old", ("–",) * 4),
    ]
    assert "paired differences to start" in write(read_report([before, run]))
    assert paired_tables(score_columns(sources(before)), []) == [], "a model alone differs from nothing"
    assert benchmark_verdict(score_columns(found), found) == "", "which of them was the start, nobody says"


def test_with_a_run_on_the_page_its_models_are_compared_with_the_one_that_it_started_from(
    tmp_path: Path,
) -> None:
    """Whichever is named first."""
    rows = [ifeval_row("slime", [[1], [0]]), ifeval_row("start", [[0], [0]])]
    found = [
        replace(each, recipe={"model": "models/start"}) for each in sources(write_scores(tmp_path, *rows))
    ]
    columns = score_columns(found)
    ((title, table),) = paired_tables(columns, found)
    assert title == "IFEval: paired differences to start"
    assert [line.label for line in table.lines] == ["slime"]
    assert benchmark_verdict(columns, found).startswith(
        "IFEval, prompts of which every instruction was followed: +50.0 [+0.0, +100.0] points with slime, from "
    )


def test_models_that_answer_alike_do_not_differ(tmp_path: Path) -> None:
    rows = [ifeval_row(model, [[1], [0], [1]]) for model in ("a", "b")]
    ((_, table),) = paired_tables(score_columns(sources(write_scores(tmp_path, *rows))), [])
    assert table.lines[0].cells == ("+0.0 [+0.0, +0.0]",) * 4


def test_canaries_have_a_line_a_judge(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "evaluation")
    won = {name: result | {"unit": "%"} for name, result in CANARIES.items()}
    write_scores(tmp_path / "arena", scores_row("third", 50.0), canaries=won)
    table = canary_table(sources(tmp_path))
    assert table.heads == ("benchmark and judge", *CANARIES, "mixed in with")
    # The second judge had none; of the first one two models had the same.
    assert [(line.label, line.cells) for line in table.lines] == [
        (
            "Arena-Hard, judge gpt-4, against gpt-4-0314",
            ("1.00 % on average; 0 of 20 won", "4.25 % on average; 7 of 20 won", "nothing scored", "third"),
        ),
        (
            "MT-Bench, judge gpt-4",
            (
                "1.00 on average; 0 of 20 rated 7 or more",
                "4.25 on average; 7 of 20 rated 7 or more",
                "nothing scored",
                "base, slime",
            ),
        ),
    ]


@pytest.mark.parametrize("write", [report_page, report_markdown])
def test_page_and_markdown_show_categories_and_canaries(tmp_path: Path, write: Any) -> None:
    text = write(read_report([write_evaluation(tmp_path)]))
    assert "MT-Bench by category, judge gpt-4 c)" in text
    assert "MT-Bench by category, judge b d)" in text
    assert "4.25 on average; 7 of 20 rated 7 or more" in text


# --- the radar plot ---------------------------------------------------------------------------------------


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
