"""Reference log-probs: every source gives the same, and the cache knows what it holds."""

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback

from slimepo.data.batch import StepCollator
from slimepo.data.rows import MISMATCHED
from slimepo.errors import InputError
from slimepo.model.adapters import lora_config
from slimepo.model.logps import response_logps
from slimepo.training.config import PreferenceConfig
from slimepo.training.reference import choose_reference, reference_logps
from slimepo.training.step import output_of
from slimepo.training.trainer import PreferenceTrainer
from tests.tiny import VOCABULARY, random_rows, tiny_model


def made(tmp_path: Path, model: Any = None, *, lora: bool = False, **options: Any) -> PreferenceTrainer:
    values: dict[str, Any] = dict(
        output_dir=str(tmp_path), loss="dpo", learning_rate=1e-2, logging_steps=1, save_strategy="no", max_steps=2,
        per_device_train_batch_size=4, disable_tqdm=True,
    )  # fmt: skip
    rows, heldout = options.pop("rows", None) or random_rows(8), options.pop("eval_dataset", None)
    model = model or tiny_model()
    # Adapters are made at random.
    torch.manual_seed(0)
    return PreferenceTrainer(
        model=model,
        args=PreferenceConfig(**(values | options)),
        train_dataset=rows,
        eval_dataset=heldout,
        peft_config=lora_config(r=4, alpha=8) if lora else None,
    )


def word_tokenizer(order: int) -> PreTrainedTokenizerFast:
    """As many tokens as the tiny model has embeddings."""
    words = [f"w{i}" for i in range(VOCABULARY)][::order]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


def logps_of(trainer: PreferenceTrainer) -> Tensor:
    """Reference log-probs of the training rows as the trainer sees them now."""
    batch = trainer.data_collator.batch(trainer.train_dataset)
    assert trainer.reference is not None
    with trainer.accelerator.autocast():
        return reference_logps(trainer.reference, [batch])[0]


