"""The quickstart's page and tables: complete, self-contained, and standing up to whatever a run left behind."""

import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from slimepo.report.figures import learning_rates, series, short_rate, styles
from slimepo.report.page import findings, markdown_table, quickstart_page, read_runs, results_table

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
CHROMIUM = shutil.which("chromium")


def metrics(exact: float, chosen: float) -> dict[str, float]:
    return {
        "exact_match": exact,
        "format_valid": 0.9,
        "end_rate": 0.95,
        "repetition": 0.01,
        "exact_match/add": exact,
        "exact_match/sort": exact / 2,
        "logps/chosen": chosen,
        "logps/rejected": chosen - 1,
        "margin": 1.0,
        "accuracy": 0.9,
        "rejected_below_floor": 0.4,
    }


def make_run(objective: str, rate: float, exact: float, **changes: Any) -> dict[str, Any]:
    curve = [
        {
            "step": step,
            "loss": 1 / step,
            "logps/chosen": -0.5 - rate * step,
            "logps/rejected": -1 - rate * step,
        }
        for step in range(10, 60, 10)
    ]
    run = {
        "name": f"{objective} {short_rate(rate)}",
        "objective": objective,
        "learning_rate": rate,
        "options": {},
        "seconds": 6.2,
        "steps": 50,
        "before": metrics(0.5, -0.56),
        "after": metrics(exact, -0.6),
        "chosen_fell": 0.31,
        "curve": curve,
        "error": None,
    }
    return {**run, **changes}


@pytest.fixture
def result() -> dict[str, Any]:
    answer = {"text": "13", "correct": False, "valid": True, "finished": True}
    return {
        "title": "SLIME in the built-in world",
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "recipe": {"model": {"init": "random", "hidden_size": 96}, "runs": [{"loss": "slime"}]},
        "seconds": {"sft": 95.0, "samples": 6.1},
        "sft": {"cached": True, "seconds": 95.0, "metrics": {"exact_match": 0.5, "format_valid": 0.8}},
        "pairs": {
            "tasks": 3000,
            "pairs": 2800,
            "gold_share": 0.1,
            "invalid_share": 0.2,
            "train": 2400,
            "heldout": 400,
        },
        "heldout_prompts": 1100,
        "runs": [
            make_run("slime", 1e-4, 0.56),
            make_run("slime", 1e-3, 0.52),
            make_run("dpo", 1e-4, 0.51),
            make_run("dpo", 1e-3, 0.16, chosen_fell=0.97),
            make_run("sft", 1e-4, 0.58),
            make_run(
                "simpo", 1e-3, 0.0, after=None, chosen_fell=None, error="the loss is not finite at step 12"
            ),
        ],
        "samples": [
            {
                "family": "add",
                "prompt": "Add 5 and 7.",
                "gold": "12",
                "answers": {
                    "sft": answer,
                    "slime 1e-4": {**answer, "text": "12", "correct": True},
                    "slime 1e-3": {**answer, "text": "The answer is 12", "valid": False},
                    "dpo 1e-3": {**answer, "text": "12" * 900, "finished": False},
                },
            }
        ],
    }


