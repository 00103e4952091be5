"""Evaluation while training, streams of rows, counts of tokens: as in transformers' Trainer."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from transformers import EarlyStoppingCallback

from slimepo.errors import InputError
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.training.config import PreferenceConfig
from slimepo.training.libraries import refuse_idle
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import random_rows, tiny_model


def trainer(tmp_path: Path, train: Any = None, held_out: Any = None, **options: Any) -> PreferenceTrainer:
    more = {key: options.pop(key) for key in ("callbacks", "processing_class") if key in options}
    usual: dict[str, Any] = dict(
        output_dir=str(tmp_path), loss="dpo", max_steps=4, save_strategy="no", report_to="none", monitor=False,
        logging_steps=1, disable_tqdm=True, learning_rate=1e-2, per_device_train_batch_size=2,
    )  # fmt: skip
    tokenizer = more.get("processing_class")
    model = tiny_model(vocab_size=len(tokenizer)) if tokenizer else tiny_model()
    rows = random_rows(8) if train is None else train
    return PreferenceTrainer(model, PreferenceConfig(**(usual | options)), rows, held_out, **more)


def evaluations(made: PreferenceTrainer, key: str = "eval_loss") -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in made.state.log_history if key in line]


def texts(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i} {i}"} for i in range(count)]


class TestWhileTraining:
    def test_every_so_many_steps_with_the_metrics_of_a_step(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, None, random_rows(4, seed=1), eval_strategy="steps", eval_steps=2)
        made.train()
        assert [step for step, _ in evaluations(made)] == [2, 4]
        line = next(line for line in made.state.log_history if "eval_loss" in line)
        assert {"eval_rewards/chosen", "eval_rewards/accuracies", "eval_runtime", "eval_samples_per_second",
                "eval_steps_per_second"} <= line.keys()  # fmt: skip
        assert evaluations(made)[-1][1] == pytest.approx(made.evaluate()["eval_loss"], rel=1e-5)

    def test_several_sets_by_name(self, tmp_path: Path) -> None:
        sets = {"a": random_rows(4, seed=1), "b": random_rows(3, seed=2)}
        made = trainer(
            tmp_path, None, sets, eval_strategy="epoch", reference="cache", max_steps=-1, num_train_epochs=1
        )
        made.train()
        assert [step for step, _ in evaluations(made, "eval_a_loss")] == [4]
        assert made.evaluate("b")["eval_loss"] == evaluations(made, "eval_b_loss")[0][1]
        # All of them, whose reference was computed before training.
        assert made.evaluate()["eval_a_loss"] == evaluations(made, "eval_a_loss")[0][1]
        assert "mine_loss" in made.evaluate("b", metric_key_prefix="mine")
        with pytest.raises(InputError, match="there is no eval_dataset 'c'; there are: a, b"):
            made.evaluate("c")

    def test_the_best_model_is_loaded_at_the_end(self, tmp_path: Path) -> None:
        made = trainer(
            tmp_path, None, random_rows(4, seed=1), learning_rate=0.3, eval_strategy="steps", eval_steps=1,
            save_strategy="best", metric_for_best_model="loss", load_best_model_at_end=True,
        )  # fmt: skip
        made.train()
        best = min(loss for _, loss in evaluations(made))
        assert made.state.best_metric == best < evaluations(made)[-1][1]
        assert made.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)

    def test_training_stops_early_and_the_rate_waits_for_a_plateau(self, tmp_path: Path) -> None:
        made = trainer(
            tmp_path, None, random_rows(4, seed=1), max_steps=40, learning_rate=0.5, eval_strategy="steps",
            eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1, load_best_model_at_end=True,
            metric_for_best_model="eval_loss", lr_scheduler_type="reduce_lr_on_plateau",
            lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
            callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
        )  # fmt: skip
        made.train()
        assert made.state.global_step < 40
        rates = [line["learning_rate"] for line in made.state.log_history if "learning_rate" in line]
        assert rates[-1] < rates[0]

    def test_without_rows_to_evaluate_on_it_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="eval_dataset"):
            trainer(tmp_path, eval_strategy="steps", eval_steps=1)


class TestStreams:
    """An IterableDataset has no length; as many rows are read as the run's steps take."""

    def stream(self, count: int) -> Any:
        return Dataset.from_list(texts(count)).to_iterable_dataset()

    def test_it_trains_in_the_order_of_the_stream(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, self.stream(100), processing_class=build_tokenizer())
        loaded = trainer(
            tmp_path, texts(8), processing_class=build_tokenizer(), train_sampling_strategy="sequential"
        )
        made.train()
        loaded.train()
        assert len(made.train_dataset) == 8
        assert [line["loss"] for line in made.state.log_history[:4]] == [
            line["loss"] for line in loaded.state.log_history[:4]
        ]

    def test_a_short_one_is_read_again(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, self.stream(3), processing_class=build_tokenizer())
        made.train()
        assert (made.state.global_step, len(made.train_dataset)) == (4, 3)

    def test_without_max_steps_it_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="a stream of rows has no length: give max_steps"):
            trainer(tmp_path, self.stream(3), processing_class=build_tokenizer(), max_steps=-1)

    def test_rows_of_like_lengths_together_are_refused(self, tmp_path: Path) -> None:
        by_length = "group_by_length"
        with pytest.raises(
            InputError, match=f"in its order: leave train_sampling_strategy = '{by_length}' out"
        ):
            trainer(
                tmp_path,
                self.stream(9),
                processing_class=build_tokenizer(),
                train_sampling_strategy=by_length,
            )

    def test_its_texts_are_held_to_the_lengths_asked_for(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, self.stream(9), processing_class=build_tokenizer(), max_length=512)
        assert len(made.train_dataset) == 8

    def test_it_can_be_evaluated_on_and_so_can_a_dict_of_sets(self, tmp_path: Path) -> None:
        tokenizer = build_tokenizer()
        made = trainer(tmp_path, texts(8), self.stream(4), processing_class=tokenizer)
        whole = Dataset.from_list(texts(4))
        assert made.evaluate()["eval_loss"] == made.evaluate(whole)["eval_loss"]
        assert made.evaluate(DatasetDict(x=whole))["eval_x_loss"] == made.evaluate()["eval_loss"]


