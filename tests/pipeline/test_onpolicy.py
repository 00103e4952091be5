"""Stages that sample their own answers, rounds of them, and pairs made without training."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from slimepo.cli import app
from slimepo.data.chat import load_tokenizer
from slimepo.errors import BadFilesError, InputError
from slimepo.evaluation.judge import many
from slimepo.files import json_lines, read_json
from slimepo.model.generate import Completion
from slimepo.onpolicy.rewards import Prompt, Rewarder
from slimepo.pipeline.certify import certify_recipe
from slimepo.pipeline.heldout import AnswersByStep
from slimepo.pipeline.pairs.make import rewarded_pairs, sample_rewards
from slimepo.pipeline.recipe.read import make_recipe
from slimepo.pipeline.recipe.sections import Pairs
from slimepo.pipeline.rewards import check_rewards, make_rewards, reward_weights
from slimepo.pipeline.run import run_recipe
from slimepo.pipeline.tasks import RunTasks, Task
from slimepo.terminal import make_console
from slimepo.types import Verdict
from tests.command import slimepo

REWARD = """
def long(prompt, completions, row):
    return [len(text) * row["worth"] for text in completions]

def length(prompt, completions, row):
    return [float(len(text)) for text in completions]

def right(row, text):
    return len(text) % 2 == 0

def raises(prompt, completions, row):
    return [row["score"] for text in completions]

def not_a_number(prompt, completions, row):
    return [float("nan") for text in completions]

def one_for_all(prompt, completions, row):
    return [1.0]

def without_row(prompt, completions):
    return [1.0 for text in completions]
