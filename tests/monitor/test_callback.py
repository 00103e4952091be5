"""The displacement monitor on real small runs: when it speaks, what it writes, and that it changes nothing."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback, set_seed

from slimepo.data.chat import chat_format
from slimepo.data.tokenize import TokenizedPair, tokenize
from slimepo.errors import InputError
from slimepo.files import json_lines
from slimepo.model.load import random_config, random_model
from slimepo.model.score import PairScores, score_pairs
from slimepo.monitor.callback import DisplacementMonitor
from slimepo.monitor.displacement import SideScores
from slimepo.monitor.settings import MonitorSettings, monitor_settings
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.playground.world import assistant_turn, demonstrations, make_tasks, user_turn
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from slimepo.types import Preference
from tests.tiny import random_rows, tiny_model

UNLEARNING = {"loss": "simpo", "loss_options": {"beta": 2.0, "gamma": 40.0}, "learning_rate": 1e-2}
HEALTHY = {"loss": "slime", "learning_rate": 1e-4}
WATCHED = HEALTHY | {"monitor": {"every": 4, "pairs": 8}}


@pytest.fixture(scope="module")
def world() -> tuple[PreTrainedModel, list[TokenizedPair], list[TokenizedPair]]:
    """A tiny model after a little SFT in the built-in world, pairs to train on and pairs held out."""
    tokenizer = build_tokenizer()
    tasks = make_tasks(480, seed=0)
    wrong = demonstrations(tasks, 1, right=0.0, slip_share=1.0, malformed_share=0.0)
    pairs = [
        Preference(user_turn(task), assistant_turn(task.gold), row.chosen, source=f"task {i}")
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
    world: tuple[PreTrainedModel, list[TokenizedPair], list[TokenizedPair]],
    callbacks: list[TrainerCallback] | None = None,
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
    made.train()
    return made


@pytest.fixture(scope="module")
def healthy(world: Any, tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    """SLIME at the quickstart's learning rate, with the monitor as it is by default."""
    return run(tmp_path_factory.mktemp("healthy"), world, max_steps=40, **HEALTHY)


def resumed(world: Any, folder: Path, checkpoint: str, **options: Any) -> PreferenceTrainer:
    """The trainer of a run that goes on from its checkpoint."""
    model, train, heldout = world
    args = PreferenceConfig(
        output_dir=str(folder), per_device_train_batch_size=16, save_strategy="no", report_to="none",
        disable_tqdm=True, **options,
    )  # fmt: skip
    made = PreferenceTrainer(copy.deepcopy(model), args, train, heldout, build_tokenizer())
    made.train(resume_from_checkpoint=str(folder / checkpoint))
    return made


def of_kind(made: PreferenceTrainer, kind: str) -> list[dict[str, Any]]:
    assert made.monitor is not None
    return of_kind_in(made.monitor.record.path.parent, kind)


def of_kind_in(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in json_lines(folder / "monitor.jsonl") if line["kind"] == kind]


