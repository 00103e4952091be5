"""The displacement monitor on real small runs: when it speaks, what it writes, and that it changes nothing."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, set_seed

from slimepo.data.batch import StepCollator
from slimepo.data.chat import chat_format
from slimepo.data.rows import Row
from slimepo.data.tokenize import tokenize
from slimepo.errors import InputError
from slimepo.files import json_lines
from slimepo.model.load import random_config, random_model
from slimepo.model.score import PairScores, score_pairs
from slimepo.monitor.callback import DisplacementMonitor
from slimepo.monitor.probe import score_sample
from slimepo.monitor.settings import MonitorSettings
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.playground.world import demonstrations, make_tasks
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from slimepo.types import Message, Preference
from tests.tiny import random_rows, tiny_model

UNLEARNING = {"loss": "simpo", "loss_options": {"beta": 2.0, "gamma": 40.0}, "learning_rate": 1e-2}
HEALTHY = {"loss": "slime", "learning_rate": 1e-4}
STOPPING = UNLEARNING | {"monitor": {"pairs": 16, "stop_on": ["unlearning"]}}

World = tuple[PreTrainedModel, list[Row], list[Row]]


@pytest.fixture(scope="module")
def world() -> World:
    """A tiny model after a little SFT in the built-in world, pairs to train on and pairs held out."""
    tokenizer = build_tokenizer()
    tasks = make_tasks(480, seed=0)
    wrong = demonstrations(tasks, 1, right=0.0, slip_share=1.0, malformed_share=0.0)
    pairs = [
        Preference(row.prompt, [Message(role="assistant", content=task.gold)], row.chosen, source=f"task {i}")
        for i, (task, row) in enumerate(zip(tasks, wrong, strict=True))
    ]
    rows = tokenize(pairs, chat_format(tokenizer)).rows
    sizes = dict(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    model = random_model(random_config("llama", sizes, tokenizer), 0)
    args = PreferenceConfig(
        output_dir="unused", loss="sft", learning_rate=3e-3, max_steps=150, per_device_train_batch_size=32,
        max_grad_norm=1.0, save_strategy="no", report_to="none", disable_tqdm=True, monitor=False,
    )  # fmt: skip
    set_seed(0)
    PreferenceTrainer(model, args, rows[:400]).train()
    return model, rows[:400], rows[400:]


def run(
    folder: Path,
    world: World,
    callbacks: list[TrainerCallback] | None = None,
    checkpoint: str | None = None,
    **options: Any,
) -> PreferenceTrainer:
    model, train, heldout = world
    values: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=24, per_device_train_batch_size=16, logging_steps=4,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    args = PreferenceConfig(**(values | options))
    tokenizer = build_tokenizer()
    fits = model.config.vocab_size >= len(tokenizer)
    made = PreferenceTrainer(
        copy.deepcopy(model), args, train, heldout or None, tokenizer if fits else None, callbacks=callbacks
    )
    set_seed(0)
    made.train(resume_from_checkpoint=str(folder / checkpoint) if checkpoint else None)
    return made


@pytest.fixture(scope="module")
def healthy(world: World, tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    """SLIME at a good learning rate, with the monitor as it is by default."""
    return run(tmp_path_factory.mktemp("healthy"), world, **HEALTHY)


@pytest.fixture(scope="module")
def unlearning(world: World, tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    """SimPO with gamma / beta = 20 nats per token and a large learning rate."""
    return run(tmp_path_factory.mktemp("unlearning"), world, **UNLEARNING)


@pytest.fixture(scope="module")
def stopped(world: World, tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    """The same, ended by the monitor; there is a checkpoint at every step."""
    return run(tmp_path_factory.mktemp("stopped"), world, save_strategy="steps", save_steps=1, **STOPPING)


class StopAt(TrainerCallback):  # type: ignore[misc]
    """Ends a run behind a step, as a user's own callback may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = state.global_step >= self.step
        return control


def of_kind(made: PreferenceTrainer, kind: str) -> list[dict[str, Any]]:
    assert made.monitor is not None
    return [line for line in json_lines(made.monitor.record.path) if line["kind"] == kind]


def summary(made: PreferenceTrainer) -> dict[str, Any]:
    assert made.monitor is not None
    found = made.monitor.record.summary()
    assert found is not None
    return found


