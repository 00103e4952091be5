"""The page and its tables: complete, self-contained, with the numbers of the files, whatever a run left behind."""

import io
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from slimepo.errors import InputError
from slimepo.report.findings import findings
from slimepo.report.page import (
    Report,
    read_report,
    report_command,
    report_markdown,
    report_page,
    shown_samples,
)
from slimepo.report.tables import results, results_in_terminal
from slimepo.terminal import make_console
from tests.report.conftest import (
    HOSTILE,
    SIX,
    Tags,
    compared,
    scores_row,
    write_comparison,
    write_evaluation,
    write_json,
    write_run,
)

MakeRun = Callable[..., Path]


@pytest.fixture
def six(tmp_path: Path) -> Report:
    """Six stages compared from one model."""
    return read_report([write_comparison(tmp_path / "made-up")])


def told(report: Report) -> dict[str, Any]:
    return {finding.head: finding for finding in findings(report.groups, report.sources)}


def table_with(page: str, head: str) -> dict[str, dict[str, str]]:
    """The page's first table that has a column of this heading: rows by label, cells by heading."""
    table = next(table for table in Tags(page).tables if head in table[0])
    # A run that has no result has one wide cell.
    return {row[0]: dict(zip(table[0], row, strict=len(row) > 2)) for row in table[1:]}


def pieces(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside plain data."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from pieces(item)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of every kind: seeds, a run that broke, one that was killed, scores, a comparison."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        *(
            write_run(folder / f"slime-s{seed}", seed=seed, shift=seed / 10, watched=True)
            for seed in (0, 1, 2)
        ),
        write_run(folder / "dpo", "dpo", options={"beta": 0.1}),
        write_run(folder / "broken", "simpo", state="failed", options={"gamma_beta_ratio": 20}),
        write_run(folder / "killed", "simpo", state="killed", watched=True),
        write_evaluation(folder / "evaluation"),
        write_comparison(folder / "quickstart"),
    ]


@pytest.fixture(scope="module")
def whole(everything: list[Path]) -> str:
    """The page of all of them."""
    return report_page(read_report(everything))