class TestWarnings:
    def test_it_fires_on_a_run_made_to_unlearn(self, world: Any, tmp_path: Path, caplog: Any) -> None:
        """SimPO with gamma / beta = 20 nats per token and a large learning rate."""
        made = run(tmp_path, world, **UNLEARNING)
        warned = of_kind(made, "warning")
        unlearning = [w["set"] for w in warned if (w["warning"], w["state"]) == ("unlearning", "on")]
        assert sorted(unlearning) == ["heldout", "train"], "once for each set"
        first = next(w for w in warned if w["warning"] == "unlearning")
        assert "nats per token less likely than at the start" in first["message"]
        assert first["message"] in caplog.text
        assert of_kind(made, "end")[0]["warnings"][0] == "unlearning"
        assert made.monitor is not None
        kept = made.monitor.record.summary()
        assert kept is not None
        assert kept["facts"][0].startswith("Warning: chosen answers")
        assert made.state.global_step == 24, "nobody asked for the run to be stopped"

    def test_it_is_silent_on_a_healthy_run(self, healthy: PreferenceTrainer) -> None:
        assert of_kind(healthy, "warning") == []
        assert len(of_kind(healthy, "probe")) >= 3
        assert healthy.monitor is not None
        kept = healthy.monitor.record.summary()
        assert kept is not None
        assert (kept["warnings"], kept["stopped"], len(kept["facts"])) == ([], None, 3)

    def test_it_can_stop_the_run(self, world: Any, tmp_path: Path) -> None:
        made = run(tmp_path, world, monitor={"every": 4, "stop_on": ["unlearning"]}, **UNLEARNING)
        assert made.state.global_step == 4
        assert made.monitor is not None
        assert made.monitor.record.stopped is not None
        assert (made.monitor.record.stopped["step"], made.monitor.record.stopped["warning"]) == (
            4,
            "unlearning",
        )
        (end,) = of_kind(made, "end")
        assert (end["reason"], end["step"]) == ("stopped", 4)
        assert of_kind(made, "generation")[-1]["step"] == 4
        assert "monitor/heldout/chosen_change" in made.state.log_history[-2], "the last figures are logged"

    def test_after_the_last_step_there_is_nothing_to_stop(self, world: Any, tmp_path: Path) -> None:
        options = UNLEARNING | {"max_steps": 4}
        made = run(tmp_path, world, monitor={"every": 4, "stop_on": ["unlearning"]}, **options)
        assert of_kind(made, "warning")[0]["stops"] is False
        assert [end["reason"] for end in of_kind(made, "end")] == ["finished"]

    def test_another_warning_does_not_stop_it(self, world: Any, tmp_path: Path) -> None:
        made = run(tmp_path, world, monitor={"every": 4, "stop_on": ["entropy"]}, max_steps=8, **UNLEARNING)
        assert [w["warning"] for w in of_kind(made, "warning")][:1] == ["unlearning"]
        assert made.state.global_step == 8


class TestSecondLook:
    """The budget pays for 8 pairs of each set here, and for a reserve of 38 that is scored when it is needed."""

    BUDGET: ClassVar = {"budget": 0.2, "prompts": 0}

    def test_where_the_sample_looks_bad_more_pairs_are_asked(self, world: Any, tmp_path: Path) -> None:
        made = run(tmp_path, world, monitor=self.BUDGET, **UNLEARNING)
        start, probes = of_kind(made, "start")[0], of_kind(made, "probe")
        assert (len(start["rows"]["heldout"]), len(start["reserve"])) == (8, 38)
        assert len(probes[0]["reserve"]) == 38
        (look,) = (probe for probe in probes if "second_look" in probe)
        assert (look["second_look"]["set"], look["second_look"]["chosen_pairs"]) == ("heldout", 46)
        warned = next(w for w in of_kind(made, "warning") if w["set"] == "heldout")
        assert warned["step"] == look["step"]
        assert "of 46 pairs" in warned["message"]

    def test_a_healthy_run_never_needs_it(self, world: Any, tmp_path: Path) -> None:
        made = run(tmp_path, world, monitor=self.BUDGET, **HEALTHY)
        assert not any("second_look" in probe for probe in of_kind(made, "probe"))

    @pytest.mark.parametrize(
        ("later", "reserve", "states"),
        [
            (-1.0, [-1.0, -1.0], ["on"]),
            (-1.0, [0.1, 0.1], []),
            (0.1, [-1.0, 0.1], ["on", "off"]),
            (0.1, [-1.0, -1.0], ["on"]),
        ],
        ids=["the reserve fell too", "it did not", "later it rose again", "later only the sample has risen"],
    )
    def test_the_second_look_decides(
        self,
        world: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        later: float,
        reserve: list[float],
        states: list[str],
    ) -> None:
        """The sample seems to fall by 1 at the first probe behind step 0, the reserve as the first look finds it."""
        sampled = itertools.chain([0.0, -1.0], itertools.repeat(later))
        looked = itertools.chain([0.0, reserve[0]], itertools.repeat(reserve[1]))

        def score(rows: Any) -> tuple[SideScores, SideScores]:
            shift = next(sampled if any(len(row.rejected) for row in rows) else looked)
            tokens = [np.array([-2.0 + shift])] * len(rows)
            return SideScores(tokens, tokens, tokens), SideScores(*[[np.array([-3.0])] * len(rows)] * 3)

        monitor = DisplacementMonitor(MonitorSettings.model_validate(self.BUDGET), tmp_path)
        monkeypatch.setattr(monitor, "_score", score)
        made = run(tmp_path, world, callbacks=[monitor], **HEALTHY)
        assert len(of_kind(made, "probe")) >= 3
        warned = [(w["warning"], w["set"], w["state"]) for w in of_kind(made, "warning")]
        assert [state for kind, of, state in warned if (kind, of) == ("unlearning", "heldout")] == states

    def test_it_stops_the_run(self, world: Any, tmp_path: Path) -> None:
        made = run(tmp_path, world, monitor=self.BUDGET | {"stop_on": ["unlearning"]}, **UNLEARNING)
        assert made.state.global_step < 24
        assert "second_look" in of_kind(made, "probe")[-1]

    def test_a_resumed_run_has_the_reserve_s_figures_of_step_0(self, world: Any, tmp_path: Path) -> None:
        options = UNLEARNING | {"monitor": self.BUDGET}
        run(tmp_path, world, save_strategy="steps", save_steps=2, max_steps=24, **options)
        first = of_kind_in(tmp_path, "probe")[0]
        made = resumed(world, tmp_path, "checkpoint-2", max_steps=24, **options)
        probes = of_kind(made, "probe")
        assert probes[0] == first
        assert any("second_look" in probe for probe in probes)
        (end,) = of_kind(made, "end")
        assert end["train_seconds"] > probes[0]["train_seconds"]
        assert {p["since"] for p in probes} == {0}
        assert 5 not in [p["step"] for p in probes], "a probe is not due at once, as if it cost nothing"


