"""Colours, lines and bands: told apart by everybody, and drawn from what was logged."""

import itertools
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from slimepo.report.figures import COLOURS, spread_out, styles
from slimepo.report.groups import Cell, Group, change, group_records, short_names
from slimepo.report.panels import gradient_tails
from slimepo.report.records import Record, Source
from slimepo.report.tables import start_group, start_groups

# Linear RGB to what people with the two common deficiencies see (Viénot, Brettel and Mollon 1999).
DEFICIENCIES = {
    "protan": ((0.11238, 0.88762, 0), (0.11238, 0.88762, 0), (0.00401, -0.00401, 1)),
    "deutan": ((0.29275, 0.70725, 0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1)),
}


def run(name: str, loss: str = "slime", rate: float = 1e-4, **changes: object) -> Record:
    settings = {"loss": loss, "learning_rate": rate, "name": name}
    values = {"settings": settings, "learning_rate": rate, "seed": 0} | changes
    return Record(name, "", loss, **values)  # type: ignore[arg-type]


def palette(scheme: str) -> dict[str, tuple[float, ...]]:
    """The style sheet's variables c0 to c5, in linear RGB."""
    template = (resources.files("slimepo.report") / "template.html.j2").read_text()
    light, dark = template.split("prefers-color-scheme: dark", 1)
    part = {"light": light, "dark": dark}[scheme]
    return {name: linear(value) for name, value in re.findall(r"--(c\d|paper): (#\w+)", part)}


def linear(colour: str) -> tuple[float, ...]:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    return tuple(s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)


def lab(rgb: tuple[float, ...]) -> tuple[float, float, float]:
    """CIE 1976 L*a*b* under D65."""
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    x, y, z = (max(0.0, sum(a * b for a, b in zip(row, rgb, strict=True))) for row in rows)
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x / 0.9505, y, z / 1.089))
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def seen(rgb: tuple[float, ...], by: str) -> tuple[float, ...]:
    if by == "all colours":
        return rgb
    return tuple(sum(a * b for a, b in zip(row, rgb, strict=True)) for row in DEFICIENCIES[by])


def luminance(rgb: tuple[float, ...]) -> float:
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("by", ["all colours", *DEFICIENCIES])
def test_colours_are_told_apart_also_by_the_colour_blind(scheme: str, by: str) -> None:
    colours = {name: value for name, value in palette(scheme).items() if name != "paper"}
    assert len(colours) == len(COLOURS)
    for one, other in itertools.combinations(colours, 2):
        pair = (lab(seen(colours[one], by)), lab(seen(colours[other], by)))
        distance = sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) ** 0.5
        assert distance > 15, (one, other, distance)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_stand_out_from_the_page(scheme: str) -> None:
    colours = palette(scheme)
    paper = luminance(colours.pop("paper"))
    for name, colour in colours.items():
        bright, dull = sorted((paper, luminance(colour)), reverse=True)
        # The contrast that WCAG 2.2 asks for in graphics.
        assert (bright + 0.05) / (dull + 0.05) >= 3, name


def test_colour_is_the_objective_and_line_the_learning_rate() -> None:
    runs = [run(f"{loss} {rate}", loss, rate) for loss in ("slime", "dpo") for rate in (1e-4, 1e-3)]
    look = styles(group_records(runs))
    assert look["slime 0.0001"].colour == look["slime 0.001"].colour != look["dpo 0.0001"].colour
    assert look["slime 0.0001"].marker == look["dpo 0.0001"].marker != look["slime 0.001"].marker
    assert look["slime 0.0001"].line == look["dpo 0.0001"].line != look["slime 0.001"].line


@pytest.mark.parametrize("objectives", [1, 2, 4, 7, 12])
def test_twelve_runs_have_twelve_styles(objectives: int) -> None:
    groups = group_records([run(f"run {at}", f"loss {at % objectives}") for at in range(12)])
    look = styles(groups)
    assert len({(style.colour, str(style.line), style.marker) for style in look.values()}) == 12
    if objectives == 1:
        assert len({style.colour for style in look.values()}) == len(COLOURS)


def seeds(*ends: tuple[float, float]) -> Group:
    """A seed each, with its figure before and after training."""
    records = (run("a", seed=at, before={"x": was}, after={"x": now}) for at, (was, now) in enumerate(ends))
    return Group("g", tuple(records))


