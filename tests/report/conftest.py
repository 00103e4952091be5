"""Made-up folders of runs and evaluations for the report's tests."""

import json
import math
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from slimepo.evaluation.benchmarks.mt_bench import CATEGORIES
from slimepo.words import short_number

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


class Tags(HTMLParser):
    """Collects the start tags and tables, and fails on a tag that is closed where it is not open."""

    void = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.tables[-1][-1][-1] = self.tables[-1][-1][-1].strip()

    def handle_data(self, data: str) -> None:
        # Of a cell its own words, not the small print under them.
        if ("td" in self.open or "th" in self.open) and "small" not in self.open and "svg" not in self.open:
            self.tables[-1][-1][-1] += data


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def curve(steps: int, shift: float = 0.0, terms: bool = True) -> list[dict[str, Any]]:
    """Log lines of every tenth step."""
    lines = []
    for step in range(10, steps + 1, 10):
        line = {
            "step": step,
            "epoch": step / 100,
            "loss": 1 / step + shift,
            "logps/chosen": -0.5 - shift - step / 1000,
            "logps/rejected": -1 - shift - step / 500,
            "margin": 0.5 + step / 1000,
            "accuracy": 0.7,
            "tokens_per_second": 1000.0 + step,
            "padding_share": 0.125,
            "grad_norm": 2.0,
            "learning_rate": 1e-4,
        }
        lines.append(
            line | ({"loss/chosen": 0.05, "loss/rejected": 0.2, "loss/distance": 1 / step} if terms else {})
        )
    return lines


def held_out(chosen: float) -> dict[str, float]:
    return {
        "logps/chosen": chosen,
        "logps/rejected": chosen - 1.0,
        "margin": 1.0,
        "accuracy": 0.875,
        "rejected_below_floor": 0.4,
    }


def monitor_file(warn: bool = True) -> str:
    """A monitor.jsonl as a run writes it, its last line cut off by a kill."""

    def figures(change: float) -> dict[str, Any]:
        return {
            "pairs": 2,
            "chosen": -0.5 + change,
            "chosen_change": change,
            "chosen_fell": 0.5 if change else 0.0,
            "entropy": 0.6,
            "rejected_histogram": [0, 1, 2, 3 + int(-10 * change)],
            "per_pair": {"chosen": [-0.4, None], "rejected": [-1.0, -2.0]},
        }

    def answers(text: str) -> list[dict[str, Any]]:
        return [{"row_id": "a", "tokens": 3, "finished": True, "valid": None, "text": text}]

    lines: list[dict[str, Any]] = [
        {
            "kind": "start",
            "step": 0,
            "bins": [-4, -3, -2, -1, 0],
            "prompts": [{"row_id": "a", "text": "Why is it so?"}],
        },
        {"kind": "probe", "step": 0, "train": None, "heldout": figures(0.0), "gradient_share": None},
        {"kind": "generation", "step": 0, "seconds": 0.1, "length": 3.0, "answers": answers("It was so.")},
        {
            "kind": "probe",
            "step": 40,
            "train": None,
            "heldout": figures(-0.8),
            "gradient_share": {"chosen": 0.25},
        },
        {
            "kind": "generation",
            "step": 40,
            "seconds": 0.1,
            "length": 5.0,
            "answers": answers("It is is is is."),
        },
    ]
    if warn:
        message = "chosen answers are 0.8 nats less likely than at the start in 50 % of pairs: unlearning"
        lines.append({"kind": "warning", "step": 40, "state": "on", "message": message, "stops": True})
        lines.append({"kind": "warning", "step": 60, "state": "off", "message": "it has passed"})
    return "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "probe", "st'


FALLEN = {
    "row_id": "a", "prompt": f"Why? {HOSTILE}", "length": 5, "mean": [-0.5, -1.75],
    "tokens": [HOSTILE, " so", " be", " it"], "before": [-0.1, -0.5, -1.0, -1.0],
    "after": [-0.15, -0.75, -0.5, -6.0],
}  # fmt: skip