class TestLastWord:
    """A stage scores all held-out pairs before and after training; the monitor's last word is of these."""

    def scores(self, change: float) -> PairScores:
        return PairScores(np.linspace(-1, 0, 500) + change, np.full(500, -2.0), [np.full(3, -2.0)] * 500)

    def test_what_the_sample_has_missed_is_said_at_the_end(self, world: Any, tmp_path: Path) -> None:
        made = run(tmp_path, world, max_steps=2, **HEALTHY)
        assert made.monitor is not None
        assert of_kind(made, "warning") == []
        made.monitor.conclude(self.scores(0), self.scores(-0.4))
        (warned,) = of_kind(made, "warning")
        assert (warned["step"], warned["set"], warned["stops"]) == (2, "heldout", False)
        assert "0.4 nats per token less likely" in warned["message"]
        assert "100% of 500 pairs" in warned["message"]
        assert of_kind(made, "end")[0]["warnings"] == ["unlearning"]

    def test_what_the_sample_said_does_not_lower_the_bar(self, world: Any, tmp_path: Path) -> None:
        """A fall of 0.06 keeps a warning on that is on, and brings none on."""
        made = run(tmp_path, world, monitor={"every": 4, "pairs": 8}, **UNLEARNING)
        assert made.monitor is not None
        made.monitor.conclude(self.scores(0), self.scores(-0.06))
        last = [w for w in of_kind(made, "warning") if (w["warning"], w["set"]) == ("unlearning", "heldout")][
            -1
        ]
        assert last["state"] == "off"

    def test_what_the_sample_was_wrong_about_is_taken_back(self, world: Any, tmp_path: Path) -> None:
        made = run(tmp_path, world, monitor={"every": 4, "pairs": 8}, **UNLEARNING)
        assert made.monitor is not None
        assert {w["set"] for w in of_kind(made, "warning")} == {"train", "heldout"}
        made.monitor.conclude(self.scores(0), self.scores(0.1))
        taken_back = [w for w in of_kind(made, "warning") if w["state"] == "off"]
        assert {w["set"] for w in taken_back} == {"heldout"}
        assert "unlearning: not so of all 500 held-out pairs" in [w["message"] for w in taken_back]
        kept = made.monitor.record.summary()
        assert kept is not None
        assert "trained on" in kept["facts"][0], "what was said of the rows trained on stands"


