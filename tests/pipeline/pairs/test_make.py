"""Pairs from samples: which is chosen and which rejected, and a killed run that goes on."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimepo.data.chat import chat_format
from slimepo.data.read import read_rows
from slimepo.errors import InputError
from slimepo.files import json_lines
from slimepo.model.chat import ChatModel
from slimepo.model.generate import Completion
from slimepo.onpolicy.settings import Rollouts
from slimepo.pipeline.pairs import samples as module
from slimepo.pipeline.pairs.make import Pair, judged_pairs
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.pipeline.recipe.sections import Pairs
from slimepo.pipeline.run import only_pairs, run_recipe
from slimepo.pipeline.tasks import RunTasks, Task
from slimepo.playground.tasks import judge
from slimepo.playground.world import WorldSettings
from slimepo.terminal import make_console
from tests.pipeline.conftest import world_recipe
from tests.tiny import letter_tokenizer, tiny_model

ROW = {"family": "add", "prompt": "Add 2 and 3.", "answer": "5", "numbers": [2, 3], "words": []}
TASK = Task("add|2|3", [{"role": "user", "content": "Add 2 and 3."}], ROW)
TASKS = RunTasks([TASK], [], lambda task, text: judge(task.row, text), 8, 8)


def made(samples: list[str], gold: bool = True) -> tuple[str, str] | None:
    pairs, _ = judged_pairs([TASK], [samples], TASKS, gold=gold)
    return (pairs[0].chosen, pairs[0].rejected) if pairs else None


def test_a_right_sample_is_chosen_and_a_wrong_one_rejected() -> None:
    assert made(["4", "5"]) == ("5", "4")


def test_the_right_answer_is_chosen_where_no_sample_is_right_if_that_is_asked_for() -> None:
    assert made(["4", "6"]) == ("5", "4")
    assert made(["4", "6"], gold=False) is None


def test_the_most_frequent_wrong_sample_is_rejected() -> None:
    assert made(["4", "6", "6", "5"]) == ("5", "6")


def test_a_wrong_sample_of_valid_form_goes_before_a_more_frequent_broken_one() -> None:
    assert made(["5.", "5.", "5.", "5", "7"]) == ("5", "7")


def test_a_sample_that_can_be_mended_is_chosen_so_and_rejected_as_it_was() -> None:
    def mend(task: Task, text: str) -> str:
        return text.rstrip(".")

    pairs, counts = judged_pairs([TASK] * 3, [["4.", "5."], ["5", "5."], ["6"]], TASKS, gold=False, mend=mend)
    # Of the second task a sample is right as it is.
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("5", "5."), ("5", "5.")]
    assert (counts["mended_chosen"], counts["dropped: none right"]) == (1, 1)


def test_a_broken_sample_is_rejected_where_there_is_nothing_better() -> None:
    assert made(["5", "5.", "05", "05"]) == ("5", "05")


def test_the_earlier_sample_wins_a_tie() -> None:
    assert made(["9", "8", "8", "9"]) == ("5", "9")


def test_empty_samples_are_no_answers() -> None:
    assert made(["", "", "4"]) == ("5", "4")


def test_another_spelling_of_a_right_answer_is_right() -> None:
    row = {
        "family": "json",
        "prompt": "?",
        "answer": '{"pet": "ruso"}',
        "numbers": [],
        "words": ["pet", "pet", "ruso"],
    }
    pairs, _ = judged_pairs([Task("j", [], row)], [['{"pet":"ruso"}', '{"pet": "r"}']], TASKS, gold=True)
    assert pairs[0].chosen == '{"pet":"ruso"}'


@pytest.mark.parametrize("gold", [True, False])
def test_every_task_is_accounted_for(gold: bool) -> None:
    samples = [["5", "4"], ["4"], ["5.", "5"], ["5", "5"], [], [""]]
    pairs, counts = judged_pairs([TASK] * 6, samples, TASKS, gold=gold)
    assert counts == {
        "tasks": 6,
        "pairs": 3 if gold else 2,
        "gold_chosen": int(gold),
        "invalid_rejected": 1,
        "dropped: all right": 1,
        "dropped: none right": int(not gold),
        "dropped: no sample": 2,
    }
    assert pairs[-1] == Pair(TASK, "5", "5.", gold=False, rejected_valid=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A recipe of SFT and SLIME on its samples, run to its end."""
    folder = tmp_path_factory.mktemp("pairs")
    values = world_recipe(
        folder, WorldSettings(demonstrations=200, preference_prompts=40, heldout_prompts=24), batch_rows=32
    )
    values["stages"][0]["micro_batch_size"] = 20
    values["pairs"] = {"own": {"model": "sft", "per_prompt": 4, "max_new_tokens": 8, "gold": True}}
    values["stages"] += [
        {"loss": "slime", "part": "own", "learning_rate": 1e-3, "batch_size": 20, "max_steps": 2}
    ]
    run_recipe(make_recipe(values), folder / "run", make_console(quiet=True))
    return values, folder / "run"