def test_the_page_is_whole_and_loads_nothing(whole: str) -> None:
    page = whole
    tags = Tags(page)
    assert not tags.open
    assert len(page.encode()) < 3_000_000
    assert not [tag for tag, _ in tags.seen if tag in ("script", "iframe", "object", "embed")]
    for _, attributes in tags.seen:
        for name in ("src", "href", "xlink:href", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert all(address.startswith("#") for address in re.findall(r"url\(['\"]?(.)", page))
    assert "@import" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_the_parts_have_names_in_plain_words(whole: str) -> None:
    (nav,) = re.findall(r"<nav .*?</nav>", whole)
    names = re.findall(r'<a href="#part-\d+">(.*?)</a>', nav)
    assert [name for name in names if not re.fullmatch(r"[A-Z][a-z-]*( [a-z-]+){0,5}", name)] == []
    assert {"What the monitor said", "Held-out pairs while training"} <= {*names}
    # What a variable of that name would look like that holds no words.
    assert not re.search(
        r"Record\(|Group\(|&gt;, &lt;|\[\]|None", re.sub(r"<pre.*?</pre>", "", whole, flags=re.S)
    )


def test_every_picture_has_words_and_every_table_its_headings(whole: str) -> None:
    page = whole
    tags = Tags(page)
    for tag, attributes in tags.seen:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
    for table in tags.tables:
        assert len({len(row) for row in table if len(row) > 2 or row == table[0]}) == 1


def test_views_and_runs_switch_by_style_sheet_alone(everything: list[Path], whole: str) -> None:
    groups = len(read_report(everything).groups)
    seen = Tags(whole).seen
    inputs = {str(attributes["id"]): attributes for tag, attributes in seen if tag == "input"}
    assert inputs.keys() == {"changes", "levels", *(f"on{at}" for at in range(groups))}
    assert {name for name, attributes in inputs.items() if "checked" in attributes} == inputs.keys() - {
        "levels"
    }
    labels = {str(attributes["for"]) for tag, attributes in seen if tag == "label"}
    assert labels == inputs.keys()
    drawn = {str(attributes["class"]) for tag, attributes in seen if tag == "g" and "class" in attributes}
    assert drawn <= {f"g{at}" for at in range(groups)}
    assert len(drawn) > groups / 2
    for rule in ("#levels:checked ~ * .since", "#changes:checked ~ * .level", "#on0:not(:checked) ~ * .g0"):
        assert rule in whole


def test_answers_are_folded_and_bounded(tmp_path: Path) -> None:
    report = read_report([write_comparison(tmp_path / "run", prompts=60, text="x " * 5000)])
    seen = Tags(report_page(report)).seen
    folded = [attributes for tag, attributes in seen if attributes.get("class") == "sample"]
    assert 0 < len(folded) <= 24
    assert not any("open" in attributes for attributes in folded)


def test_the_results_are_those_of_the_files(everything: list[Path], whole: str) -> None:
    rows = table_with(whole, "chosen fell, %")
    done = json.loads((everything[3] / "dpo" / "stage.json").read_text())["heldout"]
    row = rows["dpo"]
    before, after = done["before"], done["after"]
    for side in ("chosen", "rejected"):
        assert row[f"{side}, nats/token"] == f"{after[f'logps/{side}']:.3f}"
        assert f"{after[f'logps/{side}'] - before[f'logps/{side}']:+.3f}</small>" in whole
    assert row["chosen fell, %"] == f"{100 * done['chosen_fell']:.1f}" == "61.5"
    assert row["under floor, %"] == "40.0"
    # Three seeds, each 0.1 below the one before: the mean of their changes, and 4.303 * 0.1 / sqrt(3).
    assert rows["slime (3 seeds)"]["chosen, nats/token"] == "-0.760"
    assert "-0.250 ± 0.248</small>" in whole


def test_speed_memory_and_drops_are_those_of_the_files(whole: str) -> None:
    page = whole
    row = table_with(page, "tokens/s")["dpo"]
    # The median of the lines after the first: steps 20 to 60.
    assert row["tokens/s"] == "1,040"
    assert (row["padding, %"], row["steps"], row["time"]) == ("12.5", "60", "1 min 15 s")
    assert (row["peak memory"], row["trained parameters"]) == ("3.0 GiB", "12,345")
    row = table_with(page, "rows in the file")["dpo"]
    assert (row["rows in the file"], row["malformed"], row["trained on"], row["held-out pairs"]) == (
        "1,237",
        "3",
        "777",
        "200",
    )
    assert (row["dropped: row too long"], row["dropped: empty response"]) == ("21", "2")


def test_curves_end_where_the_logs_end(everything: list[Path], whole: str) -> None:
    page = whole
    label = re.search(r'aria-label="(Margin, [^"]*over the steps[^"]*)"', page)
    assert label
    last = json.loads((everything[3] / "dpo" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"dpo ends at {last['margin']:.3g}" in label.group(1)


def test_the_monitors_warnings_and_both_ends_of_its_answers_are_shown(
    everything: list[Path], whole: str
) -> None:
    report, page = read_report(everything), whole
    assert page.count("0.8 nats less likely") >= 4
    assert "The run was stopped." in page
    assert "it has passed" not in page
    assert "Gone at step 60." in page
    sample = next(sample for sample in shown_samples(report.groups) if sample.prompt == "Why is it so?")
    # All began alike, so that answer stands there once; a seed stands for its group.
    assert [answer.run for answer in sample.answers] == ["before training", "slime-s0", "killed"]


def test_a_run_that_did_not_end_is_marked_everywhere(everything: list[Path], whole: str) -> None:
    page, lines = whole, told(read_report(everything))["Not to the end"].lines
    assert "broken: stopped: the loss is not finite at step 61" in lines
    assert any(line.startswith("killed: not finished: the last line is of step 60") for line in lines)
    assert "stopped: the loss is not finite at step 61" in table_with(page, "chosen fell, %")[
        "broken"
    ].values() or ("stopped: the loss is not finite at step 61" in page)
    assert "✕ stopped, or not finished" in page


def test_settings_side_by_side_with_differences_marked(everything: list[Path]) -> None:
    page = report_page(read_report(everything[:6]))
    rows = table_with(page, "setting")
    assert rows["loss_options.beta"]["dpo"] == "0.1"
    assert rows["loss_options.beta"]["killed"] == "–"
    assert page.count('class="text rare"') >= 2
    assert "The same in all runs" in page


def test_twelve_runs_have_a_style_each_and_stay_small(make_run: MakeRun) -> None:
    folders = [
        make_run(f"run-{at}", rate=(at + 1) * 1e-7, shift=at / 20, watched=at % 2 == 0) for at in range(12)
    ]
    report = read_report(folders)
    page = report_page(report)
    assert len(page.encode()) < 3_000_000
    assert len(results(report.groups, report.sources).lines) == 12
    # Blocks of six beside each other, so that a sheet of paper holds them.
    assert [len(table[0]) for table in Tags(page).tables if table[0][0] == "setting"] == [7, 7]


def test_figures_follow_the_page_and_share_no_ids(whole: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", whole, flags=re.DOTALL)
    assert len([drawing for drawing in drawings if 'role="img"' in drawing]) > 20
    ids: dict[str, str] = {}
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert not re.search(r"#0(\d)(0\1){2}", drawing)
        assert "<!--" not in drawing
        for name, rest in re.findall(r'<(?:path|clipPath) id="(\w+)"([^>]*)>', drawing):
            assert ids.setdefault(name, rest) == rest


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["gamma 0.125", "a\\q", "\\1", "#010101", "ユ"])
def test_names_stand_in_the_pictures_as_they_are(make_run: MakeRun, name: str) -> None:
    page = report_page(read_report([make_run(name)]))
    drawn = [text for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL) for text in texts_of(drawing)]
    assert name in drawn
    assert f"{name} ends at" in page


def texts_of(drawing: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(drawing).iter() if node.tag.endswith("text")]


def test_hostile_text_is_shown_and_not_run(tmp_path: Path) -> None:
    stages = [
        compared("slime", 1e-4, 0.5, name=HOSTILE.replace("/", "|"), loss_options={"$x$": HOSTILE}),
        compared(HOSTILE, 1e-4, 0.5, name="other", error=HOSTILE),
    ]
    report = read_report([write_comparison(tmp_path / "run", stages, prompt=HOSTILE, text=HOSTILE)])
    tags = Tags(report_page(report))
    assert not {"script", "img"} & {tag for tag, _ in tags.seen}
    assert not [attributes for _, attributes in tags.seen if "onerror" in attributes]
    assert "<script" not in report_markdown(report)


@pytest.mark.parametrize("value", ["absent", None, float("nan")])
def test_no_key_of_a_runs_files_is_needed(tmp_path: Path, value: Any) -> None:
    """Tables, findings and answers for every piece taken away alone."""
    folder = write_comparison(tmp_path / "run", [SIX[0], SIX[-1]])
    stage = SIX[0]["name"]
    for file in (
        "data.json",
        "samples/pairs.json",
        *(f"{stage}/{n}" for n in ("stage.json", "distributions.json", "answers.jsonl")),
    ):
        text = (folder / file).read_text()
        for at in range(len(list(pieces(json.loads(text))))):
            broken = json.loads(text)
            container, key = list(pieces(broken))[at]
            was = container[key]
            if value == "absent":
                del container[key]
            elif value is None or isinstance(was, float):
                container[key] = value
            (folder / file).write_text(json.dumps(broken))
            report = read_report([folder])
            report_markdown(report)
            results_in_terminal(report.sources)
            told(report)
            shown_samples(report.groups)
        (folder / file).write_text(text)
    Tags(report_page(read_report([folder])))


def test_markdown_has_a_line_a_run(tmp_path: Path) -> None:
    stages = [SIX[0] | {"name": "a|b"}, *SIX[1:]]
    report = read_report([write_comparison(tmp_path / "made-up", stages)])
    title, said, table, *_ = report_markdown(report).split("\n\n")
    assert (title, said.startswith("Right answers on held-out prompts")) == ("# made-up", True)
    lines = table.splitlines()
    assert len(lines) == 2 + 1 + 6
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "a\\|b" in lines[3]
    assert "stopped: the loss is not finite" in lines[-1]
    assert "**58.0 (+8.0)**" in lines[-2]


def test_markdown_keeps_the_figure_of_seeds_that_came_to_their_end(make_run: MakeRun) -> None:
    folders = [make_run("a", seed=1), make_run("b", seed=2, state="failed")]
    line = report_markdown(read_report(folders)).split("\n\n")[2].splitlines()[2]
    assert "| -0.660 (-0.150) (seed 2 stopped: the loss is not finite at step 61) |" in line


def test_nothing_is_minus_zero(make_run: MakeRun) -> None:
    folder = make_run("flat")
    file = folder / "slime" / "stage.json"
    stage = json.loads(file.read_text())
    stage["heldout"]["after"]["logps/chosen"] = stage["heldout"]["before"]["logps/chosen"] - 1e-5
    stage["heldout"]["after"]["repetition"] = -1e-9
    file.write_text(json.dumps(stage))
    _, said, table, *_ = report_markdown(read_report([folder])).split("\n\n")
    assert "(+0.000 nats a token)" in said
    line = table.splitlines()[2]
    assert "(+0.000)" in line
    assert "| 0.0 |" in line
    assert "-0.0 " not in line


def test_a_page_that_cannot_be_written_is_named(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"--out .*page\.html cannot be written: a part of the path is a file"
    ):
        report_command([make_run("a")], tmp_path / "file" / "page.html", make_console(quiet=True))


def test_a_page_of_scores_alone_counts_scores(tmp_path: Path) -> None:
    rows = [scores_row("ours", 10.0), scores_row("ours", 11.0, "other"), scores_row("theirs", 12.0)]
    write_json(tmp_path / "scores" / "a.json", {"scores": rows})
    report = read_report([tmp_path])
    assert report.counted == "3 scores of 2 models"
    assert '<p class="lead">3 scores of 2 models</p>' in report_page(report)


def test_the_command_says_where_the_page_is(make_run: MakeRun, tmp_path: Path) -> None:
    console = make_console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    folder = make_run("run", state="killed")
    report_command([folder], None, console)
    assert (folder / "report.html").exists()
    assert (folder / "report.md").exists()
    assert f"1 run, 1 not to the end: {folder / 'report.html'}" in console.export_text()
    with pytest.raises(InputError, match="is a folder"):
        report_command([folder], tmp_path, console)
    with pytest.raises(InputError, match=r"the page is HTML; give .*page\.html"):
        report_command([folder], tmp_path / "page.md", console)


# --- stages compared from one model on tasks --------------------------------------------------------------


def test_the_page_tells_what_a_comparison_holds(six: Report) -> None:
    page = report_page(six)
    for words in (
        '56.0<small class="change">+6.0</small>',
        '-0.600<small class="change">-0.040</small>',
        "start: sft",
        "from one model (sft) · seed 0 · 1,100 held-out prompts, greedy answers",
        "stopped: the loss is not finite at step 12",
        "✓ right",
        "✗ wrong form",
        "✗ cut off at the limit",
        "plain SFT on the chosen answers",
        "samples (pairs)",
        "hidden_size: 96",
        "2.13.0",
        "280 (10.0\u00a0%)",
        "By family of tasks",
        "Over the learning rate",
    ):
        assert words in page


def test_findings_name_the_control_and_the_best_of_the_rest(six: Report) -> None:
    found = told(six)
    best = found["Best exact match"].text.replace("\u00a0", " ")
    assert "sft-1e-4, the control (plain SFT on the chosen answers): 58.0 %, from 50.0 % at the start" in best
    assert "rejected answers: slime-1e-4, 56.0 %" in best
    assert "DPO: 31\u00a0% at 1e-4, 97\u00a0% at 1e-3" in found["Chosen answers"].lines
    assert "DPO: 51.0\u00a0% → 16.0\u00a0% (1e-4 to 1e-3)" in found["Learning rate"].lines
    # Twice the standard error of a share of one half: 196 * sqrt(0.25 / 1100).
    assert f"± {196 * math.sqrt(0.25 / 1100):.1f} points" in found["How sure"].text
    assert found["Not to the end"].lines == ("simpo-1e-3: stopped: the loss is not finite at step 12",)


def test_a_run_without_tasks_says_how_many_pairs_its_figures_are_of(make_run: MakeRun) -> None:
    found = told(read_report([make_run("run")]))
    assert (
        found["How sure"].text.replace("\u00a0", " ")
        == "One seed and 200 held-out pairs; another seed was not tried."
    )


def test_findings_say_when_nothing_got_better(tmp_path: Path) -> None:
    stages = [compared("slime", 1e-3, 0.4), compared("sft", 1e-3, 0.45)]
    found = told(read_report([write_comparison(tmp_path / "run", stages)]))
    assert found["Best exact match"].text.startswith("No run is better than the start")


def with_seeds(folder: Path, **failed: Any) -> Report:
    """Three seeds of two stages; `failed` changes the first stage of the last."""
    for seed in (0, 1, 2):
        first = compared("slime", 1e-4, 0.5 + seed / 100) | (failed if seed == 2 else {})
        write_comparison(folder / f"seed-{seed}", [first, compared("dpo", 1e-4, 0.4)], seed=seed)
    return read_report([folder])


def test_several_seeds_are_bands(tmp_path: Path) -> None:
    report = with_seeds(tmp_path)
    assert [group.label for group in report.groups] == ["slime-1e-4 (3 seeds)", "dpo-1e-4 (3 seeds)"]
    page = report_page(report)
    row = table_with(page, "exact match, %")["slime-1e-4 (3 seeds)"]
    assert row["exact match, %"] == "51.0"
    # Changes of 0, 1 and 2 points: 4.303 / sqrt(3).
    assert "+1.0 ± 2.5</small>" in page
    assert table_with(page, "exact match, %")["start: sft"]["exact match, %"] == "50.0"


def in_terminal(report: Report) -> str:
    console = make_console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_in_terminal(report.sources))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    return text


def test_the_terminal_table_fits_100_columns(tmp_path: Path) -> None:
    stages = [*SIX, compared("simpo", 1e-4, 0.5, name="[bold]simpo gamma 20 at 1e-4[nonsense]")]
    text = in_terminal(read_report([write_comparison(tmp_path / "run", stages)]))
    assert "…" not in text
    assert "56.0" in text
    assert "+6.0" in text
    assert "[bold]simpo" in text.replace("\n", "")
    assert "simpo-1e-3 stopped: the loss is not finite at step 12" in text


def test_with_several_seeds_the_terminal_has_the_interval_below(tmp_path: Path) -> None:
    text = in_terminal(with_seeds(tmp_path))
    assert "51.0" in text
    assert "+1.0 ± 2.5" in text
    assert "each change from its seed's own start ± its 95 % interval" in text


def test_a_seed_that_failed_does_not_hide_the_others_in_the_terminal(tmp_path: Path) -> None:
    text = in_terminal(with_seeds(tmp_path, error="the loss is not finite at step 3"))
    assert "50.5" in text
    assert "seed 2 stopped: the loss is not finite at step 3" in " ".join(text.split())


def test_many_runs_and_long_curves_stay_small(tmp_path: Path) -> None:
    long = [{"step": step, "logps/chosen": -math.sqrt(step), "logps/rejected": -step} for step in range(5000)]
    stages = [
        compared(loss, rate, 0.5, curve=long, answer={"text": "x " * 2000, "correct": False})
        for loss in ("slime", "dpo", "simpo", "orpo", "sft")
        for rate in (3e-5, 1e-4, 3e-4, 1e-3)
    ]
    report = read_report([write_comparison(tmp_path / "run", stages, prompts=60)])
    assert len(report_page(report).encode()) < 3_000_000


def test_only_files_that_were_written_are_announced(evaluation: Path, tmp_path: Path) -> None:
    """A map of an earlier page lies beside a page that has none."""
    (tmp_path / "page.png").write_bytes(b"old")
    console = make_console(file=io.StringIO(), width=400)
    report_command([evaluation], tmp_path / "page.html", console)
    said = console.file.getvalue()
    assert "page.md" in said
    assert "page.png" not in said