class TestFile:
    def test_it_holds_start_probes_answers_and_end(self, world: Any, tmp_path: Path) -> None:
        made = run(
            tmp_path, world, monitor={"every": 4, "generate_every": 6, "pairs": 10}, max_steps=12, **HEALTHY
        )
        lines = json_lines(tmp_path / "monitor.jsonl")
        assert [line["kind"] for line in lines[:3]] == ["start", "probe", "generation"]
        start, end = lines[0], lines[-1]
        assert [len(ids) for ids in start["rows"].values()] == [10, 10]
        assert (start["threshold"], start["margins"], start["steps"]) == (1.25, [0.0, 1.0, 1.5], 12)
        assert [p["set"] for p in start["prompts"]] == ["heldout"] * 4
        assert all(p["text"] for p in start["prompts"])
        probes = of_kind(made, "probe")
        assert [p["step"] for p in probes] == [0, 4, 8, 12]
        assert [g["step"] for g in of_kind(made, "generation")] == [0, 6, 12]
        for probe in probes:
            assert probe["since"] == 0
            assert len(probe["train"]["per_pair"]["chosen"]) == 10
            assert sum(probe["gradient_share"].values()) == pytest.approx(1, abs=1e-5)
        assert (end["kind"], end["reason"], end["probes"], end["generations"]) == ("end", "finished", 4, 3)
        assert "NaN" not in (tmp_path / "monitor.jsonl").read_text()

    def test_the_figures_of_the_end_are_those_of_the_trained_model(
        self, world: Any, healthy: PreferenceTrainer
    ) -> None:
        made = healthy
        by_id = {row.row_id: row for row in world[2]}
        rows = [by_id[name] for name in of_kind(made, "start")[0]["rows"]["heldout"]]
        before, after = score_pairs(world[0], rows), score_pairs(made.model, rows)
        last = of_kind(made, "probe")[-1]["heldout"]
        assert last["chosen"] == pytest.approx(after.chosen.mean(), abs=1e-5)
        assert last["chosen_change"] == pytest.approx((after.chosen - before.chosen).mean(), abs=1e-5)
        assert last["chosen_fell"] == pytest.approx((after.chosen < before.chosen).mean(), abs=1e-5)

    def test_trackers_get_the_same_figures(self, healthy: PreferenceTrainer) -> None:
        made = healthy
        line = next(x for x in reversed(made.state.log_history) if "loss" in x)
        last = of_kind(made, "probe")[-1]
        assert line["step"] == 40
        for name in ("train", "heldout"):
            for key in ("chosen_change", "chosen_fell", "rejected_p5", "entropy", "margin"):
                assert line[f"monitor/{name}/{key}"] == last[name][key]
            assert line[f"monitor/{name}/past_hard_margin"] == last[name]["past_margin"][2]
        assert line["monitor/gradient_share/distance"] == last["gradient_share"]["distance"]
        assert line["monitor/generation/finished"] == of_kind(made, "generation")[-1]["finished"]
        assert all(isinstance(v, (int, float)) for k, v in line.items() if k.startswith("monitor/"))

    def test_answers_are_generated_at_the_steps_that_were_asked_for(self, world: Any, tmp_path: Path) -> None:
        made = run(tmp_path, world, monitor={"generate_every": 1}, max_steps=3, **HEALTHY)
        assert [line["step"] for line in of_kind(made, "generation")] == [0, 1, 2, 3]

    def test_gradients_of_pairs_are_compared_on_request(self, world: Any, tmp_path: Path) -> None:
        made = run(tmp_path, world, monitor={"every": 2, "entanglement": 3}, max_steps=2, **HEALTHY)
        probe = of_kind(made, "probe")[-1]
        assert len(probe["entanglement"]["ratio"]) == 3
        assert any("monitor/entanglement" in line for line in made.state.log_history)

    def test_answers_are_checked_where_there_is_a_checker(self, world: Any, tmp_path: Path) -> None:
        monitor = DisplacementMonitor(
            MonitorSettings.model_validate({}), tmp_path, valid=lambda row_id, text: row_id.startswith("task")
        )
        made = run(tmp_path, world, callbacks=[monitor], max_steps=2, **HEALTHY)
        assert made.monitor is monitor
        answers = of_kind(made, "generation")[0]
        assert answers["valid"] == answers["finished"]


class TestNothingElseChanges:
    def test_the_weights_are_those_of_a_run_without_it(self, tmp_path: Path) -> None:
        """With dropout on, so that a random number drawn in between would show."""

        def weights(monitor: Any) -> list[torch.Tensor]:
            model = tiny_model(attention_dropout=0.2)
            options: dict[str, Any] = dict(learning_rate=1e-2, disable_dropout=False, monitor=monitor)
            made = run(tmp_path, (model, random_rows(40), random_rows(9, seed=5)), max_steps=6, **options)
            return list(made.model.parameters())

        watched = weights({"every": 1, "generate_every": 1, "entanglement": 2})
        assert all(torch.equal(a, b) for a, b in zip(watched, weights(False), strict=True))

    def test_off_it_writes_nothing(self, tmp_path: Path) -> None:
        made = run(tmp_path, (tiny_model(), random_rows(20), []), max_steps=2, monitor=False)
        assert made.monitor is None
        assert not (tmp_path / "monitor.jsonl").exists()
        assert not any(key.startswith("monitor") for line in made.state.log_history for key in line)