def test_the_pairs_are_an_ordinary_file_named_after_their_tasks(base: tuple[dict[str, Any], Path]) -> None:
    _, run = base
    facts = json.loads((run / "own" / "pairs.json").read_text())
    for which in ("train", "heldout"):
        rows = read_rows(run / "own" / f"{which}.jsonl").preferences
        assert len(rows) == facts[which]["pairs"] > 10
    stage = json.loads((run / "slime" / "stage.json").read_text())
    assert stage["rows"] == facts["train"]["pairs"]
    assert (stage["heldout"]["pairs"], stage["heldout"]["prompts"]) == (facts["heldout"]["pairs"], 24)
    assert {"exact_match", "format_valid", "margin"} <= stage["heldout"]["before"].keys() & stage["heldout"][
        "after"
    ].keys()
    sft = json.loads((run / "sft" / "stage.json").read_text())["heldout"]
    assert "pairs" not in sft
    assert sft["after"]["exact_match"] == stage["heldout"]["before"]["exact_match"]
    lines = json_lines(run / "slime" / "answers.jsonl")
    right = [line["after"]["correct"] and line["after"]["finished"] for line in lines]
    assert sum(right) / 24 == stage["heldout"]["after"]["exact_match"]


def test_samples_are_computed_in_the_dtype_that_was_asked_for(
    base: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, run = base
    shutil.copytree(run, tmp_path / "run")
    for made in ("own", "slime"):
        shutil.rmtree(tmp_path / "run" / made)
    used = []

    def sampled(answerer: ChatModel, of_set: Any, *_: Any, **__: Any) -> list[list[str]]:
        used.append(next(answerer.model.parameters()).dtype)
        return [["1", "2"] for _ in of_set]

    monkeypatch.setattr("slimepo.pipeline.pairs.make.sampled", sampled)
    own = values["pairs"]["own"] | {"dtype": "bfloat16"}
    only_pairs(make_recipe(values | {"pairs": {"own": own}}), tmp_path / "run", make_console(quiet=True))
    assert set(used) == {torch.bfloat16}


def test_the_monitor_is_given_the_form_check(base: tuple[dict[str, Any], Path]) -> None:
    answers = next(x for x in json_lines(base[1] / "slime" / "monitor.jsonl") if x["kind"] == "generation")
    assert answers["valid"] is not None


def test_a_killed_run_goes_on_and_samples_nothing_twice(
    base: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    values, run = base
    whole = {
        name: (run / "own" / name).read_text()
        for name in ("train.jsonl", "heldout.jsonl", "samples-train.jsonl")
    }
    shutil.rmtree(run / "slime")
    for name in ("pairs.json", "train.jsonl", "heldout.jsonl", "samples-heldout.jsonl"):
        (run / "own" / name).unlink()
    lines = whole["samples-train.jsonl"].splitlines(keepends=True)
    # Killed in the middle of a line, of a batch.
    (run / "own" / "samples-train.jsonl").write_text("".join(lines[:19]) + lines[19][:9])
    kept: list[int] = []
    append = module.append_json_lines
    monkeypatch.setattr(
        module, "append_json_lines", lambda path, rows: (kept.append(len(rows)), append(path, rows))
    )
    run_recipe(make_recipe(values), run, make_console(quiet=True))
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (run / "own" / name).read_text() == whole[name]
    # Batches of 8 prompts: two were done, the third is asked again, of which three lines stood there already.
    assert sum(kept) == 40 - 19 + 24


def test_changed_tasks_are_refused(base: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    values, run = base
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "slime")
    tasks = Path(values["tasks"]["train"])
    text = tasks.read_text()
    try:
        tasks.write_text("".join(text.splitlines(keepends=True)[1:]))
        with pytest.raises(InputError, match="a file of tasks has changed since"):
            run_recipe(make_recipe(values), tmp_path / "run", make_console(quiet=True))
    finally:
        tasks.write_text(text)


def test_a_smoke_run_makes_its_pairs_up_and_says_so(
    base: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    shown = make_console(file=io.StringIO(), width=200)
    results = run_recipe(make_recipe(base[0] | {"smoke": True}), tmp_path / "smoke", shown)
    assert [result["steps"] for result in results] == [5, 5]
    assert "a smoke run samples nothing: they are made up" in shown.file.getvalue()


class Engine:
    """Answers a, b, c, ..., the first of them cut off, and keeps what it is asked."""

    def __init__(self, settings: Rollouts) -> None:
        self.settings = settings
        self.asked: list[str] = []
        self.state: list[str] = []

    def load(self, model: Any) -> None:
        self.state.append("loaded")

    def sample(self, end_ids: Any, prompts: Any, seeds: Any) -> list[list[Completion]]:
        self.asked += [prompt.id for prompt in prompts]
        return [
            [Completion([3 + place, 1], place > 0) for place in range(self.settings.samples)] for _ in prompts
        ]

    def close(self) -> None:
        self.state.append("closed")


def test_another_engine_may_write_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Engine] = []

    def opened(settings: Rollouts, **_: Any) -> Engine:
        engines.append(Engine(settings))
        return engines[-1]

    monkeypatch.setattr(module, "open_engine", opened)
    tokenizer = letter_tokenizer()
    answerer = ChatModel(tiny_model(), tokenizer, chat_format(tokenizer), frozenset({1}))
    asked = Pairs(per_prompt=3, max_new_tokens=4, engine="http://localhost:1")
    tasks, of = [replace(TASK, id=name) for name in "abc"], replace(TASKS, batch_rows=3)
    (tmp_path / "kept.jsonl").write_text(json.dumps({"task": "b", "answers": ["kept"]}) + "\n")
    console = make_console(quiet=True)
    found = module.sampled(answerer, tasks, of, asked, 0, tmp_path / "kept.jsonl", console, "samples")
    # What was cut off is no answer, what is kept is not asked for again, and the engine is let go.
    assert found == [["b", "c"], ["kept"], ["b", "c"]]
    assert (engines[0].asked, engines[0].state) == (["a", "c"], ["loaded", "closed"])
    assert (engines[0].settings.samples, engines[0].settings.max_new_tokens) == (3, 4)
    again = module.sampled(answerer, tasks, of, asked, 0, tmp_path / "kept.jsonl", console, "samples")
    assert (again, len(engines)) == (found, 1), "an engine is not started for nothing"
    assert module.sampled(answerer, [], of, asked, 0, tmp_path / "none.jsonl", console, "samples") == []


def test_a_server_that_is_not_there_is_found_before_anything_is_trained(
    base: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    recipe = json.loads(json.dumps(base[0]))
    for made in recipe["pairs"].values():
        made["engine"] = "http://localhost:1"
    with pytest.raises(InputError, match="there is no vLLM server at http://localhost:1"):
        run_recipe(make_recipe(recipe), tmp_path / "run", make_console(quiet=True))
    assert not list(tmp_path.glob("run/*/stage.json"))


def test_an_engine_that_is_none_is_found_before_anything_is_loaded() -> None:
    values = {
        "model": "m",
        "tasks": {"train": "t", "checker": "c:f"},
        "stages": [{"loss": "dpo", "part": "s"}],
    }
    with pytest.raises(InputError, match="pairs 's': rollouts: engine = 'vlm' is unknown"):
        make_recipe(values | {"pairs": {"s": {"engine": "vlm"}}})
