"""Kills: at every file operation of a run, and at random times; what is killed must go on to the same weights.

    python -m tests.reliability.kills --random 200
    python -m tests.reliability.kills --phase claim --phase save --phase export

(`make soak` does both.) Random times hardly ever hit the moment between two file operations, so that these are counted:
a first run tells how many there are, then one run each is killed before its n-th.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.reliability.harness import KINDS, Ended, make_world, slimepo, weights

# What Python says of before it is done; what is written from C++ and Rust lies between two of these.
_OPERATIONS = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
)
PHASES = ("claim", "save", "export")


def counted(folder: Path, act: Callable[[int, str], None]) -> None:
    """Call `act` before each file operation of this process in `folder`, with its number and what it is."""
    seen, inside = 0, str(folder)

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal seen
        if (
            event in _OPERATIONS
            and isinstance(given[0], str | os.PathLike)
            and str(given[0]).startswith(inside)
        ):
            seen += 1
            act(seen, f"{event} {os.path.relpath(given[0], inside)}")

    sys.addaudithook(hook)


def operations(folder: Path, command: tuple[object, ...]) -> list[str]:
    """The file operations of a command that nothing happens to, in their order; they are written beside the folder."""
    record = operations_file(folder)
    descriptor = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def before(_: int) -> None:
        counted(folder, lambda _, what: os.write(descriptor, f"{what}\n".encode()) and None)

    ended = slimepo(*command, before=before)
    os.close(descriptor)
    assert ended.code == 0, ended.said
    return record.read_text().splitlines()


def operations_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-operations")


def phase_of(done: list[str], phase: str) -> range:
    """The numbers of the operations of a claim (until there is a checkpoint), of the last save, or of the export."""
    saves = [number for number, what in enumerate(done, 1) if "checkpoints" in what]
    begun = [
        number
        for number in saves
        if "checkpoints/.writing" in done[number - 1] and "rename" in done[number - 1]
    ]
    export = next(
        number for number, what in enumerate(done, 1) if "model.part" in what and number > begun[-1]
    )
    return {
        "claim": range(1, saves[0]),
        "save": range(begun[-1], export),
        "export": range(export, len(done) + 1),
    }[phase]


def killed_at(number: int, folder: Path, of_rank: int = 0) -> Callable[[int], None]:
    """For `before`: this process is killed in the moment before the operation of that number."""

    def act(seen: int, _: str) -> None:
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda rank: counted(folder, act) if rank == of_rank else None


def killed_once(command: tuple[object, ...], out: Path, number: int, ranks: int = 1) -> tuple[Ended, Ended]:
    """The run killed before an operation, and the same command again."""
    return slimepo(*command, ranks=ranks, before=killed_at(number, out)), slimepo(*command, ranks=ranks)


def at_every_operation(
    folder: Path, kind: str, phase: str, ranks: int, share: float = 1.0
) -> Iterator[tuple[str, str]]:
    """Kill a run of this kind before each operation of a phase: what it was, and how that ended."""
    whole, recipe = folder / f"{kind}-whole", folder / f"{kind}.yaml"
    if not whole.exists():
        operations(whole, ("run", recipe, "--out", whole))
        if ranks > 1:
            shutil.rmtree(whole)
            assert not any(slimepo("run", recipe, "--out", whole, ranks=ranks).codes)
    done = operations_file(whole).read_text().splitlines()
    numbers = phase_of(done, phase)
    for number in random.Random(0).sample(numbers, round(len(numbers) * share)) if share < 1 else numbers:
        out = folder / f"{kind}-{number}"
        command = ("run", recipe, "--out", out)
        killed, again = killed_once(command, out, number, ranks)
        yield done[number - 1], _outcome(killed.codes, again, out, whole)
        shutil.rmtree(out)


def at_random(folder: Path, kind: str, ranks: int, kills: int, seed: int) -> Iterator[str]:
    """Runs of this kind, each killed at random times until it comes to its end: how each ended."""
    chance, whole, recipe = random.Random(seed), folder / f"{kind}-{ranks}", folder / f"{kind}.yaml"
    started = time.monotonic()
    assert not any(slimepo("run", recipe, "--out", whole, ranks=ranks).codes)
    takes, left, number = time.monotonic() - started, kills, 0
    while left > 0:
        number += 1
        out, codes, again = folder / f"{kind}-{ranks}-{number}", [1], Ended([1], "")
        while any(codes):
            # As many of its kills as are left; then it is let come to its end.
            again = slimepo(
                "run", recipe, "--out", out, ranks=ranks,
                during=(lambda children: _kill_later(children, chance.uniform(0, takes), chance)) if left > 0 else None,
            )  # fmt: skip
            codes = again.codes
            if -signal.SIGKILL in codes:
                left -= 1
                yield "killed"
            elif any(codes):
                break
        yield _outcome([-signal.SIGKILL], again, out, whole)
        shutil.rmtree(out, ignore_errors=True)


def _kill_later(children: list[int], seconds: float, chance: random.Random) -> None:
    """One of the ranks first, the others a moment later, as a launcher does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.01)
        # Left to be waited for: whether it has ended is looked at without taking its exit code away.
        if os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
    for child in chance.sample(children, len(children)):
        os.kill(child, signal.SIGKILL)
        time.sleep(chance.uniform(0, 0.05))


def _outcome(killed: list[int], again: Ended, out: Path, whole: Path) -> str:
    if -signal.SIGKILL not in killed:
        return "not reached"
    if any(again.codes):
        return f"CANNOT GO ON: {again.codes} {again.said.strip().splitlines()[-1:]}"
    return "same weights" if weights(out) == weights(whole) else "OTHER WEIGHTS"


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument(
        "--random", type=int, default=0, help="so many kills at random times, shared out over all runs"
    )
    asked.add_argument(
        "--phase", action="append", default=[], choices=PHASES, help="a kill at each operation of it"
    )
    asked.add_argument("--kind", action="append", default=[], choices=[*KINDS], help="default: all")
    asked.add_argument("--ranks", action="append", type=int, default=[], help="default: 1 and 2")
    asked.add_argument(
        "--share", type=float, default=1.0, help="of a phase's operations, where all take too long"
    )
    asked.add_argument("--seed", type=int, default=0)
    given = asked.parse_args()
    kinds, ranks, failed = given.kind or [*KINDS], given.ranks or [1, 2], 0
    print(f"{'what':24} {'kind':5} {'ranks':>5}  how it went on", flush=True)
    for kind in kinds:
        for count in ranks:
            with tempfile.TemporaryDirectory(prefix="slimepo-kills-") as folder:
                world = make_world(Path(folder))
                for phase in given.phase:
                    ends = Counter[str]()
                    for operation, end in at_every_operation(world, kind, phase, count, given.share):
                        ends[end if not end.startswith("CANNOT") else "CANNOT GO ON"] += 1
                        if end not in ("same weights", "not reached"):
                            print(f"  {operation}: {end}", flush=True)
                    failed += _told(f"each operation: {phase}", kind, count, ends)
                if given.random:
                    share = -(-given.random // (len(kinds) * len(ranks)))
                    ends = Counter(at_random(world, kind, count, share, given.seed))
                    failed += _told("random times", kind, count, ends)
    return 1 if failed else 0


def _told(what: str, kind: str, ranks: int, ends: Counter[str]) -> int:
    print(
        f"{what:24} {kind:5} {ranks:5}  {', '.join(f'{end} {count}' for end, count in ends.items())}",
        flush=True,
    )
    return sum(count for end, count in ends.items() if end not in ("same weights", "not reached", "killed"))


if __name__ == "__main__":
    sys.exit(main())