@pytest.mark.parametrize("how", ["all", "non_padding", True])
def test_tokens_seen_are_counted(tmp_path: Path, how: Any) -> None:
    rows = random_rows(8)
    made = trainer(tmp_path, rows, include_num_input_tokens_seen=how, layout="padded", loss="slime")
    made.train()
    real = sum(2 * len(row.prompt_ids) + sum(map(len, row.responses)) for row in rows)
    seen = made.state.num_input_tokens_seen
    assert made.state.log_history[-1]["num_input_tokens_seen"] == seen
    assert seen == real if how == "non_padding" else seen > real


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"bf16_full_eval": True},
            "bf16_full_eval = True would change nothing: figures before, while and after",
        ),
        ({"fp16_full_eval": True}, "fp16_full_eval = True would change nothing"),
        ({"prediction_loss_only": True}, "prediction_loss_only = True would change nothing"),
        ({"eval_use_gather_object": True}, "eval_use_gather_object = True would change nothing"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches = False would change nothing"),
        ({"length_column_name": "tokens"}, "length_column_name = 'tokens' would change nothing"),
        ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config = .*would change nothing: the head"),
        (
            {"dataloader_in_order": False},
            "dataloader_in_order = False would change nothing: the rows of a step",
        ),
        ({"eval_steps": 5}, "eval_steps = 5 would change nothing: it goes with eval_strategy = 'steps'"),
        ({"eval_steps": 5, "eval_strategy": "epoch"}, "eval_steps = 5 would change nothing"),
        ({"eval_delay": 5}, "eval_delay = 5 would change nothing: it goes with an eval_strategy"),
        (
            {"logging_steps": 5, "logging_strategy": "no"},
            "logging_steps = 5 would change nothing: it goes with log",
        ),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 50},
            "warmup_steps = 50 would change nothing: lr_scheduler_type = 'constant' has no warm-up; constant_with_warm",
        ),
        (
            {"activation_checkpointing_kwargs": {"use_reentrant": False}},
            "activation_checkpointing_kwargs = .*would change nothing: it goes with activation_checkpointing",
        ),
        (
            {"accelerator_config": {"split_batches": True}},
            "accelerator_config: split_batches = True would change no",
        ),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "accelerator_config: dispatch_batches = True would",
        ),
    ],
)
def test_a_setting_that_nothing_would_come_of_is_refused(
    tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        PreferenceConfig(output_dir=str(tmp_path), report_to="none", **given)


def test_means_of_each_device_apart_are_refused_where_there_are_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = PreferenceConfig(output_dir=str(tmp_path), report_to="none", average_tokens_across_devices=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match="average_tokens_across_devices = False would change nothing: a step is"
    ):
        refuse_idle(args)


@pytest.mark.parametrize(
    "given",
    [
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 50},
        {"eval_strategy": "steps", "logging_strategy": "no", "logging_steps": 5},
        {"activation_checkpointing": "layers", "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"accelerator_config": {"split_batches": False, "dispatch_batches": False}},
    ],
)
def test_one_that_goes_with_another_is_taken_beside_it(tmp_path: Path, given: dict[str, Any]) -> None:
    PreferenceConfig(output_dir=str(tmp_path), report_to="none", **given)


@pytest.mark.parametrize(
    "given", [{"max_length": 64}, {"max_prompt_length": 20}, {"cut_long_responses": True}]
)
def test_lengths_for_text_are_refused_with_rows_of_ids(tmp_path: Path, given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(InputError, match=f"{name} = .* is for text; rows of ids are trained on as they are"):
        trainer(tmp_path, **given)
    trainer(tmp_path, max_length=None)
    trainer(tmp_path, texts(8), random_rows(2), processing_class=build_tokenizer(), **given)


def test_workers_start_as_is_asked_for(tmp_path: Path) -> None:
    made = trainer(tmp_path, dataloader_num_workers=1, dataloader_multiprocessing_context="forkserver")
    context: Any = made.get_train_dataloader().multiprocessing_context
    assert context.get_start_method() == "forkserver"
