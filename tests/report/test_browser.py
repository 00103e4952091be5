"""The page in a real browser: no script error, no overflow, nothing fetched; wide and narrow, light and dark."""

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from slimepo.report.page import write_report
from tests.report.conftest import (
    FALLEN,
    SIX,
    write_comparison,
    write_evaluation,
    write_fallen,
    write_on_policy,
    write_run,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of twelve runs and more: seeds, two that did not end, a quickstart with long words, scores."""
    folder = tmp_path_factory.mktemp("runs")
    folders = [
        write_run(
            folder / f"a-run-with-quite-a-long-name-{at}", rate=(at + 1) * 1e-7, shift=at / 20, watched=at < 3
        )
        for at in range(6)
    ]
    folders += [write_run(folder / f"dpo-s{seed}", "dpo", seed=seed, shift=seed / 10) for seed in range(4)]
    folders += [write_run(folder / state, "simpo", state=state) for state in ("failed", "killed")]
    write_fallen(folders[0] / "slime" / "monitor.jsonl", {**FALLEN, "tokens": ["unbroken" * 30] * 4})
    options = {"loss_options": {"a_rather_long_option_name": 1.25, "another_one": "with words"}}
    stages = [*(each | options for each in SIX[:2]), *SIX[2:]]
    folders += [write_comparison(folder / "quickstart", stages, text="unbroken" * 30)]
    folders += [write_on_policy(folder / "grpo", prompt="unbroken" * 30)]
    folders += [write_evaluation(folder / "evaluation")]
    target = folder / "site" / "page.html"
    write_report(folders, target)
    return target


@pytest.fixture
def served(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of the page's folder, and what is asked for there."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, form: str, *arguments: object) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(page.parent)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_opens_it_without_errors_overflow_or_requests(
    page: Path, served: tuple[str, list[str]], width: int, scheme: str, tmp_path: Path
) -> None:
    address, asked = served
    # A headless window may not be as narrow as a phone; a frame may. The frame's script is ours, not the page's.
    (page.parent / "frame.html").write_text(
        f"<iframe id=f style='width:{width}px;height:2000px;border:0' src='page.html'></iframe><script>"
        "onload = () => { const page = document.getElementById('f').contentDocument, root = page.documentElement;"
        "page.querySelectorAll('details').forEach(each => each.open = true);"
        "const wide = [...page.querySelectorAll('main *')].filter(each => !each.closest('.scroll, pre, svg') &&"
        " each.getBoundingClientRect().right > root.clientWidth + 1).length;"
        "const paper = getComputedStyle(page.body).backgroundColor;"
        # What is hidden at first, and after the other view is asked for and the first run is switched off.
        "const hidden = () => ['figure .since', 'figure .level', 'figure .g0'].map(each =>"
        " getComputedStyle(page.querySelector(each)).display == 'none').join();"
        "const first = hidden(); page.getElementById('levels').click(); page.getElementById('on0').click();"
        "document.title = `page ${root.scrollWidth} ${root.clientWidth} ${wide} "
        "${page.querySelectorAll('figure svg').length} ${paper} ${first} ${hidden()}` }</script>"
    )
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    command = [
        *(
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            *dark,
        ),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        # Whatever the page might ask for elsewhere finds no network.
        *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--enable-logging=stderr"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1600,1200", "--virtual-time-budget=8000"),
        *("--dump-dom", f"{address}/frame.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>page (\d+) (\d+) (\d+) (\d+) (rgb\(.*?\)) (\S+) (\S+)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    page_width, window_width, wide, drawings = map(int, found.groups()[:4])
    assert page_width <= window_width <= width
    assert wide == 0
    assert drawings > 20
    assert found.group(5) == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]
    assert found.groups()[5:] == ("false,true,false", "true,false,true")
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert {path.partition("?")[0] for path in asked} <= {"/frame.html", "/page.html", "/favicon.ico"}
    assert page.stat().st_size < 3_000_000