class TestResume:
    def start_and_stop(self, world: Any, folder: Path) -> None:
        """A run of 12 steps that is stopped behind its checkpoint at step 4."""

        class Stop(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
                control.should_training_stop = state.global_step >= 6
                return control

        run(
            folder,
            world,
            [Stop()],
            save_strategy="steps",
            save_steps=4,
            max_steps=12,
            **WATCHED,
        )

    def resume(self, world: Any, folder: Path) -> PreferenceTrainer:
        return resumed(world, folder, "checkpoint-4", max_steps=12, **WATCHED)

    def test_step_0_is_where_the_run_began_and_not_where_it_goes_on(self, world: Any, tmp_path: Path) -> None:
        self.start_and_stop(world, tmp_path)
        made = self.resume(world, tmp_path)
        whole = run(tmp_path / "whole", world, max_steps=12, **WATCHED)
        lines = json_lines(tmp_path / "monitor.jsonl")
        kinds = [line["kind"] for line in lines]
        assert (kinds.count("start"), kinds.count("resume"), kinds.count("end")) == (1, 1, 1)
        assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
        resumed, undisturbed = of_kind(made, "probe"), of_kind(whole, "probe")
        assert [p["step"] for p in resumed] == [p["step"] for p in undisturbed]
        for one, two in zip(resumed, undisturbed, strict=True):
            assert one["since"] == 0
            assert one["train"] == two["train"]
            assert one["heldout"] == two["heldout"]

    def test_a_lost_record_is_said_to_be_lost(self, world: Any, tmp_path: Path, caplog: Any) -> None:
        self.start_and_stop(world, tmp_path)
        (tmp_path / "monitor.jsonl").unlink()
        made = self.resume(world, tmp_path)
        assert "changes are counted from step 4" in caplog.text
        assert {p["since"] for p in of_kind(made, "probe")} == {4}

    def test_a_run_that_was_stopped_stays_stopped(self, world: Any, tmp_path: Path) -> None:
        options = UNLEARNING | {"monitor": {"every": 8, "stop_on": ["unlearning"]}, "max_steps": 24}
        run(tmp_path, world, save_strategy="steps", save_steps=8, **options)
        made = resumed(world, tmp_path, "checkpoint-8", **options)
        assert made.state.global_step == 9
        assert made.monitor is not None
        assert made.monitor.record.stopped is not None


class TestObjectives:
    @pytest.mark.parametrize(
        ("options", "absent"),
        [
            ({"loss": "sft"}, ()),
            ({"loss": "dpo"}, ()),
            ({"loss": "slime/without-hard"}, ()),
            ({"loss": "kto"}, ("margin", "accuracy")),
        ],
    )
    def test_any_objective_is_watched(
        self, tmp_path: Path, options: dict[str, Any], absent: tuple[str, ...]
    ) -> None:
        """Judged rows have one answer each, so that no margin can be told."""
        rows = (tiny_model(), random_rows(40), random_rows(9, seed=5))
        made = run(tmp_path, rows, max_steps=3, monitor={"every": 1}, **options)
        probes = of_kind(made, "probe")
        assert [p["step"] for p in probes] == [0, 1, 2, 3]
        for name in ("train", "heldout"):
            figures = probes[-1][name]
            assert all(figures[key] is None for key in absent)
            assert figures["chosen"] < 0
            assert figures["rejected"] < 0
        assert (probes[-1]["gradient_share"] is not None) == options["loss"].startswith("slime")
        assert not any(isinstance(v, float) and math.isnan(v) for v in probes[-1]["train"].values())

    def test_demonstrations_have_no_rejected_side(self, tmp_path: Path) -> None:
        rows = random_rows(20)
        empty = rows[0].rejected[:0]
        for index, row in enumerate(rows):
            rows[index] = TokenizedPair(row.prompt, row.chosen, empty, row.row_id)
        made = run(tmp_path, (tiny_model(), rows, []), max_steps=2, loss="sft")
        probe = of_kind(made, "probe")[-1]
        assert probe["heldout"] is None
        assert probe["train"]["rejected"] is None


def test_settings_are_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="monitor: unknown key 'evry'; did you mean 'every'"):
        PreferenceConfig(output_dir=str(tmp_path), monitor={"evry": 3})
    assert monitor_settings(PreferenceConfig(output_dir=str(tmp_path)).monitor) is not None