def test_a_change_is_the_mean_of_each_seeds_own() -> None:
    # Changes of 4, 1 and 1 points: 4.303 * sqrt(3) / sqrt(3).
    assert change(seeds((1, 5), (2, 3), (3, 4)), "x", ".1f") == Cell("4.0", "+2.0 ± 4.3")
    assert change(seeds((1, 5)), "x", ".1f") == Cell("5.0", "+4.0")
    assert change(Group("g", (run("a", after={"x": 2}),)), "x", ".1f") == Cell("2.0")


def test_runs_that_started_from_different_stages_have_a_line_a_start() -> None:
    def of(start: str, before: float) -> Record:
        return run(f"from {start}", start=start, before={"exact_match": before}, after={"exact_match": 1.0})

    mixed = [Source(Path("r"), (of("sft", 0.2), of("sft", 0.2), of("long", 0.4)))]
    assert {group.label: group.first.after["exact_match"] for group in start_groups(mixed)} == {
        "start: sft": 0.2,
        "start: long": 0.4,
    }
    assert start_group(mixed) is None
    alike = start_group([Source(Path("r"), (of("sft", 0.2), of("sft", 0.2)))])
    assert alike is not None
    assert alike.label == "start: sft"


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("slime-s", "slime (2 seeds)"),
        ("slime-seed-", "slime (2 seeds)"),
        ("calibrated/seed-", "calibrated (2 seeds)"),
        ("seed-", "SLIME (2 seeds)"),
    ],
    ids=["short", "long", "the arm of a sweep", "nothing but a seed"],
)
def test_seeds_are_called_what_their_names_have_in_common(name: str, label: str) -> None:
    groups = group_records([replace(run(f"{name}{n}"), seed=n, settings={"loss": "slime"}) for n in (0, 1)])
    assert [group.label for group in groups] == [label]


def test_one_seed_of_an_arm_is_called_by_the_arm_unless_another_is_too() -> None:
    alone = group_records([run("slime/seed-0"), run("dpo/seed-0", "dpo")])
    assert [group.label for group in alone] == ["slime", "dpo"]
    twice = group_records([run("slime/seed-0"), run("slime/seed-1", "dpo")])
    assert [group.label for group in twice] == ["slime/seed-0", "slime/seed-1"]


def test_beside_its_line_a_group_has_its_name_or_its_objective_where_that_is_shorter() -> None:
    one = group_records([run("my-run"), run("other", "dpo")])
    assert list(short_names(one, 6).values()) == ["my-run", "other"]
    assert list(short_names(one, 5).values()) == ["SLIME", "DPO"]
    alike = group_records([run("a-low-rate"), run("a-high-rate", rate=1e-3)])
    assert list(short_names(alike, 5).values()) == ["a-low-rate", "a-high-rate"]


def test_names_stand_as_near_to_their_lines_as_they_can() -> None:
    assert spread_out([1.0, 5.0], 1.0, 0.0, 10.0) == [1.0, 5.0]
    # A stack around the mean of what it is of.
    assert spread_out([5.0, 5.0, 5.0, 9.0], 1.0, 0.0, 10.0) == [4.0, 5.0, 6.0, 9.0]
    # One that grows into its neighbour takes it in, and none leaves the picture.
    assert spread_out([5.0, 5.0, 5.0, 6.0], 1.0, 0.0, 10.0) == [3.75, 4.75, 5.75, 6.75]
    assert spread_out([0.0, 0.0], 1.0, 0.0, 10.0) == [0.0, 1.0]
    assert spread_out([9.5, 10.0], 1.0, 0.0, 10.0) == [9.0, 10.0]


def test_objectives_that_are_more_than_colours_still_keep_their_own() -> None:
    losses = ["sft", "dpo", "grpo", "rloo", "ppo", "kto", "slime"]
    look = styles(group_records([run(loss, loss) for loss in losses]))
    assert (look["slime"].colour, look["dpo"].colour, look["sft"].colour) == (
        COLOURS[0],
        COLOURS[1],
        COLOURS[3],
    )
    assert len({(style.colour, style.marker) for style in look.values()}) == 7


def test_a_heavy_tail_of_gradients_is_drawn_against_the_runs_own_median() -> None:
    norms = [4.0] * 20 + [2.0] * 19 + [40.0]
    lines = [{"step": float(step), "loss": 1.0, "grad_norm": norm} for step, norm in enumerate(norms)]
    (panel,) = gradient_tails(group_records([run("a", curve=lines)]))
    assert "up to 10 times" in panel.svg
    assert gradient_tails(group_records([run("a", curve=lines[:19])])) == []