"""


def write_rows(path: Path, count: int = 6) -> Path:
    rows = [{"prompt": f"Say {i}.", "id": f"task {i}", "worth": 1 + i % 2} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def values(llama_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe whose reward lies in another folder."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "reward.py").write_text(REWARD)
    stage = {
        "loss": "grpo", "rollouts": {"samples": 3, "max_new_tokens": 6}, "reward": f"{tmp_path}/own/reward.py:long",
        "batch_size": 2, "micro_batch_size": 1, "max_steps": 2, "learning_rate": 1e-3, "save_every": 1,
    }  # fmt: skip
    return {
        "model": str(llama_folder),
        "adapter": "none",
        "tasks": {"train": str(write_rows(tmp_path / "prompts.jsonl"))},
        "stages": [stage],
    }


def run(values: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    return run_recipe(make_recipe(values), out, make_console(quiet=True))


def test_a_stage_learns_from_its_own_samples(values: dict[str, Any], tmp_path: Path) -> None:
    (done,) = run(values, tmp_path / "run")
    assert done["steps"] == 2
    lines = json_lines(tmp_path / "run" / "grpo" / "checkpoints" / "rollouts.jsonl")
    assert [line["step"] for line in lines] == [1, 1, 2, 2]
    rows = {row["id"]: row for row in map(json.loads, (tmp_path / "prompts.jsonl").read_text().splitlines())}
    for line in lines:
        worth = rows[line["prompt"]]["worth"]
        assert line["rewards"] == [len(text) * worth for text in line["samples"]]
    logged = json_lines(tmp_path / "run" / "grpo" / "metrics.jsonl")[0]
    assert {"reward", "reward/std", "sampled/tokens", "time/sample"} <= logged.keys()


def test_a_stage_with_a_cost(values: dict[str, Any], tmp_path: Path) -> None:
    values["stages"][0] |= costing(of={f"{tmp_path}/own/reward.py:length": 0.5}, gate="answer")
    run(values, tmp_path / "run")
    assert certify_recipe(make_recipe(values), tmp_path / "run", make_console(quiet=True))
    for line in json_lines(tmp_path / "run/grpo/checkpoints/rollouts.jsonl"):
        assert line["costs"] == [len(text) / 2 for text in line["samples"]]
        (worth,) = line["parts"].values()
        assert line["rewards"] == [r - max(c - 4, 0) for r, c in zip(worth, line["costs"], strict=True)]
    assert "sampled/cost" in json_lines(tmp_path / "run/grpo/metrics.jsonl")[0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", r"fails on row task \d: KeyError: 'score'; .*on_error: skip"),
        ("not_a_number", r"gave \[nan, nan, nan\] on row task \d: every reward is a finite number"),
        ("one_for_all", r"gave 1 numbers for 3 completions on row task \d"),
    ],
)
def test_a_reward_of_ones_own_that_fails_ends_the_command_with_its_name_and_the_row(
    values: dict[str, Any], tmp_path: Path, function: str, message: str
) -> None:
    # From where the recipe lies.
    values["stages"][0]["reward"] = f"own/reward.py:{function}"
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    done = slimepo("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    said = " ".join(done.stderr.split())
    assert re.search(f"reward 'own/reward.py:{function}' {message}", said), said
    assert "Traceback" not in said


def test_held_out_tasks_are_answered_while_it_trains_and_nothing_else_changes(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = f"{tmp_path}/own/reward.py:right"
    heldout = {"heldout": str(write_rows(tmp_path / "h.jsonl", 3)), "max_new_tokens": 6}
    values["tasks"] |= heldout | {"checker": check}
    values["stages"][0] |= {"max_steps": 5, "learning_rate": 0.05}
    run(values, tmp_path / "unasked")
    values["stages"][0]["answer_every"] = 2
    run(values, tmp_path / "asked")
    whole = json_lines(tmp_path / "asked/grpo/answers-by-step.jsonl")
    assert [line["step"] for line in whole] == [0, 2, 4, 5]
    done = read_json(tmp_path / "asked/grpo/stage.json")["heldout"]
    assert [whole[at]["figures"] for at in (0, -1)] == [done["before"], done["after"]]
    of_tasks = json_lines(tmp_path / "asked/grpo/answers.jsonl")
    assert whole[0]["answers"] == [line["before"] for line in of_tasks]
    assert whole[-1]["answers"] == [line["after"] for line in of_tasks]
    assert len({json.dumps(line["answers"]) for line in whole}) > 1
    samples = [
        (tmp_path / name / "grpo/checkpoints/rollouts.jsonl").read_text() for name in ("asked", "unasked")
    ]
    assert samples[0] == samples[1]

    class Killed(BaseException):
        pass

    def dying(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A checkpoint of step 3 is there, and answers of a step behind it.
        if state.global_step == 4:
            self.keep(4, self.before)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(AnswersByStep, "on_log", dying, raising=False)
        with pytest.raises(Killed):
            run(values, tmp_path / "killed")
    run(values, tmp_path / "killed")
    assert json_lines(tmp_path / "killed/grpo/answers-by-step.jsonl") == whole


def test_the_same_recipe_samples_the_same_answers(values: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(values, tmp_path / name)
    one, two = ((tmp_path / name / "grpo/checkpoints/rollouts.jsonl").read_text() for name in ("one", "two"))
    assert one == two


def test_pairs_of_samples_train_any_objective_on_pairs(values: dict[str, Any], tmp_path: Path) -> None:
    values["stages"][0] |= {"loss": "slime"}
    (done,) = run(values, tmp_path / "run")
    assert done["steps"] == 2
    assert "sampled/pairs" in json_lines(tmp_path / "run/slime/metrics.jsonl")[0]


def test_rounds_sample_the_model_of_the_round_before(values: dict[str, Any]) -> None:
    values |= {
        "rounds": 3,
        "pairs": {"samples": {"per_prompt": 3, "reward": values["stages"][0].pop("reward")}},
    }
    values["stages"] = [{"loss": "slime", "part": "samples"}]
    recipe = make_recipe(values)
    assert [stage.name for stage in recipe.stages] == ["slime", "slime-2", "slime-3"]
    assert [recipe.start_of(stage) for stage in recipe.stages] == [None, "slime", "slime-2"]
    assert [recipe.pairs[stage.part].model for stage in recipe.stages] == [None, "slime", "slime-2"]
    assert make_recipe(recipe.model_dump(exclude_unset=True)) == recipe


def test_pairs_are_made_without_training(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model seldom says the end, so this one speaks for it.
    def generate(model: Any, prompts: Any, *, finished: Any, samples: int, **_: Any) -> None:
        answers = [Completion([*range(10, 12 + number), 1], True) for number in range(samples)]
        finished(range(len(prompts)), [answers] * len(prompts))

    monkeypatch.setattr("slimepo.model.generate.generate", generate)
    reward = values["stages"][0]["reward"]
    values["stages"] = [{"loss": "slime", "part": "samples"}]
    values["pairs"] = {"samples": {"per_prompt": 4, "reward": reward}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    done = CliRunner().invoke(app, ["pairs", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    rows = json_lines(tmp_path / "run" / "samples" / "train.jsonl")
    assert len(rows) == 6 == read_json(tmp_path / "run/samples/pairs.json")["train"]["pairs"]
    assert all(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in rows)
    assert not (tmp_path / "run" / "slime").exists()


TASKS = [Task(f"t{i}", [{"role": "user", "content": "?"}], {"answer": "2"}) for i in range(4)]
OF_RUN = RunTasks(TASKS, [], lambda task, text: Verdict(text == task.gold, True), 8, 8)


def test_pairs_whose_reward_fails_say_that_the_samples_are_kept(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def fails(prompt, completions, row):\n    raise KeyError('gold')\n")
    rewards = sample_rewards(Pairs(reward=f"{tmp_path}/own.py:fails"), OF_RUN, tmp_path)
    with pytest.raises(InputError, match="fails on row t0: KeyError: 'gold'; the samples are kept"):
        rewards(TASKS, [["a", "b"]] * 4)


def test_empty_samples_have_no_reward_and_are_not_shown_to_it(tmp_path: Path) -> None:
    code = "def count(prompt, texts, row):\n    assert all(texts)\n    return [len(text) for text in texts]\n"
    (tmp_path / "own.py").write_text(code)
    rewards = sample_rewards(Pairs(reward=f"{tmp_path}/own.py:count"), OF_RUN, tmp_path)
    found = rewards(TASKS, [["aa", "", "a"], ["", ""], [], ["bbb"]])
    assert str(found) == "[[2.0, nan, 1.0], [nan, nan], [], [3.0]]"


def test_the_best_sample_is_set_against_the_worst() -> None:
    nan = math.nan
    samples = [["aa", "a", "aaa", "b"], ["a", "b"], ["", ""], []]
    pairs, counts = rewarded_pairs(TASKS, samples, [[2.0, 1.0, 3.0, 1.0], [1.0, 1.0], [nan, nan], []])
    assert [(pair.chosen, pair.rejected, pair.rewards) for pair in pairs] == [("aaa", "a", (3.0, 1.0))]
    assert counts == {
        "tasks": 4, "pairs": 1, "dropped: equal rewards": 1, "dropped: identical answers": 0, "dropped: no sample": 2,
    }  # fmt: skip


def test_answers_that_are_all_the_same_are_counted_apart_from_ties() -> None:
    samples = [["a", "a"], ["a", "b", "a"], ["a", "b"], ["b"]]
    pairs, counts = rewarded_pairs(TASKS, samples, [[0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0], [0.0]])
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("b", "a")] * 2
    assert counts["dropped: identical answers"] == 2
    assert counts["dropped: equal rewards"] == 0


def test_kept_samples_are_spread_over_the_ranks_and_each_gives_a_pair_with_the_best() -> None:
    """Nine costs, four kept: ranks 0, 3, 5 and 8. What ties with the best gives no pair."""
    costs = [10.0, 12.0, 11.0, 18.0, 13.0, 14.0, 15.0, 16.0, 17.0]
    texts = [f"{cost:g}" for cost in costs]
    pairs, _ = rewarded_pairs(TASKS[:1], [texts], [[-cost for cost in costs]], keep=4)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("10", "13"), ("10", "15"), ("10", "18")]
    tied, _ = rewarded_pairs(TASKS[:1], [["a", "b", "c"]], [[-1.0, -1.0 - 1e-12, -2.0]], keep=3)
    assert [(pair.chosen, pair.rejected) for pair in tied] == [("a", "c")]


def test_the_checker_and_math_verify_are_rewards(tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="slimepo[math] is not installed")
    rewards = make_rewards(reward_weights({"checker": 2.0, "math": 0.5}), OF_RUN, tmp_path)
    assert {name: weight for name, (_, weight) in rewards.items()} == {"checker": 2.0, "math": 0.5}
    given = (TASKS[0].prompt, ["2", "$\\frac{4}{2}$", "3"], TASKS[0].row)
    assert rewards["checker"][0](*given) == [1.0, 0.0, 0.0]
    assert rewards["math"][0](*given) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("\\sqrt{3}", "$\\sqrt{3}$", "$3$"),
        ("3\\pi", "$3\\pi$", "$3$"),
        ("x+1", "so $1+x$", "so $x$"),
        ("(1, 2)", "$(1, 2)$", "$2$"),
        ("She has 3 + 4 eggs.\n#### 7", "7", "4"),
        ("$\\frac{1}{2}$", "0.5", "2"),
        ("$18", "18 dollars", "8"),
    ],
)
def test_math_reads_answers_with_and_without_dollars(
    gold: str, right: str, wrong: str, tmp_path: Path
) -> None:
    pytest.importorskip("math_verify", reason="slimepo[math] is not installed")
    ((reward, _),) = make_rewards({"math": 1.0}, OF_RUN, tmp_path).values()
    assert reward(TASKS[0].prompt, [right, wrong], {"answer": gold}) == [1.0, 0.0]


def test_math_refuses_an_answer_that_has_none_and_keeps_to_a_timeout(tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="slimepo[math] is not installed")
    made = make_rewards({"math": 1.0}, OF_RUN, tmp_path)
    prompt = Prompt("7", TASKS[0].prompt, {"answer": "2"}, [])
    assert Rewarder(made, timeout=60)(prompt, ["2", "3"])[0] == [1.0, 0.0]
    with pytest.raises(InputError, match=r"row 7: .*math-verify finds nothing in its `answer` ''"):
        Rewarder(made)(Prompt("7", TASKS[0].prompt, {"answer": ""}, []), ["2"])


@pytest.fixture
def reward_model(llama_folder: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(llama_folder, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "reward")
    load_tokenizer(str(llama_folder)).save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def test_a_model_without_a_head_for_rewards_is_none(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFilesError, match=r"reward model .* lack 1 tensors, score\.weight"):
        make_rewards({f"model:{llama_folder}": 1.0}, OF_RUN, tmp_path)


def test_a_reward_model_scores_the_whole_conversation(reward_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(reward_model))
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    ((reward, _),) = make_rewards({f"model:{reward_model}": 1.0}, OF_RUN, tmp_path).values()
    turns = [*TASKS[0].prompt, {"role": "assistant", "content": "two"}]
    ids = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        alone = float(model.eval()(**ids).logits)
    assert reward(TASKS[0].prompt, ["2", "two"], {})[1] == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("pads", [True, False])
def test_a_reward_model_reads_the_answers_of_a_step_together(
    reward_model: Path, tmp_path: Path, pads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((reward_model / "config.json").read_text())
    (reward_model / "config.json").write_text(json.dumps(config | {"pad_token_id": 0 if pads else None}))
    made = make_rewards({f"model:{reward_model}": 1.0}, OF_RUN, tmp_path)
    ((reward, _),) = made.values()
    answers = [["a", "two and more", "a"], ["", "of words " * 9], [], ["x" * n for n in range(30)]]
    prompts = [Prompt(task.id, task.prompt, task.row, []) for task in TASKS]
    alone = [
        [reward(p.messages, [text], {})[0] for text in texts]
        for p, texts in zip(prompts, answers, strict=True)
    ]
    shapes: list[int] = []
    forward = reward.model.forward
    monkeypatch.setattr(
        reward.model, "forward", lambda **given: shapes.append(len(given["input_ids"])) or forward(**given)
    )
    found = [totals for totals, _, _ in Rewarder(made).of_all(prompts, answers)]
    for of_prompt, expected in zip(found, alone, strict=True):
        assert of_prompt == pytest.approx(expected, abs=1e-5)
    assert len(set(found[3])) == 30
    # Two texts are the same.
    assert shapes == ([16, 16, 1] if pads else [1] * 33)


def test_a_judge_rates_each_answer_and_is_paid_once(mock: Any, tmp_path: Path) -> None:
    ((reward, _),) = make_rewards({f"judge:{mock.judge}": 1.0}, OF_RUN, tmp_path).values()
    first = reward(TASKS[0].prompt, ["2", "two"], {})
    # The mock rates by the text of the question.
    assert len(set(first)) == 2
    assert {round(value * 10, 6) % 1 for value in first} == {0.0}
    calls = len(mock.calls)
    assert reward(TASKS[0].prompt, ["2", "two"], {}) == first
    assert len(mock.calls) == calls


def test_a_judge_is_asked_for_all_answers_of_a_step_at_once_and_reads_its_cache_once(
    mock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    monkeypatch.setattr(many, "read_replies", lambda path: reads.append(path) or {})
    made = make_rewards({f"judge:{mock.judge}": 1.0}, OF_RUN, tmp_path)
    asked: list[int] = []
    ask = many._ask_endpoint
    monkeypatch.setattr(many, "_ask_endpoint", lambda *given: asked.append(len(given[1])) or ask(*given))
    prompts = [Prompt(task.id, task.prompt, task.row, []) for task in TASKS]
    answers = [[f"{place} {n}" for n in range(3)] for place in range(len(prompts))]
    found = Rewarder(made).of_all(prompts, answers)
    assert asked == [3 * len(prompts)]
    assert reads == [tmp_path / "judge.jsonl"]
    ((reward, _),) = make_rewards({f"judge:{mock.judge}": 1.0}, OF_RUN, tmp_path / "another").values()
    assert found[1][0] == reward(prompts[1].messages, answers[1], {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checker", "give tasks.checker"),
        ("nowhere.py:reward", "cannot be imported"),
        ("model:/nowhere", "/nowhere"),
    ],
)
def test_a_reward_that_cannot_be_had_is_refused_before_a_model_loads(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_rewards({name: 1.0}, has_checker=False)


def test_so_is_a_function_that_takes_something_else(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"called with .prompt, completions, row.: too many positional"):
        check_rewards({f"{tmp_path}/own/reward.py:without_row": 1.0}, has_checker=False)


def costing(**cost: Any) -> dict[str, Any]:
    return {"rollouts": {"samples": 3, "max_new_tokens": 6, "cost": {"limit": 4, "weight": 1, **cost}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "grpo", "rollouts": None}, "give rollouts"),
        ({"reward": "checker", "rollouts": None, "loss": "dpo"}, "give rollouts"),
        ({"part": "preference"}, "rollouts make their own"),
        ({"rollouts": {"samples": 1}}, "2 or more"),
        ({"rollouts": {"sampels": 4}}, "did you mean 'samples'"),
        ({"rollouts": {"temperature": 0.7}}, "leave temperature"),
        ({"loss": "dpo", "rollouts": {"kl": 0.1}}, "kl is for objectives on samples"),
        ({"reference": "cache", "loss": "dpo"}, "use 'copy'"),
        ({"answer_every": 2}, "give tasks.heldout"),
        ({"reward": []}, "names none"),
        (costing(), "rollouts.cost.of names no cost"),
        (costing(of={}), "rollouts.cost.of names no cost"),
        (costing(of="checker"), "cost 'checker': the recipe's tasks have none"),
        (costing(of=["math", "math"]), "cost 'math' stands there twice: give it a weight"),
        (costing(of="nowhere.py:price"), "cannot be imported"),
        (costing(of="model:/nowhere"), "/nowhere"),
        ({"reward": ["math", "math"]}, "stands there twice: give it a weight, {math: 2}"),
        ({"reward": {"math": float("nan")}}, "reward.math: Input should be a finite number"),
    ],
)
def test_what_makes_no_sense_is_refused(
    values: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values["stages"][0] |= change
    with pytest.raises(InputError, match=message):
        run(values, tmp_path / "run")
    assert not (tmp_path / "run").exists()
