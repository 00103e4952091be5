"""A user of TRL's trainers: the names of its configs and arguments mean something here, or are refused in words."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser, PreTrainedModel

from slimepo.errors import InputError
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.training.config import PreferenceConfig, SLIMEConfig, settled
from slimepo.training.trainer import PreferenceTrainer, SLIMETrainer
from slimepo.training.trl_names import LOSS_TYPES, TRL_ARGUMENTS, TRL_NAMES, in_own_arguments
from tests.tiny import random_rows, tiny_model
from tests.training import trl_tables


def trl(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(__import__(module, fromlist=[name]), name)


def config(tmp_path: Path, kind: type[PreferenceConfig] = PreferenceConfig, **given: Any) -> PreferenceConfig:
    usual: dict[str, Any] = dict(
        output_dir=str(tmp_path), max_steps=1, save_strategy="no", report_to="none", monitor=False,
        logging_steps=1, disable_tqdm=True, learning_rate=1e-2, per_device_train_batch_size=4,
    )  # fmt: skip
    return kind(**(usual | given))


def texts(count: int = 8) -> list[dict[str, str]]:
    return [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i} {i}"} for i in range(count)]


def world_model(**sizes: int) -> PreTrainedModel:
    return tiny_model(vocab_size=len(build_tokenizer()), **sizes)


class TestConfig:
    @pytest.mark.parametrize("loss", ["dpo", "kto", "cpo", "orpo", "tpo", "sft"])
    def test_every_field_of_trls_configs_has_an_answer(self, loss: str) -> None:
        ours = {field.name for field in dataclasses.fields(PreferenceConfig)}
        assert {field.name for field in dataclasses.fields(trl_tables.trl_configs()[loss])} <= ours

    def test_every_name_is_mapped_or_refused_in_words(self) -> None:
        fields = {field.name for field in dataclasses.fields(PreferenceConfig)}
        for name, meant in TRL_NAMES.items():
            assert meant.ours or meant.values or meant.instead, name
            settings = [meant.ours, *(key for value in meant.values.values() for key in value)]
            assert {key.partition(".")[0] for key in settings if key} <= fields, name

    @pytest.mark.parametrize(
        ("given", "loss", "options"),
        [
            ({"loss": "dpo", "beta": 0.3}, "dpo", {"beta": 0.3}),
            ({"loss": "dpo", "beta": 0.3, "label_smoothing": 0.1}, "dpo", {"beta": 0.3, "label_smoothing": 0.1}),
            ({"loss": "dpo", "loss_type": "ipo", "beta": 0.3}, "ipo", {"tau": 0.3}),
            ({"loss": "dpo", "loss_type": ["sigmoid"], "loss_weights": [1.0]}, "dpo", {}),
            ({"loss": "dpo", "loss_type": "hinge", "beta": 0.3}, "hinge", {"beta": 0.3}),
            ({"loss": "dpo", "loss_type": "aot", "label_smoothing": 0.1}, "aot", {"label_smoothing": 0.1}),
            ({"loss": "dpo", "loss_type": "sigmoid_norm"}, "sigmoid_norm", {}),
            ({"loss": "dpo", "loss_type": "discopop", "discopop_tau": 0.1}, "discopop", {"temperature": 0.1}),
            ({"loss": "dpo", "loss_type": "apo_zero", "ld_alpha": 1.0, "f_divergence_type": "reverse_kl"},
             "apo_zero", {}),
            ({"loss": "dpo", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}, "dpo",
             {"f_divergence": "alpha_divergence", "f_alpha": 0.5}),
            ({"loss": "dpo", "ld_alpha": 0.5}, "dpo", {"ld_alpha": 0.5}),
            ({"loss": "dpo", "loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
             "0.8*dpo+0.2*bco_pair+1.0*sft", {"sft": {"average": "token"}}),
            ({"loss": "dpo", "loss_type": ["sigmoid", "ipo"], "beta": 0.3, "ld_alpha": 0.5}, "1.0*dpo+1.0*ipo",
             {"dpo": {"beta": 0.3, "ld_alpha": 0.5}, "ipo": {"tau": 0.3, "ld_alpha": 0.5}}),
            ({"loss": "dpo", "loss_type": "sigmoid", "loss_weights": [0.5]}, "0.5*dpo", {}),
            ({"loss": "cpo", "loss_type": "hinge", "cpo_alpha": 0.5}, "slic", {"nll_weight": 0.5}),
            ({"loss": "cpo", "loss_type": "alphapo", "alpha": 0.1}, "alpha_po", {"alpha": 0.1}),
            ({"loss": "cpo", "loss_type": "simpo", "alpha": 0.1}, "alpha_po", {"alpha": 0.1}),
            ({"loss": "cpo", "loss_type": "simpo", "alpha": 0.0}, "simpo", {}),
            ({"loss": "tpo", "loss_type": "tpo-l", "tpo_alpha": 0.5, "tpo_l_gamma": 1.0}, "tpo/l",
             {"nll_weight": 0.5, "gamma": 1.0}),
            ({"loss": "dpo", "loss_type": "sft"}, "sft", {"average": "token"}),
            ({"loss": "cpo", "loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0}, "simpo",
             {"nll_weight": 0.0, "gamma": 1.0}),
            ({"loss": "kto", "desirable_weight": 2.0}, "kto", {"desirable_weight": 2.0}),
            ({"loss": "kto", "loss_type": "apo_zero_unpaired", "beta": 0.3}, "kto",
             {"reference_point": False, "beta": 0.3}),
            ({"loss": "orpo", "beta": 0.2, "label_smoothing": 0.0}, "orpo", {"beta": 0.2}),
            ({"loss": "sft", "loss_type": "nll", "packing": False}, "sft", {"average": "token"}),
        ],
    )  # fmt: skip
    def test_the_objective(self, tmp_path: Path, given: Any, loss: str, options: Any) -> None:
        found = settled(config(tmp_path, **given))
        assert (found.loss, found.loss_options) == (loss, options)

    @pytest.mark.parametrize(
        ("given", "setting", "value"),
        [
            ({"precompute_ref_log_probs": True}, "reference", "cache"),
            ({"precompute_ref_log_probs": False}, "reference", "auto"),
            ({"padding_free": True}, "layout", "packed"),
            ({"sync_ref_model": True}, "sync_reference", {"every": 512, "share": 0.6}),
            (
                {"sync_ref_model": True, "ref_model_sync_steps": 64},
                "sync_reference",
                {"every": 64, "share": 0.6},
            ),
            ({"sync_ref_model": False}, "sync_reference", None),
            ({"truncation_mode": "keep_start"}, "cut_long_responses", True),
            ({"max_length": None}, "max_length", sys.maxsize),
            ({"max_seq_length": 64}, "max_length", 64),
            ({"trust_remote_code": True}, "model_init_kwargs", {"trust_remote_code": True}),
            ({"model_init_kwargs": {"torch_dtype": "bfloat16"}}, "model_init_kwargs", {"dtype": "bfloat16"}),
            ({"model_init_kwargs": None}, "model_init_kwargs", {}),
            ({"gradient_checkpointing": True}, "activation_checkpointing", True),
        ],
    )
    def test_other_settings(self, tmp_path: Path, given: Any, setting: str, value: Any) -> None:
        assert getattr(settled(config(tmp_path, loss="dpo", **given)), setting) == value

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"beta": 0.2}, "loss 'slime' has no hyperparameter 'beta'"),
            (
                {"loss": "cpo", "loss_type": "ipo"},
                r"'ipo' of loss 'cpo' \(sigmoid, simpo, hinge, alphapo are here\)",
            ),
            (
                {"loss": "dpo", "loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]},
                "give each variant once, and a weight each",
            ),
            ({"loss_type": "sigmoid"}, "give that, loss = 'dpo' or 'kto'"),
            ({"dataset_num_proc": 4}, "dataset_num_proc = 4 is a setting of TRL's: .*leave it out"),
            (
                {"loss": "dpo", "loss_type": "apo_zero", "ld_alpha": 0.5},
                "'apo_zero' has no hyperparameter 'ld_alpha'",
            ),
            ({"loss": "dpo", "f_divergence_type": "alpha_divergence"}, "f_alpha goes with"),
            ({"loss": "aot", "use_weighting": True}, r"'wpo\(aot\)': aot sorts answers"),
            ({"loss": "dpo", "ref_model_sync_steps": 64}, "goes with sync_reference, which is not asked for"),
            ({"truncation_mode": "keep_end"}, "cut_long_responses"),
            ({"pad_token": "<pad>"}, "processing_class"),
            ({"loss": "dpo", "beta": 0.2, "loss_options": {"beta": 0.1}}, "leave one of them out"),
            ({"loss": "dpo", "precompute_ref_log_probs": True, "reference": "copy"}, "leave one of them out"),
            (
                {"model_init_kwargs": {"torch_dtype": "bfloat16", "dtype": "float32"}},
                "both dtype and torch_dtype",
            ),
            (
                {"loss": "dpo", "label_smoothing_factor": 0.1},
                "would change nothing: .*loss_options.label_smoothing",
            ),
            ({"use_liger_kernel": True}, "would change nothing"),
            ({"deepspeed": "zero2.json"}, "fsdp_config and deepspeed are set by parallel"),
        ],
    )
    def test_what_is_refused_says_what_stands_in_its_place(
        self, tmp_path: Path, given: Any, words: str
    ) -> None:
        with pytest.raises(InputError, match=words) as raised:
            config(tmp_path, **given)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"report_to": "wandbb"}, "unknown tracker 'wandbb'.*did you mean 'wandb'"),
            ({"optim": "adamw_bnb_8bit"}, "optim = 'adamw_bnb_8bit': .*bitsandbytes"),
            ({"optim": "galore_adamw"}, "optim = 'galore_adamw': "),
            ({"adam_beta1": 2.0}, "optim = 'adamw_torch.*': Invalid beta"),
            ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "lr_scheduler_type = 'cosine': "),
            ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type = 'warmup_stable_decay': "),
            ({"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}, "flash-attn"),
            ({"model_init_kwargs": {"load_in_4bit": True}}, "bitsandbytes"),
        ],
    )  # fmt: skip
    def test_what_is_not_installed_or_impossible_is_one_line_before_a_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, words: str
    ) -> None:
        for check in ("is_bitsandbytes_available", "is_flash_attn_2_available"):
            monkeypatch.setattr(f"slimepo.training.libraries.{check}", lambda: False)
        monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
        with pytest.raises(InputError, match=words) as raised:
            config(tmp_path, **given)
        assert "\n" not in str(raised.value)

    def test_a_tracker_that_is_not_installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
        with pytest.raises(
            InputError, match="report_to: wandb is not installed; install it, or give report_to: none"
        ):
            config(tmp_path, report_to="wandb")


class TestArgumentParsers:
    @pytest.mark.parametrize("parser", [HfArgumentParser, trl("trl:TrlParser")])
    def test_read_the_configs_from_a_command_line(self, tmp_path: Path, parser: Any) -> None:
        line = ["--output_dir", str(tmp_path), "--loss", "dpo", "--beta", "0.3", "--loss_type", "ipo", "--max_length",
                "64", "--monitor", "false", "--activation_checkpointing", "layers", "--model_init_kwargs",
                '{"dtype": "bfloat16"}', "--precompute_ref_log_probs"]  # fmt: skip
        found = settled(parser(PreferenceConfig).parse_args_into_dataclasses(line)[0])
        assert (found.loss, found.loss_options, found.max_length, found.monitor) == (
            "ipo",
            {"tau": 0.3},
            64,
            False,
        )
        assert (found.reference, found.activation_checkpointing) == ("cache", True)
        assert found.model_init_kwargs == {"dtype": "bfloat16"}
        slime = parser(SLIMEConfig).parse_args_into_dataclasses(["--hard_margin", "9"])[0]
        assert settled(slime).loss_options["hard_margin"] == 9

    def test_text_that_is_no_dictionary_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"loss_options = '.*' is no JSON"):
            config(tmp_path, loss_options="{beta: 1}")


class TestSettingsChangedLater:
    def first_loss(self, args: PreferenceConfig) -> float:
        trainer = PreferenceTrainer(tiny_model(), args, random_rows(4))
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    def test_before_a_trainer_is_made_they_count(self, tmp_path: Path) -> None:
        at_once = self.first_loss(config(tmp_path, SLIMEConfig, hard_margin=9.0))
        later = config(tmp_path, SLIMEConfig)
        later.hard_margin = 9.0
        copied = dataclasses.replace(config(tmp_path, SLIMEConfig), hard_margin=9.0)
        assert self.first_loss(later) == self.first_loss(copied) == at_once
        assert at_once != self.first_loss(config(tmp_path, SLIMEConfig))
        trls = config(tmp_path, loss="dpo")
        trls.beta = 0.7
        assert settled(trls).loss_options == {"beta": 0.7}

    def test_one_config_serves_several_trainers_with_changes_between_them(self, tmp_path: Path) -> None:
        args, losses = config(tmp_path, SLIMEConfig), []
        for margin in (1.5, 9.0):
            args.hard_margin = margin
            losses.append(self.first_loss(args))
        assert losses[0] != losses[1]

    @pytest.mark.parametrize(
        ("name", "value"),
        [("hard_margin", 9.0), ("max_length", 5), ("loss_options", {"exponent": 1.0}), ("bf16", True)],
    )
    def test_afterwards_they_are_refused(self, tmp_path: Path, name: str, value: Any) -> None:
        trainer = PreferenceTrainer(tiny_model(), config(tmp_path, SLIMEConfig), random_rows(4))
        setattr(trainer.args, name, value)
        for use in (trainer.train, lambda: trainer.evaluate(random_rows(2))):
            with pytest.raises(InputError, match=f"{name} was .* when the trainer was made and is"):
                use()

    def test_a_config_that_is_changed_when_its_trainer_is_there_is_refused(self, tmp_path: Path) -> None:
        args = config(tmp_path, SLIMEConfig)
        trainer = PreferenceTrainer(tiny_model(), args, random_rows(4))
        args.learning_rate = 1.0
        with pytest.raises(
            InputError, match=r"learning_rate was 0\.01 when the trainer was made and is 1\.0"
        ):
            trainer.train()

    def test_what_transformers_reads_while_it_trains_can_be_changed(self, tmp_path: Path) -> None:
        trainer = PreferenceTrainer(tiny_model(), config(tmp_path), random_rows(8))
        trainer.args.max_steps = 2
        trainer.train()
        assert trainer.state.global_step == 2


class TestArguments:
    """The shapes in which public scripts call TRL's trainers."""

    def test_a_reference_by_place_and_the_rest_by_name(self, tmp_path: Path) -> None:
        """As notebooks on DPO do: `DPOTrainer(model, ref_model, args=..., train_dataset=..., tokenizer=...)`."""
        for reference in (None, world_model(hidden_size=16)):
            trainer = PreferenceTrainer(
                world_model(), reference, args=config(tmp_path, loss="dpo"), train_dataset=texts(),
                tokenizer=build_tokenizer(),
            )  # fmt: skip
            trainer.train()
            assert trainer.ref_model is reference
            assert ("frozen" in trainer.reference.reason) == (reference is not None)

    def test_everything_by_place_in_trls_order_and_in_ours(self, tmp_path: Path) -> None:
        args, rows, tokenizer = config(tmp_path, loss="dpo"), texts(), build_tokenizer()
        theirs = PreferenceTrainer(world_model(), None, args, None, rows, rows[:4], tokenizer)
        ours = PreferenceTrainer(world_model(), args, rows, rows[:4], tokenizer)
        assert theirs.evaluate()["eval_loss"] == ours.evaluate()["eval_loss"]

    def test_by_place_in_the_order_of_trainers_without_a_reference(self, tmp_path: Path) -> None:
        args, rows, tokenizer = config(tmp_path, loss="orpo"), texts(), build_tokenizer()
        theirs = PreferenceTrainer(world_model(), args, None, rows, rows[:4], tokenizer)
        assert len(theirs.train_dataset) == 8
        assert len(theirs.eval_dataset) == 4
        with pytest.raises(InputError, match="takes no data_collator: rows are batched"):
            PreferenceTrainer(world_model(), args, print, rows)
        with pytest.raises(InputError, match="8 arguments without a name: give them by name"):
            PreferenceTrainer(world_model(), args, None, rows, rows, tokenizer, None, [])

    def test_a_script_with_two_parsers_evaluation_and_figures(self, tmp_path: Path) -> None:
        """As alignment scripts do: parsed arguments, string rows, evaluation while training, files of figures."""
        world_model().save_pretrained(tmp_path / "model")
        build_tokenizer().save_pretrained(tmp_path / "model")
        line = ["--output_dir", str(tmp_path / "out"), "--loss", "dpo", "--beta", "0.05", "--max_steps", "2",
                "--eval_strategy", "steps", "--eval_steps", "1", "--gradient_checkpointing", "--logging_steps", "1",
                "--per_device_train_batch_size", "2", "--report_to", "none"]  # fmt: skip
        args = trl("trl:TrlParser")(PreferenceConfig).parse_args_into_dataclasses(line)[0]
        args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        trainer = PreferenceTrainer(
            str(tmp_path / "model"), ref_model=None, args=args, train_dataset=texts(), eval_dataset=texts(4),
            peft_config=None,
        )  # fmt: skip
        result = trainer.train()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("eval", trainer.evaluate())
        trainer.save_state()
        trainer.save_model(str(tmp_path / "trained"))
        assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == [1, 2, 2]
        assert {"eval_rewards/margins", "eval_runtime"} <= trainer.state.log_history[-1].keys()
        assert (tmp_path / "trained" / "config.json").exists()

    def test_a_reference_by_its_folder(self, tmp_path: Path) -> None:
        other = world_model(seed=3)
        other.save_pretrained(tmp_path / "other")
        by_name, as_object = (
            PreferenceTrainer(
                world_model(), ref_model=reference, args=config(tmp_path, loss="dpo"), train_dataset=texts(),
                processing_class=build_tokenizer(),
            )
            for reference in (str(tmp_path / "other"), other)
        )  # fmt: skip
        assert by_name.score(texts(4))["loss"] == pytest.approx(as_object.score(texts(4))["loss"], abs=1e-6)
        assert by_name.score(texts(4))["loss"] != pytest.approx(0.6931, abs=1e-3)

    def test_a_model_knows_its_tokenizer_by_name(self, tmp_path: Path) -> None:
        world_model().save_pretrained(tmp_path)
        build_tokenizer().save_pretrained(tmp_path)
        model = type(world_model()).from_pretrained(tmp_path)
        trainer = PreferenceTrainer(model, args=config(tmp_path, loss="orpo"), train_dataset=texts())
        assert trainer.processing_class.get_vocab() == build_tokenizer().get_vocab()

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"ref_model": nn.Linear(1, 1)}, "loss 'slime' reads no reference model: leave ref_model out"),
            ({"compute_metrics": print}, "the trainer takes no compute_metrics: .*score_pairs"),
            ({"data_collator": print}, "the trainer takes no data_collator: rows are batched"),
            ({"beta": 0.1}, "the trainer takes no beta: give it in the config, beta=0.1"),
            ({"quantization_config": {"load_in_4bit": True}}, "quantization_config is for loading a model"),
            ({"train_datset": []}, "takes no 'train_datset' .did you mean 'train_dataset'"),
            ({"processing_class": 1, "tokenizer": 2}, "processing_class twice"),
        ],
    )  # fmt: skip
    def test_what_is_not_taken_says_what_stands_in_its_place(
        self, tmp_path: Path, given: Any, words: str
    ) -> None:
        with pytest.raises(InputError, match=words):
            SLIMETrainer(tiny_model(), args=config(tmp_path, SLIMEConfig), **given)

    def test_the_model_that_trains_is_no_reference(self, tmp_path: Path) -> None:
        model = tiny_model()
        with pytest.raises(InputError, match="ref_model is the model that trains"):
            PreferenceTrainer(model, model, args=config(tmp_path, loss="dpo"))

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # TRL's own
    def test_another_kind_of_config_is_refused(self, tmp_path: Path) -> None:
        theirs = trl("trl:DPOConfig")(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        with pytest.raises(InputError, match=r"args is a DPOConfig: give a slimepo\.PreferenceConfig"):
            PreferenceTrainer(tiny_model(), args=theirs)

    @pytest.mark.parametrize(
        "name",
        [
            "trl:DPOTrainer", "trl:KTOTrainer", "trl:SFTTrainer", "trl.experimental.cpo:CPOTrainer",
            "trl.experimental.orpo:ORPOTrainer",
        ],
    )  # fmt: skip
    def test_every_argument_of_trls_trainers_has_an_answer(self, name: str) -> None:
        import inspect

        ours = inspect.signature(PreferenceTrainer.__init__).parameters
        for argument in inspect.signature(trl(name).__init__).parameters:
            assert argument in (*ours, *TRL_ARGUMENTS, "ref_model", "quantization_config")

    def test_none_counts_as_not_given(self) -> None:
        own = dict.fromkeys(("args", "train_dataset"))
        assert in_own_arguments(own, (), {"compute_metrics": None, "ref_model": None}) == {}


def test_the_page_on_trl_has_the_tables_of_the_code_and_of_the_installed_trl() -> None:
    page = trl_tables.PAGE.read_text(encoding="utf-8")
    assert trl_tables.written(page) == page, "run python -m tests.training.trl_tables"


def test_the_losses_that_variants_stand_for_are_there() -> None:
    for kinds in LOSS_TYPES.values():
        for loss, options in kinds.values():
            PreferenceConfig(loss=loss, loss_options=dict(options))


def test_a_loaded_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    world_model().save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    args = config(tmp_path, model_init_kwargs={"torch_dtype": "bfloat16"})
    from slimepo.model.adapters import lora_config

    trainer = PreferenceTrainer(
        str(tmp_path), args=args, train_dataset=texts(), peft_config=lora_config(r=2, train_head=False)
    )
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16, torch.float32}
    assert re.search("loaded already", _refusal(lambda: PreferenceTrainer(world_model(), args=args)))


def _refusal(call: Any) -> str:
    with pytest.raises(InputError) as raised:
        call()
    return str(raised.value)