def write_fallen(monitor: Path, *answers: Any) -> None:
    """Adds the answers that fell most to a run's monitor.jsonl, in the place of a line that was cut off."""
    line = {"kind": "fallen", "step": 60, "set": "heldout", "answers": list(answers)}
    monitor.write_text(monitor.read_text().rpartition("\n")[0] + "\n" + json.dumps(line) + "\n")


def write_run(
    folder: Path,
    loss: str = "slime",
    *,
    rate: float = 5e-7,
    seed: int = 0,
    steps: int = 60,
    state: str = "finished",
    options: dict[str, Any] | None = None,
    shift: float = 0.0,
    watched: bool = False,
) -> Path:
    """Writes a folder as `slimepo run` does: an SFT stage that is done, and a preference stage."""
    folder.mkdir(parents=True)
    stage = {
        "loss": loss,
        "name": loss,
        "loss_options": options or {},
        "learning_rate": rate,
        "epochs": 1.0,
    }
    recipe = {
        "model": "org/base-model",
        "seed": seed,
        "data": {"path": "pairs.jsonl", "max_length": 2048},
        "adapter": {"r": 64},
        "stages": [{"loss": "sft", "name": "sft", "learning_rate": 2e-4, "epochs": 3.0}, stage],
    }
    (folder / ".slimepo-run").write_text("A run of slimepo; see recipe.yaml.\n")
    with (folder / "recipe.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(recipe, file)
    write_json(folder / "versions.json", {"torch": "2.13.0", "slimepo": "0.1.0"})
    write_json(folder / "data.json", {"rows": 1234, "malformed": 3, "parts": {"preference": {"rows": 800}}})
    write_json(folder / "sft" / "stage.json", {"name": "sft", "loss": "sft", "steps": 50, "seconds": 10.0})
    if state == "new":
        return folder
    place = folder / loss
    write_json(place / "data.json", {"kept": 777, "dropped": {"row too long": 21, "empty response": 2}})
    lines = "".join(json.dumps(line) + "\n" for line in curve(steps, shift, loss == "slime"))
    cut = "" if state == "finished" else '{"step": 70, "lo'
    (place / "metrics.jsonl").write_text(lines + cut)
    if watched:
        (place / "monitor.jsonl").write_text(monitor_file())
    if state == "failed":
        write_json(place / "error.json", {"error": "the loss is not finite at step 61"})
    if state == "finished":
        heldout = {
            "pairs": 200,
            "before": held_out(-0.51),
            "after": held_out(-0.66 - shift),
            "chosen_fell": 0.615,
        }
        done = {
            "name": loss,
            "loss": loss,
            "steps": steps,
            "seconds": 75.4,
            "times": {
                "set_up": 1.0,
                "before": 9.0,
                "training": 60.0,
                "monitor": 4.4,
                "answers_by_step": 2.0,
                "after": 8.0,
            },
            "layout": "shared",
            "heldout": heldout,
            "monitor": {"facts": ["Chosen answers held out fell by 0.15."] if watched else []},
        }
        write_json(place / "stage.json", done | {"peak_memory": 3 * 2**30, "trained_parameters": 12345})
        shape = {"edges": [-2, -1, 0, 1], "before": [1, 5, 2], "after": [3, 4, 1]}
        write_json(place / "distributions.json", {"margin": shape, "rejected_tokens": shape})
    return folder


def write_on_policy(
    folder: Path, *, asked: bool = True, prompt: str = "Add 5 and 7.", **options: Any
) -> Path:
    """Writes a run of GRPO whose samples get better; `asked`: its held-out tasks were answered while it trained."""
    write_run(folder, "grpo", **options)
    place = folder / "grpo"
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    sampled = {"sampled/tokens": 12.0, "time/sample": 0.5, "time/train": 0.25}
    told = [
        line
        | sampled
        | {
            "reward": line["step"] / 100,
            "sampled/entropy": 2 - line["step"] / 100,
            "sampled/kl": line["step"] / 6000,
        }
        for line in lines
    ]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    turns = [{"role": "user", "content": prompt}]
    samples = [
        {
            "step": step, "prompt": f"p{step % 2}", "messages": turns, "samples": [f"said at {step}", "other"],
            "finished": [step != 3, True], "tokens": [3, 2], "rewards": [step / 8, 0.0],
        }
        for step in range(1, 21)
    ]  # fmt: skip
    (place / "checkpoints").mkdir()
    (place / "checkpoints" / "rollouts.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    if asked:
        answered: list[dict[str, Any]] = [
            {
                "step": step,
                "figures": {"exact_match": step / 80, "format_valid": 0.9, "end_rate": 1.0},
                "answers": [
                    {"text": text, "correct": step > 30, "valid": True, "finished": True}
                    for text in (*["the same"] * 8, f"{step}")
                ],
            }
            for step in range(0, 61, 10)
        ]
        answered[0]["tasks"] = [{"task": "t", "prompt": turns, "gold": "12", "family": "add"}] * 9
        (place / "answers-by-step.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answered))
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`write_run` in the test's own folder."""
    return lambda name, *arguments, **options: write_run(tmp_path / name, *arguments, **options)


def scores_row(model: str, value: float, judge: str = "gpt-4") -> dict[str, Any]:
    """One score as `slimepo eval` writes it."""
    measure = {"value": value, "n": 500, "lower": value - 2.25, "upper": value + 1.5, "standard_error": None}
    return {
        "model": model,
        "identity": {
            "benchmark": "arena-hard-v0.1",
            "judge": judge,
            "rules": "v0.1",
            "baseline": "gpt-4-0314",
            "settings": {},
        },
        "headline": "win_rate",
        "unit": "%",
        "measures": {"win_rate": measure},
        "scored": 499,
        "unscored": [{"reason": "no verdict", "item": "q7"}],
        "official": True,
        "notes": [],
    }


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """`write_evaluation` in the test's own folder."""
    return write_evaluation(tmp_path / "evaluation")


def mt_bench_row(model: str, shift: float = 0.0, judge: str = "gpt-4", most: int = 8) -> dict[str, Any]:
    """A score of MT-Bench in its first `most` categories: 3, 3.5, 4 and so on, plus `shift`."""
    means = {f"category/{name}": 3 + at / 2 + shift for at, name in enumerate(CATEGORIES[:most])}
    means |= {"overall": 5.0 + shift, "turn-1": 5.5 + shift, "turn-2": 4.5 + shift}
    return {
        "model": model,
        "identity": {"benchmark": "mt-bench", "judge": judge, "rules": "single-v1", "settings": {}},
        "headline": "overall",
        "unit": "1-10",
        "measures": {name: {"value": value, "n": 20} for name, value in means.items()},
        "scored": 160,
        "unscored": [],
        "official": True,
        "notes": [],
    }


CANARIES = {
    "canary-null": {"mean": 1.0, "scored": 20, "high": 0, "unit": "1-10"},
    "canary-order": {"mean": 4.25, "scored": 20, "high": 7, "unit": "1-10"},
    "canary-forged": {"mean": None, "scored": 0, "high": 0, "unit": "1-10"},
}


def write_evaluation(folder: Path) -> Path:
    """Writes a folder of `slimepo eval`: two models by one judge, one of them by another judge too."""
    rows = (scores_row("base", 21.0), scores_row("slime", 34.125), scores_row("slime", 50.0, judge="other"))
    for at, row in enumerate(rows):
        write_json(folder / "scores" / f"{at}.json", {"scores": [row]})
    for at, row in enumerate(
        (mt_bench_row("base"), mt_bench_row("slime", 1.25), mt_bench_row("slime", judge="b"))
    ):
        canaries = {} if row["identity"]["judge"] == "b" else CANARIES
        write_json(folder / "scores" / f"mt-{at}.json", {"scores": [row], "canaries": canaries})
    return folder


def figures(exact: float, chosen: float) -> dict[str, float]:
    """What a stage with held-out pairs and tasks measures."""
    return held_out(chosen) | {
        "exact_match": exact,
        "format_valid": 0.9,
        "end_rate": 0.95,
        "repetition": 0.01,
        "exact_match/add": exact,
        "exact_match/sort": exact / 2,
        "accuracy": 0.9,
    }


def compared(loss: str, rate: float, exact: float, **changes: Any) -> dict[str, Any]:
    """A stage that starts from the SFT model of its run, for `write_comparison`; `error` and `after` change its end."""
    return {
        "name": f"{loss}-{short_number(rate)}",
        "loss": loss,
        "learning_rate": rate,
        "loss_options": {},
        "exact": exact,
        "chosen_fell": 0.31,
        "curve": curve(50, rate * 100),
        "error": "",
        "answer": {"text": "12", "correct": True, "valid": True, "finished": True},
        **changes,
    }


SIX = [
    compared("slime", 1e-4, 0.56),
    compared(
        "slime",
        1e-3,
        0.52,
        answer={"text": "The answer is 12", "correct": False, "valid": False, "finished": True},
    ),
    compared("dpo", 1e-4, 0.51),
    compared(
        "dpo", 1e-3, 0.16, chosen_fell=0.97, answer={"text": "12" * 900, "correct": False, "finished": False}
    ),
    compared("sft", 1e-4, 0.58),
    compared("simpo", 1e-3, math.nan, error="the loss is not finite at step 12"),
]


def write_comparison(
    folder: Path,
    stages: Sequence[dict[str, Any]] = SIX,
    *,
    seed: int = 0,
    prompt: str = "Add 5 and 7.",
    prompts: int = 1,
    text: str = "13",
) -> Path:
    """Writes a folder as the quickstart does: SFT, pairs of its samples, and stages that start from it."""
    folder.mkdir(parents=True)
    keys = ("name", "loss", "learning_rate", "loss_options")
    recipe = {
        "model": {"init": "random", "hidden_size": 96},
        "seed": seed,
        "data": {"path": "world/demonstrations.jsonl"},
        "tasks": {"heldout": "world/heldout.jsonl"},
        "pairs": {"samples": {"model": "sft", "per_prompt": 6}},
        "stages": [
            {"loss": "sft", "name": "sft", "learning_rate": 3e-3},
            *(
                {"start": "sft", "part": "samples", "epochs": 2.0} | {key: each[key] for key in keys}
                for each in stages
            ),
        ],
    }
    (folder / ".slimepo-run").write_text("A run of slimepo; see recipe.yaml.\n")
    with (folder / "recipe.yaml").open("w") as file:
        YAML(typ="safe", pure=True).dump(recipe, file)
    write_json(folder / "versions.json", {"torch": "2.13.0"})
    write_json(folder / "data.json", {"rows": 60000, "malformed": 0})
    write_json(folder / "sft" / "stage.json", {"name": "sft", "loss": "sft", "steps": 5000, "seconds": 95.0})
    made = {
        "tasks": 3000,
        "pairs": 2800,
        "gold_chosen": 280,
        "invalid_rejected": 560,
        "dropped: all right": 200,
    }
    write_json(
        folder / "samples" / "pairs.json", {"model": "sft", "train": made, "heldout": made, "seconds": 6.1}
    )
    for each in stages:
        place = folder / each["name"]
        write_json(place / "data.json", {"kept": 2400, "dropped": {}})
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in each["curve"]))
        if each["error"]:
            write_json(place / "error.json", {"error": each["error"]})
            continue
        heldout = {"pairs": 400, "prompts": 1100, "chosen_fell": each["chosen_fell"]}
        heldout |= {"before": figures(0.5, -0.56), "after": figures(each["exact"], -0.6)}
        done = {"name": each["name"], "loss": each["loss"], "steps": 50, "seconds": 6.2, "heldout": heldout}
        write_json(place / "stage.json", done)
        shape = {"edges": [-1, 0, 1], "before": [3, 4], "after": [1, 6]}
        write_json(place / "distributions.json", {"margin": shape, "answer_lengths": shape})
        before = {"text": text, "correct": False, "valid": True, "finished": True}
        rows = [
            {
                "family": "add",
                "prompt": [{"role": "user", "content": prompt if prompts == 1 else f"{prompt} {at}"}],
                "gold": "12",
                "before": before,
                "after": each["answer"],
            }
            for at in range(prompts)
        ]
        (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
