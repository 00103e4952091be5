"""The displacement map: where chosen and rejected answers went, on the page and as a picture."""

import io
import re

import pytest
from PIL import Image

from slimepo.report.findings import findings, verdict
from slimepo.report.groups import Group
from slimepo.report.map import map_panel, map_picture, moves
from slimepo.report.records import Record
from slimepo.report.tables import best_group, other_seeds


def group(label: str, *seeds: tuple[float, float]) -> Group:
    """A run a seed that moved chosen and rejected answers by so much."""
    records = [
        Record(
            label, "run", label.lower(), seed=at,
            before={"logps/chosen": -1.0, "logps/rejected": -2.0},
            after={"logps/chosen": -1.0 + chosen, "logps/rejected": -2.0 + rejected},
        )
        for at, (chosen, rejected) in enumerate(seeds)
    ]  # fmt: skip
    return Group(label, tuple(records))


GROUPS = [
    group("SFT", (0.2, 0.1)),
    group("SLIME", (0.1, -0.1), (0.2, -0.2), (0.15, -0.15)),
    group("DPO", (-0.3, -0.5), (-0.4, -0.6), (-0.35, -0.55)),
    group("odd", (-0.1, 0.1)),
    group("still", (0.001, -0.3)),
]


def test_a_move_is_the_mean_of_its_seeds_in_one_of_four_quadrants() -> None:
    found = {move.group.label: move for move in moves(GROUPS)}
    assert found["SLIME"].chosen.value == pytest.approx(0.15)
    assert found["SLIME"].rejected.value == pytest.approx(-0.15)
    assert {name: move.quadrant for name, move in found.items()} == {
        "SFT": "both up",
        "SLIME": "chosen up, rejected down",
        "DPO": "both down: unlearning",
        "odd": "chosen down, rejected up",
        "still": "chosen up, rejected down",
    }


def test_runs_without_figures_are_not_on_the_map() -> None:
    nothing = Group("new", (Record("new", "run", "slime"),))
    assert map_panel([nothing]) is None
    assert map_picture([nothing], "title") is None
    panel = map_panel([nothing, *GROUPS])
    assert panel is not None
    assert "DPO: chosen -0.350, rejected -0.550, both down: unlearning" in panel.svg
    assert "new" not in panel.svg


def test_the_picture_is_on_white_in_the_colours_of_the_page() -> None:
    picture = map_picture(GROUPS, "A title")
    assert picture is not None
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 24) or []}
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert {(0x00, 0x9E, 0x73), (0x00, 0x5A, 0x9C), (0xC0, 0x64, 0x9B)} <= colours
    assert (3, 3, 3) not in colours


def test_many_runs_are_named_in_a_legend_under_the_map() -> None:
    panel = map_panel([group(f"run {at}", (at / 10, -at / 10)) for at in range(1, 14)])
    assert panel is not None
    assert len(re.findall(">run (?:3|13)<", panel.svg)) == 2
    assert ">DPO<" in (map_panel(GROUPS) or panel).svg


def test_of_groups_with_other_seeds_the_one_that_gained_most_is_the_best() -> None:
    def matched(label: str, *seeds: tuple[int, float, float]) -> Group:
        records = (
            Record(label, "run", "slime", seed=seed, before={"exact_match": was}, after={"exact_match": now})
            for seed, was, now in seeds
        )
        return Group(label, tuple(records))

    gained, high = matched("gained", (0, 0.1, 0.4)), matched("high", (0, 0.1, 0.3), (1, 0.6, 0.7))
    best = best_group([gained, high])
    assert best is gained
    assert other_seeds([gained, high])
    assert best_group([gained, matched("more", (0, 0.3, 0.5))]) is not gained
    (said,) = (each.text for each in findings([gained, high], []) if each.head == "Best exact match")
    assert "Not all have the same seeds, so that the change since the start decides." in said
    assert said.startswith("gained: 40.0")


def test_the_verdict_says_who_unlearnt() -> None:
    said = verdict(GROUPS)
    assert "became likelier, in nats a token: SFT +0.200, SLIME +0.150 ± 0.124." in said
    assert "less likely, in nats a token: DPO -0.350 ± 0.124, odd -0.100." in said
    assert "They did not clearly move with still (+0.001)." in said
    assert "The gap to rejected answers did not clearly widen with odd (-0.200)." in said
    assert "With DPO rejected answers fell too: that is unlearning." in said
    assert verdict([]) == ""


def test_of_one_run_the_verdict_leaves_its_name_out() -> None:
    still = next(group for group in GROUPS if group.label == "still")
    assert verdict([still]).startswith("Chosen answers did not clearly move (+0.001 nats a token).")
    odd = next(group for group in GROUPS if group.label == "odd")
    said = verdict([odd])
    assert said.startswith("Chosen answers became less likely, in nats a token: -0.100.")
    assert "The gap to rejected answers did not clearly widen (-0.200 nats a token)." in said