def same_weights(one: PreferenceTrainer, two: PreferenceTrainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


class TestWarnings:
    def test_it_speaks_of_a_run_that_unlearns(self, unlearning: PreferenceTrainer, caplog: Any) -> None:
        warned = of_kind(unlearning, "warning")
        sets = [w["set"] for w in warned if (w["warning"], w["state"]) == ("unlearning", "on")]
        assert sorted(sets) == ["heldout", "train"], "once for each set"
        first = next(w for w in warned if w["warning"] == "unlearning")
        assert "nats per token less likely than at the start" in first["message"]
        assert of_kind(unlearning, "end")[0]["warnings"][0] == "unlearning"
        assert summary(unlearning)["facts"][0].startswith("Warning: chosen answers")
        assert unlearning.state.global_step == 24, "nobody asked for the run to be stopped"

    def test_it_is_silent_on_a_healthy_run(self, healthy: PreferenceTrainer) -> None:
        kept = summary(healthy)
        assert of_kind(healthy, "warning") == []
        assert (kept["warnings"], kept["stopped"], len(kept["facts"])) == ([], None, 4)
        assert kept["facts"][-1].startswith(
            "SLIME's loss on 16 training pairs rules out that their chosen answers fall by more than"
        )

    def test_it_can_stop_the_run(self, stopped: PreferenceTrainer) -> None:
        step = stopped.state.global_step
        assert step in (3, 6, 12)
        assert (summary(stopped)["stopped"]["step"], summary(stopped)["stopped"]["warning"]) == (
            step,
            "unlearning",
        )
        (end,) = of_kind(stopped, "end")
        assert (end["reason"], end["step"]) == ("stopped", step)
        assert of_kind(stopped, "generation")[-1]["step"] == step
        assert "monitor/heldout/chosen_change" in stopped.state.log_history[-2], "the last figures are logged"

    def test_nothing_is_stopped_after_the_last_step_or_by_another_warning(
        self, world: World, tmp_path: Path
    ) -> None:
        settings = {"every": 4, "stop_on": ["unlearning"], "prompts": 0}
        made = run(tmp_path / "last", world, **UNLEARNING | {"max_steps": 4, "monitor": settings})
        assert of_kind(made, "warning")[0]["stops"] is False
        assert of_kind(made, "end")[0]["reason"] == "finished"
        made = run(
            tmp_path / "other",
            world,
            **UNLEARNING | {"max_steps": 5, "monitor": settings | {"stop_on": ["entropy"]}},
        )
        assert of_kind(made, "warning")[0]["warning"] == "unlearning"
        assert made.state.global_step == 5


class TestLastWord:
    """A stage scores all held-out pairs before and after training; the monitor's last word is of these."""

    def scores(self, change: float) -> PairScores:
        return PairScores(np.linspace(-1, 0, 500) + change, np.full(500, -2.0), [np.full(3, -2.0)] * 500)

    def conclude(self, made: PreferenceTrainer, change: float) -> list[dict[str, Any]]:
        """All warnings of held-out answers when all of these have moved by `change`."""
        assert made.monitor is not None
        made.monitor.conclude(self.scores(0), self.scores(change))
        return [w for w in of_kind(made, "warning") if w["set"] == "heldout"]

    def test_what_the_sample_has_missed_is_said_at_the_end(self, world: World, tmp_path: Path) -> None:
        made = run(tmp_path, world, max_steps=2, monitor={"prompts": 0}, **HEALTHY)
        (warned,) = self.conclude(made, -0.4)
        assert (warned["step"], warned["stops"]) == (2, False)
        assert "0.4 nats per token less likely" in warned["message"]
        assert "100% of 500 pairs" in warned["message"]
        assert of_kind(made, "end")[0]["warnings"] == ["unlearning"]

    def test_what_the_sample_was_wrong_about_is_taken_back(self, world: World, tmp_path: Path) -> None:
        """A fall of 0.06 would keep a warning on that is on, but what the sample said does not lower the bar."""
        made = run(tmp_path, world, **UNLEARNING | {"max_steps": 4, "monitor": {"prompts": 0}})
        said = [w["message"] for w in self.conclude(made, -0.06)]
        assert "unlearning: not so of all 500 held-out pairs" in said
        assert "trained on" in summary(made)["facts"][0], "what was said of the rows trained on stands"


class TestFile:
    def test_it_holds_start_probes_answers_and_end(self, healthy: PreferenceTrainer) -> None:
        assert healthy.monitor is not None
        lines = json_lines(healthy.monitor.record.path)
        looks = ["probe", "generation"] * 5
        assert [line["kind"] for line in lines] == [
            *("start", "probe", "tokens", "generation"), *looks, "fallen", "end"
        ]  # fmt: skip
        start, end, probes = lines[0], lines[-1], of_kind(healthy, "probe")
        assert [len(ids) for ids in start["rows"].values()] == [16, 16]
        assert (start["threshold"], start["margins"], start["steps"]) == (1.25, [1.0, 1.5], 24)
        assert len(start["prompts"]) == 4
        assert all(prompt["text"] for prompt in start["prompts"])
        assert [p["step"] for p in probes] == [0, 3, 6, 12, 18, 24]
        for probe in probes:
            assert probe["since"] == 0
            assert len(probe["train"]["per_pair"]["chosen"]) == 16
            assert sum(probe["gradient_share"].values()) == pytest.approx(1, abs=1e-5)
        assert (end["reason"], end["warnings"]) == ("finished", [])
        assert summary(healthy)["seconds"] > 0
        assert "NaN" not in healthy.monitor.record.path.read_text()

    def test_the_figures_of_the_end_are_those_of_the_trained_model(
        self, world: World, healthy: PreferenceTrainer
    ) -> None:
        by_id = {row.id: row for row in world[2]}
        rows = [by_id[name] for name in of_kind(healthy, "start")[0]["rows"]["heldout"]]
        before, after = score_pairs(world[0], rows), score_pairs(healthy.model, rows)
        last = of_kind(healthy, "probe")[-1]["heldout"]
        assert last["chosen"] == pytest.approx(after.chosen.mean(), abs=1e-5)
        assert last["chosen_change"] == pytest.approx((after.chosen - before.chosen).mean(), abs=1e-5)
        assert last["chosen_fell"] == pytest.approx((after.chosen < before.chosen).mean(), abs=1e-5)

    def test_the_answers_that_fell_most_stand_there_token_by_token(
        self, world: World, unlearning: PreferenceTrainer
    ) -> None:
        """As the untrained and the trained model score them when asked for these rows alone."""
        (line,) = of_kind(unlearning, "fallen")
        assert (line["set"], line["step"], len(line["answers"])) == ("heldout", 24, 4)
        by_id = {row.id: row for row in world[2]}
        sample = [by_id[name] for name in of_kind(unlearning, "start")[0]["rows"]["heldout"]]
        change = score_pairs(unlearning.model, sample).chosen - score_pairs(world[0], sample).chosen
        for answer, fall in zip(line["answers"], sorted(change), strict=False):
            assert answer["mean"][1] - answer["mean"][0] == pytest.approx(fall, abs=1e-4)
            row = by_id[answer["row_id"]]
            assert "".join(answer["tokens"]) == str(build_tokenizer().decode(row.responses[0].tolist()))
            assert answer["length"] == len(answer["tokens"]) == len(row.responses[0])
            for model, when in ((world[0], "before"), (unlearning.model, "after")):
                (scores,) = score_sample(model, [row], StepCollator(1))[0].logps
                assert answer[when] == pytest.approx(scores, abs=1e-3)

    def test_trackers_get_the_same_figures(self, healthy: PreferenceTrainer) -> None:
        line = next(x for x in reversed(healthy.state.log_history) if "loss" in x)
        last = of_kind(healthy, "probe")[-1]
        assert line["step"] == 24
        for name in ("train", "heldout"):
            for key in ("chosen_change", "chosen_fell", "rejected_p5", "entropy", "past_hard_margin"):
                assert line[f"monitor/{name}/{key}"] == last[name][key]
        assert line["monitor/gradient_share/distance"] == last["gradient_share"]["distance"]
        assert line["monitor/generation/finished"] == of_kind(healthy, "generation")[-1]["finished"]
        assert all(isinstance(v, (int, float)) for k, v in line.items() if k.startswith("monitor/"))

    def test_on_request_gradients_are_compared_and_answers_checked(
        self, world: World, tmp_path: Path
    ) -> None:
        settings = MonitorSettings(every=2, entanglement=3, pairs=4)
        monitor = DisplacementMonitor(
            settings, tmp_path, valid=lambda row_id, text: row_id.startswith("task")
        )
        made = run(tmp_path, world, callbacks=[monitor], max_steps=2, **HEALTHY)
        assert made.monitor is monitor
        assert len(of_kind(made, "probe")[-1]["entanglement"]["ratio"]) == 3
        assert any("monitor/entanglement" in line for line in made.state.log_history)
        answers = of_kind(made, "generation")[0]
        assert answers["valid"] == answers["finished"]


class TestNothingElseChanges:
    def test_the_weights_are_those_of_a_run_without_it(self, tmp_path: Path) -> None:
        """With dropout on, so that a random number drawn in between would show."""

        def trained(monitor: Any) -> PreferenceTrainer:
            rows = (tiny_model(attention_dropout=0.2), random_rows(40), random_rows(9, seed=5))
            options: dict[str, Any] = dict(learning_rate=1e-2, disable_dropout=False, monitor=monitor)
            return run(tmp_path, rows, max_steps=6, **options)

        assert same_weights(trained({"every": 1, "entanglement": 2}), trained(False))

    def test_a_run_that_it_stops_has_the_weights_of_that_step(
        self, world: World, stopped: PreferenceTrainer, tmp_path: Path
    ) -> None:
        unwatched = run(
            tmp_path, world, [StopAt(stopped.state.global_step)], **UNLEARNING | {"monitor": False}
        )
        assert same_weights(stopped, unwatched)
        assert not (tmp_path / "monitor.jsonl").exists()


class TestResume:
    WATCHED = HEALTHY | {"monitor": {"every": 4, "pairs": 8}, "max_steps": 12}

    def start_and_stop(self, world: World, folder: Path) -> None:
        """A run of 12 steps that ends at step 6, behind its checkpoint at step 4."""
        run(folder, world, [StopAt(6)], save_strategy="steps", save_steps=4, **self.WATCHED)

    def test_it_measures_where_an_undisturbed_run_does(self, world: World, tmp_path: Path) -> None:
        self.start_and_stop(world, tmp_path)
        resumed = run(tmp_path, world, checkpoint="checkpoint-4", **self.WATCHED)
        whole = run(tmp_path / "whole", world, **self.WATCHED)
        lines = json_lines(tmp_path / "monitor.jsonl")
        kinds = [line["kind"] for line in lines]
        assert (kinds.count("start"), kinds.count("resume"), kinds.count("end")) == (1, 1, 1)
        assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
        for kind in ("probe", "tokens", "generation", "fallen"):
            one, two = ([line | {"seconds": 0} for line in of_kind(made, kind)] for made in (resumed, whole))
            assert one == two
        assert same_weights(resumed, whole)

    def test_a_lost_record_is_said_to_be_lost(self, world: World, tmp_path: Path, caplog: Any) -> None:
        self.start_and_stop(world, tmp_path)
        (tmp_path / "monitor.jsonl").unlink()
        made = run(tmp_path, world, checkpoint="checkpoint-4", **self.WATCHED)
        assert "changes are counted from step 4" in caplog.text
        assert {p["since"] for p in of_kind(made, "probe")} == {4}

    def test_a_run_that_was_stopped_stops_at_the_same_step_with_the_same_weights(
        self, world: World, stopped: PreferenceTrainer
    ) -> None:
        step, folder = stopped.state.global_step, Path(stopped.args.output_dir)
        assert not (folder / f"checkpoint-{step}").exists(), "from there it would take one step more"
        at_epochs = TrainerControl(should_save=True)
        assert stopped.monitor is not None
        stopped.monitor.on_epoch_end(stopped.args, stopped.state, at_epochs)
        assert not at_epochs.should_save
        again = run(folder, world, checkpoint=f"checkpoint-{step - 1}", **STOPPING)
        assert again.state.global_step == step
        assert same_weights(stopped, again)


class TestObjectives:
    @pytest.mark.parametrize("loss", ["sft", "dpo", "slime/without-hard", "kto"])
    def test_any_objective_is_watched(self, tmp_path: Path, loss: str) -> None:
        made = run(
            tmp_path,
            (tiny_model(), random_rows(40), random_rows(9, seed=5)),
            max_steps=2,
            monitor={"every": 1},
            loss=loss,
        )
        probe = of_kind(made, "probe")[-1]
        for name in ("train", "heldout"):
            assert probe[name]["chosen"] < 0
            assert probe[name]["rejected"] < 0
            # Judged rows have one answer each, so that no margin can be told.
            assert (probe[name]["margin"] is None) == (loss == "kto")
            assert not any(isinstance(v, float) and math.isnan(v) for v in probe[name].values())
        assert (probe["gradient_share"] is not None) == loss.startswith("slime")

    def test_demonstrations_have_no_rejected_side(self, tmp_path: Path) -> None:
        rows = [Row(row.prompt_ids, row.responses[:1], id=row.id) for row in random_rows(20)]
        made = run(tmp_path, (tiny_model(), rows, []), max_steps=2, loss="sft")
        probe = of_kind(made, "probe")[-1]
        assert probe["heldout"] is None
        assert probe["train"]["rejected"] is None


def test_a_wrong_setting_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="monitor: unknown key 'evry'"):
        PreferenceConfig(output_dir=str(tmp_path), monitor={"evry": 3})


def test_a_trainer_that_hands_nothing_over_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to watch"):
        DisplacementMonitor(MonitorSettings(), tmp_path).on_train_begin(
            None, None, None, processing_class=None
        )