class Tags(HTMLParser):
    """Collects the start tags, and fails on one that is closed where it is not open."""

    void = frozenset({"meta", "link", "br", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag


def pieces(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside plain data."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from pieces(item)


def test_the_page_is_whole_and_loads_nothing(result: dict[str, Any]) -> None:
    page = quickstart_page(result)
    tags = Tags(page)
    assert not tags.open
    assert len(page.encode()) < 1_500_000
    assert not [tag for tag, _ in tags.seen if tag in ("script", "iframe", "object", "embed")]
    for _, attributes in tags.seen:
        for name in ("src", "href", "xlink:href", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert all(address.startswith("#") for address in re.findall(r"url\(['\"]?(.)", page))
    assert "@import" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_the_page_tells_what_the_result_holds(result: dict[str, Any]) -> None:
    page = quickstart_page(result)
    for words in (
        "50.0 → 56.0",
        "-0.56 → -0.60",
        "stopped: the loss is not finite at step 12",
        "✓ right",
        "✗ wrong form",
        "✗ does not end",
        "plain SFT on the chosen answers",
        "sft (from the cache)",
        "hidden_size: 96",
        "2.13.0",
        "pairs held out",
    ):
        assert words in page


def test_figures_follow_the_page_and_share_no_ids(result: dict[str, Any]) -> None:
    page = quickstart_page(result)
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len([drawing for drawing in drawings if 'role="img"' in drawing]) == 3 + 4 + 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "#01010" not in drawing
        assert "#000000" not in drawing
        assert "<!--" not in drawing
    ids: dict[str, str] = {}
    for drawing in drawings:
        for name, rest in re.findall(r'<(?:path|clipPath) id="(\w+)"([^>]*)>', drawing):
            assert ids.setdefault(name, rest) == rest


def test_colour_is_the_objective_and_line_the_learning_rate(result: dict[str, Any]) -> None:
    runs = read_runs(result)
    look = styles(runs)
    assert learning_rates(runs) == [1e-4, 1e-3]
    assert look["slime 1e-4"].colour == look["slime 1e-3"].colour != look["dpo 1e-4"].colour
    assert look["slime 1e-4"].marker == look["dpo 1e-4"].marker != look["slime 1e-3"].marker
    assert look["slime 1e-4"].line == look["dpo 1e-4"].line != look["slime 1e-3"].line


def test_runs_that_differ_in_options_are_series_of_their_own(result: dict[str, Any]) -> None:
    result["runs"] = [
        make_run("simpo", 1e-3, 0.2),
        make_run("simpo", 1e-3, 0.1, name="simpo far 1e-3", options={"gamma_beta_ratio": 20}),
        make_run("simpo", 1e-4, 0.5),
    ]
    grouped = series(read_runs(result))
    assert {name: [run.learning_rate for run in group] for name, group in grouped.items()} == {
        "SimPO": [1e-4, 1e-3],
        "simpo far": [1e-3],
    }


def test_findings_name_the_control_and_the_best_of_the_rest(result: dict[str, Any]) -> None:
    told = {finding.head: finding for finding in findings(result, read_runs(result))}
    best = told["Best exact match"].text.replace("\u00a0", " ")
    assert "sft 1e-4, the control (plain SFT on the chosen answers): 58.0 %, from 50.0 % after SFT" in best
    assert "rejected answers: slime 1e-4, 56.0 %" in best
    assert "DPO: 31\u00a0% at 1e-4, 97\u00a0% at 1e-3" in told["Chosen answers"].lines
    assert "DPO: 51.0\u00a0% → 16.0\u00a0% (1e-4 to 1e-3)" in told["Learning rate"].lines
    # Twice the standard error of a share of one half: 196 * sqrt(0.25 / 1100).
    assert f"± {196 * math.sqrt(0.25 / 1100):.1f} points" in told["How sure"].text
    assert told["Stopped"].text == "simpo 1e-3: the loss is not finite at step 12"


def test_findings_say_when_nothing_got_better(result: dict[str, Any]) -> None:
    result["runs"] = [make_run("slime", 1e-3, 0.4), make_run("sft", 1e-3, 0.45)]
    assert findings(result, read_runs(result))[0].text.startswith("No run is better than the SFT start")


def test_markdown_has_a_line_a_run(result: dict[str, Any]) -> None:
    result["runs"][0]["name"] = "a|b\nc"
    lines = markdown_table(result).splitlines()
    assert len(lines) == 2 + 1 + 6
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert widths == {12}
    assert "a\\|b c" in lines[3]
    assert "stopped: the loss is not finite" in lines[-1]


def test_the_terminal_table_fits_100_columns(result: dict[str, Any]) -> None:
    result["runs"] = [
        *result["runs"],
        make_run("simpo", 1e-4, 0.5, name="[bold]simpo gamma 20 at 1e-4[/nonsense]"),
    ]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(result))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    assert "50.0 → 56.0" in text
    assert "[bold]simpo" in text.replace("\n", "")
    assert "simpo 1e-3 stopped: the loss is not finite at step 12" in text


@pytest.mark.parametrize("value", ["absent", None, float("nan")])
def test_no_key_is_needed(result: dict[str, Any], value: Any) -> None:
    """Tables and findings for every piece taken away alone; the page for every one at the top and in a run."""
    result["runs"] = [result["runs"][0], result["runs"][-1]]
    text = json.dumps(result)
    for at in range(len(list(pieces(result)))):
        broken = json.loads(text)
        container, key = list(pieces(broken))[at]
        was = container[key]
        if value == "absent":
            del container[key]
        elif value is None or isinstance(was, float):
            container[key] = value
        markdown_table(broken)
        results_table(broken)
        findings(broken, read_runs(broken))
        if container is broken or container is broken.get("runs", [0])[0]:
            Tags(quickstart_page(broken))


def test_an_empty_result_and_an_empty_run_make_a_page() -> None:
    assert "slimepo quickstart" in quickstart_page({})
    assert not Tags(quickstart_page({"runs": [{}], "samples": [{}, {"answers": {"sft": {}}}]})).open


def test_hostile_text_is_shown_and_not_run(result: dict[str, Any]) -> None:
    result["title"] = HOSTILE
    result["samples"][0]["prompt"] = HOSTILE
    result["samples"][0]["answers"] = {HOSTILE: {"text": HOSTILE, "correct": False}}
    result["runs"][0] |= {"name": HOSTILE, "options": {"$x$": HOSTILE}}
    result["runs"][1] |= {"objective": HOSTILE, "error": HOSTILE}
    result["recipe"] = {HOSTILE: HOSTILE}
    result["versions"] = {HOSTILE: HOSTILE}
    tags = Tags(quickstart_page(result))
    assert not {"script", "img"} & {tag for tag, _ in tags.seen}
    assert not [attributes for _, attributes in tags.seen if "onerror" in attributes]
    assert "<script" not in markdown_table(result)


def test_many_runs_and_long_curves_stay_small(result: dict[str, Any]) -> None:
    curve = [
        {"step": step, "logps/chosen": -math.sqrt(step), "logps/rejected": -step} for step in range(5000)
    ]
    result["runs"] = [
        make_run(objective, rate, 0.5, curve=curve)
        for objective in ("slime", "dpo", "simpo", "orpo", "sft")
        for rate in (3e-5, 1e-4, 3e-4, 1e-3)
    ]
    answers = {run["name"]: {"text": "x " * 2000, "correct": False} for run in result["runs"]}
    result["samples"] = [{**result["samples"][0], "answers": answers}] * 60
    assert len(quickstart_page(result).encode()) < 1_500_000


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_opens_it_without_errors_or_overflow(
    result: dict[str, Any], width: int, tmp_path: Path
) -> None:
    for run in result["runs"][:2]:
        run["options"] = {"a_rather_long_option_name": 1.25, "another_one": "with words"}
    result["samples"][0]["answers"]["sft"]["text"] = "unbroken" * 30
    # A headless window may not be as narrow as a phone; a frame may.
    (tmp_path / "frame.html").write_text(
        f"<iframe id=f style='width:{width}px;height:2000px;border:0' srcdoc='{html.escape(quickstart_page(result))}'>"
        "</iframe><script>onload = () => { const page = document.getElementById('f').contentDocument;"
        "document.title = `widths ${page.documentElement.scrollWidth} ${page.documentElement.clientWidth}`"
        " + ` figures ${page.querySelectorAll('figure svg').length}` }</script>"
    )
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1600,1200", "--virtual-time-budget=5000"),
        *("--enable-logging=stderr", "--dump-dom", (tmp_path / "frame.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>widths (\d+) (\d+) figures (\d+)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    page_width, window_width, drawings = map(int, found.groups())
    assert page_width <= window_width <= width
    assert drawings == 10
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