def assert_same(a: Tensor, b: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIMEPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


class TestSources:
    @pytest.mark.parametrize("tied", [False, True])
    def test_adapters_off_copy_and_cache_agree_before_and_after_training(
        self, tmp_path: Path, tied: bool
    ) -> None:
        """The head trains as well, which must be the reference's own while the reference is asked."""
        start = tiny_model(tied=tied)
        trainers = {
            source: made(tmp_path, copy.deepcopy(start), lora=True, reference=source)
            for source in ("adapters-off", "copy", "cache")
        }
        expected = logps_of(trainers["copy"])
        for trainer in trainers.values():
            assert_same(logps_of(trainer), expected)
        weights = {}
        for source, trainer in trainers.items():
            trainer.train()
            assert_same(logps_of(trainer), expected)
            trained = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
            weights[source] = torch.cat([p.flatten() for p in trained])
        for source in ("adapters-off", "cache"):
            torch.testing.assert_close(weights[source], weights["copy"], rtol=1e-4, atol=1e-6)

    def test_the_policy_has_moved_while_its_reference_has_not(self, tmp_path: Path) -> None:
        """What the other tests hold would be true of a reference that follows the policy, were it not for this."""
        trainer = made(tmp_path, lora=True, max_steps=4)
        before = logps_of(trainer)
        trainer.train()
        line = trainer.state.log_history[-2]
        assert abs(line["rewards/margins"]) > 1e-3
        assert_same(logps_of(trainer), before)

    def test_the_head_is_the_policys_again_after_the_reference_was_asked(self, tmp_path: Path) -> None:
        trainer = made(tmp_path, lora=True)
        head = trainer.model.get_output_embeddings()
        trained = head.modules_to_save["default"].weight
        with torch.no_grad():
            trained.add_(0.1 * torch.randn_like(trained))
        batch = trainer.data_collator.batch(trainer.train_dataset)
        logps = response_logps(trainer.model, batch)
        output = output_of(trainer.objective, trainer.loss_function, logps, batch, logps_of(trainer), None)
        assert output.metrics["rewards/chosen"].abs().min() > 0
        output.loss.sum().backward()
        assert trained.grad is not None
        assert trained.grad.abs().max() > 0
        assert head.original_module.weight.grad is None

    @pytest.mark.parametrize("loss", ["dpo", "kto"])
    def test_adapters_are_switched_off_once_a_step_not_once_a_micro_batch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
    ) -> None:
        """Switching a large model costs as much as small micro-batches do; kto asks for mismatched answers as well."""
        trainer = made(
            tmp_path,
            lora=True,
            loss=loss,
            monitor=False,
            certificate=False,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
        )
        switched: list[int] = []
        real = trainer.model.disable_adapter

        def spy() -> Any:
            switched.append(trainer.state.global_step)
            return real()

        monkeypatch.setattr(trainer.model, "disable_adapter", spy)
        trainer.train()
        assert switched == ([0, 1] if loss == "dpo" else [0, 0, 1, 1])

    def test_what_the_user_froze_stays_frozen(self, tmp_path: Path) -> None:
        """peft makes every parameter of the adapter trainable when it is switched on again."""
        model = get_peft_model(tiny_model(), lora_config(r=4))
        halves = [parameter for name, parameter in model.named_parameters() if "lora_A" in name]
        for parameter in halves:
            parameter.requires_grad_(False)
        trainer = made(tmp_path, model, reference="adapters-off")
        trainer.train()
        assert not any(parameter.requires_grad for parameter in halves)

    def test_auto_takes_the_cheapest_that_is_right(self, tmp_path: Path) -> None:
        assert made(tmp_path, lora=True).reference.source == "adapters-off"  # type: ignore[union-attr]
        assert made(tmp_path).reference.source == "cache"  # type: ignore[union-attr]

    def test_adapters_that_were_trained_before_are_part_of_the_reference(self, tmp_path: Path) -> None:
        """Computed beforehand: a copy beside the policy could be a second model of many gigabytes."""
        first = made(tmp_path, lora=True)
        first.train()
        trainer = PreferenceTrainer(model=first.model, args=first.args, train_dataset=random_rows(8))
        assert trainer.reference is not None
        assert (trainer.reference.source, "trained before" in trainer.reference.reason) == ("cache", True)
        batch = trainer.data_collator.batch(trainer.train_dataset)
        logps = response_logps(trainer.model, batch)
        output = output_of(trainer.objective, trainer.loss_function, logps, batch, logps_of(trainer), None)
        assert output.metrics["rewards/chosen"].abs().max() < 1e-5
        with pytest.raises(InputError, match="trained before"):
            choose_reference(first.model, "adapters-off", "padded")

    def test_without_adapters_there_are_none_to_switch_off(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no adapters"):
            made(tmp_path, reference="adapters-off")

    def test_another_model_from_a_folder(self, tmp_path: Path) -> None:
        other = tiny_model(seed=5)
        other.save_pretrained(tmp_path / "other")
        trainer = made(tmp_path, reference=str(tmp_path / "other"))
        expected = made(tmp_path, other, reference="copy")
        assert_same(logps_of(trainer), logps_of(expected))

    def test_another_vocabulary_is_refused(self, tmp_path: Path) -> None:
        tiny_model(vocab_size=70).save_pretrained(tmp_path / "other")
        with pytest.raises(InputError, match="vocabulary of 70"):
            made(tmp_path, reference=str(tmp_path / "other"))

    def test_the_same_number_of_other_tokens_is_refused(self, tmp_path: Path) -> None:
        tiny_model().save_pretrained(tmp_path / "other")
        ours, theirs = (word_tokenizer(order) for order in (1, -1))
        reference = str(tmp_path / "other")
        theirs.save_pretrained(reference)
        with pytest.raises(InputError, match="the same tokens"):
            choose_reference(tiny_model(), reference, "padded", ours)
        ours.save_pretrained(reference)
        assert choose_reference(tiny_model(), reference, "padded", ours).source == reference

    def test_a_misspelt_source_names_the_nearest(self) -> None:
        with pytest.raises(InputError, match=r"reference 'adapter-off'.*did you mean 'adapters-off'"):
            choose_reference(tiny_model(), "adapter-off", "padded")

    def test_log_probs_that_rows_bring_from_elsewhere_are_not_taken(self, tmp_path: Path) -> None:
        rows = made(tmp_path, tiny_model(seed=5)).train_dataset
        trainer = made(tmp_path, tiny_model(), reference="copy", rows=rows)
        assert_same(logps_of(trainer), logps_of(made(tmp_path, tiny_model(), reference="copy")))

    def test_dropout_of_the_adapter_does_not_reach_the_reference(self, tmp_path: Path) -> None:
        model = tiny_model()
        args = PreferenceConfig(output_dir=str(tmp_path), loss="dpo", reference="copy", disable_tqdm=True)
        trainer = PreferenceTrainer(
            model=model, args=args, train_dataset=random_rows(4), peft_config=lora_config(r=4, dropout=0.5)
        )
        trainer.model.train()
        assert_same(logps_of(trainer), logps_of(trainer), atol=0)
        assert trainer.model.training


class TestCache:
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many rows were scored each time a trainer was made."""
        import slimepo.training.reference_cache as module

        counts: list[int] = []
        real = module.score_rows

        def spy(forward: Any, rows: Any, collator: StepCollator, *args: Any, **options: Any) -> Any:
            if collator.positions != (MISMATCHED,):
                counts.append(len(rows))
            return real(forward, rows, collator, *args, **options)

        monkeypatch.setattr(module, "score_rows", spy)
        return counts

    def test_it_is_used_again_and_made_anew_when_anything_changes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
    ) -> None:
        counts = self.calls(monkeypatch)
        rows = random_rows(8)
        first = logps_of(made(tmp_path, rows=rows))
        assert (counts, len(list(cache.glob("*.npy")))) == ([8], 1)
        again = logps_of(made(tmp_path, rows=rows))
        assert counts == [8]
        assert_same(again, first, atol=0)
        made(tmp_path, tiny_model(seed=1), rows=rows)
        assert counts == [8, 8], "other weights"
        made(tmp_path, rows=rows[::-1])
        assert counts == [8, 8, 8], "another order of the rows"
        # Another chat template shows in the tokens of the prompt alone.
        other = [replace(rows[0], prompt_ids=np.append(rows[0].prompt_ids, np.int32(3))), *rows[1:]]
        made(tmp_path, rows=other)
        assert counts == [8, 8, 8, 8], "another prompt"
        # A border that moves from the prompt to the response leaves the ids in a row as they were.
        moved = replace(
            rows[0],
            prompt_ids=rows[0].prompt_ids[:-1],
            responses=(np.append(rows[0].prompt_ids[-1:], rows[0].responses[0]), rows[0].responses[1]),
        )
        made(tmp_path, rows=[moved, *rows[1:]])
        assert counts == [8, 8, 8, 8, 8], "another border"
        assert len(list(cache.glob("*.npy"))) == 5

    def test_the_configuration_counts_as_well_as_the_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = self.calls(monkeypatch)
        rows = random_rows(8)
        made(tmp_path, tiny_model(), rows=rows)
        made(tmp_path, tiny_model(rms_norm_eps=1e-2), rows=rows)
        assert counts == [8, 8]

    def test_a_batch_holds_no_more_tokens_than_one_of_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes: list[int] = []
        real = StepCollator.batch

        def spy(self: StepCollator, pairs: Any, *positions: Any) -> Any:
            batch = real(self, pairs, *positions)
            sizes.append(batch["input_ids"].numel())
            return batch

        monkeypatch.setattr(StepCollator, "batch", spy)
        for layout in ("padded", "shared"):
            made(
                tmp_path,
                layout=layout,
                rows=random_rows(16),
                max_tokens_per_batch=70,
                per_device_train_batch_size=16,
            )
        assert len(sizes) > 4
        assert max(sizes) <= 70

    def test_so_does_the_precision_on_whatever_device(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = self.calls(monkeypatch)
        rows = random_rows(8)
        for bf16 in (True, False):
            made(tmp_path, tiny_model(), rows=rows, bf16=bf16)
        assert counts == [8, 8]

    def test_the_scale_of_a_trained_adapter_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its weights alone do not say how much of it is added to the model's."""
        counts = self.calls(monkeypatch)
        rows = random_rows(8)
        for alpha in (4, 8):
            model = get_peft_model(tiny_model(), lora_config(r=4, alpha=alpha, train_head=False))
            torch.manual_seed(0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.normal_(std=0.1)
            made(tmp_path, model, rows=rows, reference="cache")
        assert counts == [8, 8]

    def test_adapters_of_another_size_have_the_same_reference(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = self.calls(monkeypatch)
        rows = random_rows(8)
        for r in (4, 8):
            PreferenceTrainer(
                model=tiny_model(),
                args=PreferenceConfig(
                    output_dir=str(tmp_path), loss="dpo", reference="cache", disable_tqdm=True
                ),
                train_dataset=rows,
                peft_config=lora_config(r=r),
            )
        assert counts == [8]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"max_steps": 2}, 8),
            ({"max_steps": 5}, 20),
            ({"max_steps": 6}, 22),
            ({"max_steps": -1, "num_train_epochs": 0.5}, 12),
            ({"max_steps": 7, "dataloader_drop_last": True}, 22),
            ({"max_steps": 3, "train_sampling_strategy": "group_by_length"}, 12),
        ],
    )
    def test_only_rows_that_the_run_reads_are_computed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: int
    ) -> None:
        """22 rows make five steps of four and one of two; drop_last reads the others in later epochs."""
        counts = self.calls(monkeypatch)
        rows = random_rows(22)
        trainer = made(tmp_path, rows=rows, **options)
        known = {row.id for row in trainer.train_dataset if "reference" in row.values}
        read: set[str] = set()
        real = type(trainer).training_step

        def spy(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
            read.update(row for batch in inputs["batches"] for row in batch["row_ids"])
            return real(self, model, inputs, *rest)

        monkeypatch.setattr(type(trainer), "training_step", spy)
        trainer.train()
        assert known == read
        assert counts == [len(known)]
        if "dataloader_drop_last" not in options:
            assert len(known) == expected
        assert [row.id for row in trainer.train_dataset] == [row.id for row in rows]

    def test_a_short_run_ends_in_the_weights_that_a_copy_gives(self, tmp_path: Path) -> None:
        weights = []
        for source in ("cache", "copy"):
            trainer = made(tmp_path, reference=source, rows=random_rows(22), max_steps=3)
            trainer.train()
            weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)

    def test_rows_that_no_step_reads_are_scored_when_asked_for_before_training(self, tmp_path: Path) -> None:
        trainer = made(tmp_path, rows=random_rows(22))
        figures = trainer.evaluate(trainer.train_dataset)
        assert figures["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)

    def test_files_that_nobody_used_for_longest_make_room(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
    ) -> None:
        def use(seed: int) -> None:
            made(tmp_path, tiny_model(seed=seed))
            for path in cache.glob("*.npy"):
                used = path.stat().st_mtime_ns - 10**9
                os.utime(path, ns=(used, used))

        def kept() -> set[str]:
            return {path.name for path in cache.glob("*.npy")}

        use(1)
        first = kept()
        use(2)
        second = kept() - first
        use(1)
        size = max(path.stat().st_size for path in cache.glob("*.npy"))
        monkeypatch.setenv("SLIMEPO_REFERENCE_CACHE_GIB", str(2.5 * size / 2**30))
        use(3)
        assert first < kept(), "used since the second was"
        assert not second & kept()
        monkeypatch.setenv("SLIMEPO_REFERENCE_CACHE_GIB", "0")
        use(4)
        assert len(kept()) == 1, "the file of the run itself stays"

    def test_a_limit_that_is_no_number_is_named_before_anything_is_computed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = self.calls(monkeypatch)
        for wrong in ("10 GB", "-1", "nan"):
            monkeypatch.setenv("SLIMEPO_REFERENCE_CACHE_GIB", wrong)
            with pytest.raises(InputError, match=f"SLIMEPO_REFERENCE_CACHE_GIB.*{wrong}"):
                made(tmp_path)
        assert counts == []

    def test_a_damaged_file_is_named(self, tmp_path: Path, cache: Path) -> None:
        made(tmp_path)
        (path,) = cache.glob("*.npy")
        np.save(path, np.zeros(3, dtype=np.float32))
        with pytest.raises(InputError, match="delete it"):
            made(tmp_path)
        path.write_bytes(b"")
        with pytest.raises(InputError, match="delete it"):
            made(tmp_path)

    def test_a_folder_that_cannot_be_written_is_named_before_anything_is_computed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = self.calls(monkeypatch)
        (tmp_path / "file").touch()
        monkeypatch.setenv("SLIMEPO_CACHE", str(tmp_path / "file"))
        with pytest.raises(InputError, match="SLIMEPO_CACHE"):
            made(tmp_path)
        assert counts == []

    def test_rows_given_after_training_are_refused(self, tmp_path: Path) -> None:
        trainer = made(tmp_path)
        before = trainer.evaluate(random_rows(3, seed=4))
        assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
        trainer.train()
        with pytest.raises(InputError, match="not computed before training"):
            trainer.evaluate(random_rows(3, seed=5))

    @pytest.mark.parametrize("source", ["cache", "copy", "adapters-off"])
    def test_an_untrained_policy_is_its_reference_in_evaluation_too(
        self, tmp_path: Path, source: str
    ) -> None:
        """Evaluation measures in another precision than training, and the reference has to follow it."""
        lora = source == "adapters-off"
        trainer = made(tmp_path, lora=lora, bf16=True, reference=source)
        figures = trainer.evaluate(random_rows(5, seed=4))
        assert [figures[f"eval_rewards/{side}"] for side in ("chosen", "rejected")] == pytest.approx(
            [0, 0], abs=1e-6
        )

    def test_rows_that_another_trainer_had_leave_its_reference_there(self, tmp_path: Path) -> None:
        one = made(tmp_path, tiny_model(seed=3), reference="cache", eval_dataset=random_rows(5, seed=4))
        other = made(tmp_path, tiny_model(), reference="cache", eval_dataset=one.eval_dataset)
        assert other.evaluate()["eval_rewards/chosen"] == pytest.approx(0, abs=1e-6)

    def test_rows_for_evaluation_have_theirs_from_the_start(self, tmp_path: Path) -> None:
        rows = random_rows(3, seed=4)
        scores = {}
        for source in ("cache", "copy"):
            trainer = made(tmp_path, tiny_model(), reference=source)
            trainer.eval_dataset = trainer._dataset(rows)
            trainer.train()
            scores[source] = trainer.score(trainer.eval_dataset)
        assert scores["cache"] == pytest.approx(scores["copy"], rel=1e-5)


class TestReferenceFree:
    @pytest.mark.parametrize("loss", ["slime", "simpo", "orpo", "sft"])
    def test_no_second_forward_pass_and_no_second_copy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, cache: Path
    ) -> None:
        def forbidden(*_: Any, **__: Any) -> None:
            raise AssertionError("a reference was asked for")

        for name in (
            "reference.choose_reference",
            "reference_cache.reference_values",
            "step.reference_logps",
        ):
            monkeypatch.setattr(f"slimepo.training.{name}", forbidden)
        model = tiny_model()
        trainer = made(tmp_path, model, loss=loss, monitor=False, certificate=False)
        backbone: nn.Module = model.base_model
        passes = []
        backbone.register_forward_hook(lambda *_: passes.append(1))
        trainer.train()
        assert trainer.reference is None
        assert len(passes) == 2, "one pass a step"
        assert not cache.exists()

    def test_a_source_that_nothing_reads_is_refused(self) -> None:
        with pytest.raises(InputError, match="reads no reference"):
            PreferenceConfig(loss="slime", reference="copy")


