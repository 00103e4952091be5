"""The processes of a sweep: commands of `slimepo`, several side by side, each with its share of the machine."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slimepo.errors import PREEMPTED, RESOURCES, Failure
from slimepo.pipeline.folder import is_held

if TYPE_CHECKING:
    from rich.console import Console

# Seconds between two looks at a run folder that another process holds.
EVERY = 2.0


class Process(NamedTuple):
    """A run folder and the commands of `slimepo` that are run for it, one after another, once `needs` is done."""

    name: str
    folder: Path
    commands: list[list[str]]
    needs: Process | None = None


def run_processes(
    processes: Sequence[Process],
    jobs: int,
    console: Console,
    ended: Callable[[str], None] = lambda name: None,
) -> dict[str, Failure]:
    """Run them, `jobs` at a time, each with its share of the processors; what each that failed ended with, by name.

    The first that can run does, whatever waits before it. What needs a process that failed has failed too.

    ended: called with the name of each that did not fail.

    What they print is in log.txt of their folders. With several GPUs each place has one of them.
    """
    places: queue.Queue[dict[str, str]] = queue.Queue()
    for environment in _places(jobs):
        places.put(environment)
    failed: dict[str, Failure] = {}
    states = {process.name: "waiting" for process in processes}
    started, stopped = time.monotonic(), threading.Event()

    def run(process: Process) -> Failure | None:
        environment = places.get()
        try:
            while process.folder.exists() and is_held(process.folder):
                # A process that outlived a sweep which was killed.
                states[process.name] = "at work in another process"
                if stopped.wait(EVERY):
                    return Failure(PREEMPTED, "stopped")
            states[process.name] = "running"
            return _run(process, environment)
        finally:
            places.put(environment)

    def over(name: str, why: Failure | None) -> None:
        states[name] = f"failed: {why.words}" if why else "done"
        count = sum(state == "done" or state.startswith("failed") for state in states.values())
        told = f"[{count}/{len(processes)}] {name}: {states[name]}, {time.monotonic() - started:.0f} s"
        console.print(told, style="red" if why else None)
        if why:
            failed[name] = why
        else:
            ended(name)

    waiting, running = list(processes), dict[Future[Failure | None], Process]()
    with _progress(states, console), ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                for process in list(waiting):
                    start = process.needs
                    if start is not None and (why := failed.get(start.name)):
                        waiting.remove(process)
                        words = f"{start.folder}, which it starts from, failed: {why.words}"
                        over(process.name, why._replace(words=words))
                ready = [each for each in waiting if each.needs is None or states[each.needs.name] == "done"]
                for process in ready[: jobs - len(running)]:
                    waiting.remove(process)
                    running[pool.submit(run, process)] = process
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    over(running.pop(done).name, done.result())
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _run(process: Process, environment: Mapping[str, str]) -> Failure | None:
    """Run its commands to the first that fails; what that ended with."""
    # Modules are found where this process finds them: a checker, say, that lies beside the recipe.
    modules = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    env, file = {**os.environ, **modules, **environment}, process.folder / "log.txt"
    with file.open("a") as log:
        for command in process.commands:
            words = [sys.executable, "-m", "slimepo.cli", *command]
            code = subprocess.run(words, stdout=log, stderr=log, env=env).returncode
            if code < 0:
                memory = "; memory may have run out: give fewer --jobs, or smaller batches"
                hint = memory if -code == signal.SIGKILL else ""
                return Failure(RESOURCES, f"killed by signal {-code}{hint}; see {file}")
            if code:
                return Failure(code, _last_line(file) or f"exit code {code}")
    return None


def _places(jobs: int) -> list[dict[str, str]]:
    """The environment of each process that runs beside others: its threads, and its GPU where there are several."""
    if jobs == 1:
        return [{}]
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [*map(str, range(torch.cuda.device_count()))]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // jobs, 1))
    return [
        {
            "OMP_NUM_THREADS": threads,
            **({"CUDA_VISIBLE_DEVICES": devices[at % len(devices)]} if devices else {}),
        }
        for at in range(jobs)
    ]


def _last_line(file: Path) -> str:
    """What a command said went wrong, or else the last thing that it said."""
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip(" │") for line in text.splitlines() if any(map(str.isalnum, line))]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")


@contextlib.contextmanager
def _progress(states: Mapping[str, str], console: Console) -> Any:
    """A table of what runs, in a terminal; elsewhere the lines of what ended tell."""
    if not console.is_terminal:
        yield
        return
    from rich.live import Live
    from rich.table import Table

    def table() -> Table:
        shown = Table(
            "run", "state", title=f"{sum(s == 'done' for s in states.values())} of {len(states)} done"
        )
        for name, state in states.items():
            if state != "done":
                shown.add_row(name, state)
        return shown

    with Live(get_renderable=table, console=console, refresh_per_second=1, transient=True):
        yield
