"""Rewards of sampled answers: functions of a user's own, called once a prompt, and what may go wrong in them."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from slimepo.errors import InputError
from slimepo.losses.common import check_number
from slimepo.types import Message
from slimepo.words import first_line

# (prompt, completions, the row's other columns) -> a number for each completion
Reward = Callable[[list[Message], Sequence[str], Mapping[str, Any]], Sequence[float]]


@dataclass(frozen=True)
class Prompt:
    """What is answered: its messages, the whole `row` that they stand in, and the ids that an answer starts from."""

    id: str
    messages: list[Message]
    row: Mapping[str, Any]
    ids: list[int]


@runtime_checkable
class LooksAhead(Protocol):
    """A reward that works on many prompts at once: it is shown all of them before it is called for each."""

    def look_ahead(self, prompts: Sequence[list[Message]], completions: Sequence[Sequence[str]]) -> None: ...


@dataclass(frozen=True)
class Rewarder:
    """Weighted sum of rewards, by name. `on_error`: stop the run, or skip the prompt; `timeout` in seconds a prompt.

    `way_out`: what may be done about a reward that stops the run, which ends its error. `what`: a reward or a cost, as
    its errors say.
    """

    functions: Mapping[str, tuple[Reward, float]]
    on_error: str = "stop"
    timeout: float | None = None
    way_out: str = "rollouts: {on_error: skip} leaves such prompts out"
    what: str = "reward"

    def of_all(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]
    ) -> list[tuple[list[float], dict[str, list[float]], str]]:
        """What a call says of each prompt with its completions; rewards that look ahead see all of them first.

        Raises:
            InputError: as a call does.
        """
        for name, (function, _) in self.functions.items():
            if not isinstance(function, LooksAhead) or not prompts:
                continue
            seconds = None if self.timeout is None else self.timeout * len(prompts)
            try:
                messages = [list(prompt.messages) for prompt in prompts]
                _within(seconds, function.look_ahead, (messages, completions))
            except (Exception, SystemExit) as error:
                # Where prompts are to be skipped, the calls tell which.
                if self.on_error == "stop":
                    failed = f"fails: {type(error).__name__}: {first_line(error)}"
                    if isinstance(error, _TookTooLong):
                        failed = f"took more than {seconds:g} s on {len(prompts)} prompts; {self.way_out}"
                    raise InputError(f"{self.what} {name!r} {failed}") from error
        return [self(prompt, answers) for prompt, answers in zip(prompts, completions, strict=True)]

    def __call__(
        self, prompt: Prompt, completions: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]], str]:
        """The reward of each completion, its parts by name, and why there is none (then NaN), else empty.

        Raises:
            InputError: a reward failed, with `on_error: stop`; it names the reward and the row.
        """
        parts: dict[str, list[float]] = {}
        for name, (function, _) in self.functions.items():
            try:
                parts[name] = self._called(name, function, prompt, completions)
            except InputError as error:
                if self.on_error == "stop":
                    raise InputError(f"{error}; {self.way_out}") from error
                nothing = [math.nan] * len(completions)
                return nothing, dict.fromkeys(self.functions, nothing), str(error)
        weights = [weight for _, weight in self.functions.values()]
        totals = [
            sum(w * v for w, v in zip(weights, of_one, strict=True))
            for of_one in zip(*parts.values(), strict=True)
        ]
        return totals, parts, ""

    def _called(self, name: str, function: Reward, prompt: Prompt, completions: Sequence[str]) -> list[float]:
        def read(*given: Any) -> Any:
            values = function(*given)
            # A generator works, and fails, only while it is read.
            return list(values) if isinstance(values, Iterator) else values

        try:
            values = _within(self.timeout, read, (list(prompt.messages), list(completions), dict(prompt.row)))
        except _TookTooLong:
            raise InputError(
                f"{self.what} {name!r} took more than {self.timeout:g} s on row {prompt.id}"
            ) from None
        except (Exception, SystemExit) as error:
            # A user's function can fail in any way.
            raise InputError(
                f"{self.what} {name!r} fails on row {prompt.id}: {type(error).__name__}: {first_line(error)}"
            ) from error
        try:
            # Of these the numbers could be read too, and would be others or in another order.
            in_order = not isinstance(values, (str, bytes, Mapping, Set))
            numbers = [float(value) for value in values] if in_order else None
        except Exception:
            # Each library's numbers refuse in a way of their own.
            numbers = None
        if numbers is None:
            shown = " ".join(repr(values).split())[:100]
            raise InputError(f"{self.what} {name!r} gave no list of numbers on row {prompt.id}: {shown}")
        if len(numbers) != len(completions):
            raise InputError(
                f"{self.what} {name!r} gave {len(numbers)} numbers for {len(completions)} completions on row "
                f"{prompt.id}"
            )
        if not all(map(math.isfinite, numbers)):
            raise InputError(
                f"{self.what} {name!r} gave {numbers} on row {prompt.id}: every {self.what} is a finite number"
            )
        return numbers


def named_rewards(given: Any, what: str = "reward") -> dict[str, tuple[Reward, float]]:
    """Rewards (or costs) with weights by name, from one function, several, or functions with weights by name.

    Raises:
        InputError: there is none, or one that `check_reward` refuses.
    """
    if isinstance(given, Mapping):
        found = {name: value if isinstance(value, tuple) else (value, 1.0) for name, value in given.items()}
    else:
        several = given if isinstance(given, Sequence) else [] if given is None else [given]
        found = {
            getattr(function, "__name__", f"{what} {i}"): (function, 1.0)
            for i, function in enumerate(several)
        }
        if len(found) < len(several):
            raise InputError(
                f"two {what}s have the same name: give them as a mapping, {{name: (function, weight)}}"
            )
    if not found:
        raise InputError(
            f"rollouts need a {what}: a function of (prompt, completions, row) that gives a number for each"
        )
    for name, (function, weight) in found.items():
        check_reward(name, function, weight, what)
    return found


def check_reward(name: str, function: Any, weight: float, what: str = "reward") -> None:
    """Raises InputError for what cannot be called with (prompt, completions, row), or a weight that is no number."""
    if not callable(function):
        raise InputError(f"{what} {name!r} is not a function of (prompt, completions, row)")
    check_number(f"the weight of {what} {name!r}", weight)
    try:
        inspect.signature(function).bind(None, None, None)
    except TypeError as error:
        raise InputError(f"{what} {name!r} is called with (prompt, completions, row): {error}") from error
    except ValueError:
        # Some functions of C do not say what they take.
        pass


class _TookTooLong(Exception):
    pass


def _within(seconds: float | None, function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    """The function's value. What takes longer is left running, for Python cannot end it, and is not waited for."""
    if seconds is None:
        return function(*given)
    # Not a pool of concurrent.futures: that would wait for the function when the process ends.
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*given))
        except (Exception, SystemExit) as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    if not wait([future], seconds).done:
        raise _TookTooLong
    return future.result()