def test_a_batch_without_known_log_probs_is_named_where_they_had_to_be_known(tmp_path: Path) -> None:
    trainer = made(tmp_path)
    assert trainer.reference is not None
    batch = StepCollator(2).batch(random_rows(2))
    with pytest.raises(InputError, match="row 0"):
        reference_logps(trainer.reference, [batch])


class TestMovingReference:
    """TR-DPO: `sync_reference`."""

    MOVES: ClassVar[Any] = dict(max_steps=4, sync_reference={"every": 2, "share": 0.25})

    def test_it_moves_towards_the_policy_of_that_step(self, tmp_path: Path) -> None:
        trainer = made(tmp_path, **self.MOVES)
        assert trainer.reference is not None
        start = [p.clone() for p in trainer.reference.model.parameters()]
        seen: list[list[Tensor]] = []

        class Look(TrainerCallback):
            def on_step_end(self, *args: Any, **given: Any) -> None:
                seen.append([p.detach().clone() for p in given["model"].parameters()])

        trainer.add_callback(Look())
        trainer.train()
        for i, now in enumerate(trainer.reference.model.parameters()):
            wanted = 0.25 * seen[3][i] + 0.75 * (0.25 * seen[1][i] + 0.75 * start[i])
            torch.testing.assert_close(now, wanted, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("lora", [False, True])
    def test_a_run_that_goes_on_from_a_checkpoint_has_the_reference_of_then(
        self, tmp_path: Path, lora: bool
    ) -> None:
        options = self.MOVES | dict(save_strategy="steps", save_steps=3, lora=lora)
        whole = made(tmp_path, **options)
        whole.train()
        again = made(tmp_path, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        for of in (lambda t: t.model, lambda t: t.reference.model):
            assert all(map(torch.equal, of(whole).parameters(), of(again).parameters()))
        assert again.moving is not None
        with pytest.raises(
            InputError, match=r"has no reference\.pt: it is of a run whose reference stood still"
        ):
            again.moving.load(tmp_path)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"loss": "slime"}, "reads no reference model: leave sync_reference out"),
            ({"reference": "cache"}, "reference = 'cache' has none: use 'copy'"),
            ({"parallel": "fsdp2"}, "parallel = 'fsdp2' cuts them"),
            ({"sync_reference": {"every": 0}}, "sync_reference: every"),
            ({"sync_reference": {"share": 2}}, "sync_reference: share"),
            ({"sync_reference": {"evry": 2}}, "evry.*did you mean 'every'"),
        ],
    )
    def test_where_nothing_could_move_is_said(
        self, tmp_path: Path, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(InputError, match=words):
            made(tmp_path, **(self.MOVES | options))

    def test_a_reference_of_another_make_is_refused(self, tmp_path: Path) -> None:
        other = tiny_model(hidden_size=16)
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(InputError, match="the reference has other weights than the policy"):
            made(tmp_path, reference=str(tmp_path / "other"), **self.MOVES).train()
