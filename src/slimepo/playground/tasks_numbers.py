"""The families whose answers are numbers: arithmetic and lists."""

from __future__ import annotations

from random import Random

from slimepo.playground.families import Family, Problem, Task, joined, matches, without, wordy

_is_number = matches(r"0|[1-9][0-9]*")
_is_list = matches(r"(0|[1-9][0-9]*)( (0|[1-9][0-9]*))*")


def _malformed_number(task: Task, rng: Random) -> list[str]:
    return [*wordy(task.gold), f"0{task.gold}", f"{task.gold}-"]


def _malformed_list(task: Task, rng: Random) -> list[str]:
    separator = rng.choice([", ", "-", "  "])
    return [*wordy(task.gold), task.gold.replace(" ", separator), f"{task.gold} and"]


def _digits(number: int) -> list[int]:
    """Decimal digits, units first."""
    return [int(digit) for digit in reversed(str(number))]


def _number(digits: list[int]) -> int:
    return sum(digit * 10**place for place, digit in enumerate(digits))


def _draw_add(rng: Random) -> Problem:
    a, b = rng.randint(10, 999), rng.randint(1, 9)
    return Problem({"a": str(a), "b": str(b)}, str(a + b), numbers=(a, b))


def _slips_add(task: Task, rng: Random) -> list[str]:
    a, b = task.numbers
    width = max(len(str(a)), len(str(b)))
    pairs = zip(_digits(a + 10**width), _digits(b + 10**width), strict=True)
    no_carry = _number([(x + y) % 10 for x, y in list(pairs)[:width]])
    return [str(n) for n in (no_carry, a + b + 1, a + b - 1, a + b + 10, a + b - 10)]


def _draw_subtract(rng: Random) -> Problem:
    high, low = rng.randint(10, 999), rng.randint(1, 9)
    return Problem({"a": str(high), "b": str(low)}, str(high - low), numbers=(high, low))


def _slips_subtract(task: Task, rng: Random) -> list[str]:
    high, low = task.numbers
    width = len(str(high))
    pairs = zip(_digits(high), _digits(low + 10**width)[:width], strict=True)
    no_borrow = _number([abs(x - y) for x, y in pairs])
    gold = high - low
    return [str(n) for n in (no_borrow, gold + 1, gold - 1, gold + 10, gold - 10) if n >= 0]


def _draw_sort(rng: Random) -> Problem:
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    return Problem({"list": joined(numbers)}, joined(sorted(numbers)), numbers=tuple(numbers))


def _slips_sort(task: Task, rng: Random) -> list[str]:
    right = sorted(task.numbers)
    at = rng.randrange(len(right) - 1)
    swapped = [*right[:at], right[at + 1], right[at], *right[at + 2 :]]
    return [joined(swapped), joined(without(right, at)), joined(right[::-1])]


def _draw_largest(rng: Random) -> Problem:
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    return Problem({"list": joined(numbers)}, str(max(numbers)), numbers=tuple(numbers))


def _slips_largest(task: Task, rng: Random) -> list[str]:
    second = sorted(task.numbers)[-2]
    return [str(second), str(task.numbers[0]), str(task.numbers[-1])]


def _draw_even(rng: Random) -> Problem:
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    # One of each kind at least, so that there is something to answer and something to get wrong.
    numbers[0] -= numbers[0] % 2
    numbers[1] += 1 - numbers[1] % 2
    rng.shuffle(numbers)
    even = [n for n in numbers if n % 2 == 0]
    return Problem({"list": joined(numbers)}, joined(even), numbers=tuple(numbers))


def _slips_even(task: Task, rng: Random) -> list[str]:
    odd = rng.choice([n for n in task.numbers if n % 2])
    even = [n for n in task.numbers if n % 2 == 0]
    one_too_many = [n for n in task.numbers if n % 2 == 0 or n == odd]
    return [joined(one_too_many), joined(without(even, rng.randrange(len(even))))]


def _draw_between(rng: Random) -> Problem:
    low = rng.randint(1, 1100)
    high = low + rng.randint(2, 7)
    return Problem({"a": str(low), "b": str(high)}, joined(range(low + 1, high)), numbers=(low, high))


def _slips_between(task: Task, rng: Random) -> list[str]:
    low, high = task.numbers
    ranges = [(low, high), (low + 1, high + 1), (low, high + 1), (low + 1, high - 1)]
    return [joined(range(first, end)) for first, end in ranges]


# name, templates; draw, valid, slips, malformed
# fmt: off
NUMBER_FAMILIES: tuple[Family, ...] = (
    Family("add", ("Add {a} and {b}.", "What is {a} plus {b}?", "Give {a} plus {b}."),
           _draw_add, _is_number, _slips_add, _malformed_number),
    Family("subtract", ("Subtract {b} from {a}.", "What is {a} minus {b}?", "Give {a} minus {b}."),
           _draw_subtract, _is_number, _slips_subtract, _malformed_number),
    Family("sort", ("Sort {list}.", "Sort the numbers {list}.", "Give {list} in order."),
           _draw_sort, _is_list, _slips_sort, _malformed_list),
    Family("largest", ("What is the largest of {list}?", "Give the largest number in {list}."),
           _draw_largest, _is_number, _slips_largest, _malformed_number),
    Family("even", ("List the even numbers of {list}.", "What numbers in {list} are even?"),
           _draw_even, _is_list, _slips_even, _malformed_list),
    Family("between", ("List the numbers between {a} and {b}.", "What numbers are between {a} and {b}?"),
           _draw_between, _is_list, _slips_between, _malformed_list),
)
# fmt: on
