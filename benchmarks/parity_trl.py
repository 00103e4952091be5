"""TRL's trainers, each with a batch that it has made itself, to be asked for its loss: what `parity` compares with."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers import IGNORED
from slimepo.data.rows import Row

WORDS = 61
PAIRS = 8
# Tokens of a response.
LONGEST = 12

Rows = Sequence[Row]


class Peer(NamedTuple):
    """TRL's trainer of an objective, the batch it collated, and the rows in it as slimepo reads them."""

    trainer: Any
    batch: dict[str, Any]
    rows: Rows


def trl_dpo(
    options: dict[str, Any], policy: nn.Module, reference: nn.Module, rows: Rows, folder: Path
) -> Peer:
    """TRL's DPOTrainer with a reference model beside the policy."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    columns = [id_columns(row, "chosen", "rejected") for row in rows]
    trainer = Tokenised(
        model=policy,
        ref_model=copy.deepcopy(reference),
        args=DPOConfig(max_length=None, **options, **arguments(folder)),
        train_dataset=Dataset.from_list(columns),
        processing_class=word_tokenizer(),
    )
    return Peer(trainer, trainer.data_collator(list(trainer.train_dataset)), rows)


def trl_tpo(
    options: dict[str, Any], policy: nn.Module, reference: nn.Module, rows: Rows, folder: Path
) -> Peer:
    """TRL's TPOTrainer, whose `reference` is the gold answer of a row."""
    from datasets import Dataset
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    class Tokenised(TPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    trainer = Tokenised(
        model=policy,
        args=TPOConfig(max_length=None, **options, **arguments(folder)),
        train_dataset=Dataset.from_list([id_columns(row, "chosen", "rejected", "reference") for row in rows]),
        processing_class=word_tokenizer(),
    )
    return Peer(trainer, trainer.data_collator(list(trainer.train_dataset)), rows)


def trl_kto(policy: nn.Module, reference: nn.Module, rows: Rows, folder: Path) -> Peer:
    """TRL's KTOTrainer; the rows are those that it made of the text itself, mismatched answers included."""
    from datasets import Dataset
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    answers = [(row.prompt_ids, row.responses[0], True) for row in rows[::2]]
    answers += [(row.prompt_ids, row.responses[1], False) for row in rows[1::2]]
    text = [
        {"prompt": words(prompt), "completion": " " + words(answer), "label": label}
        for prompt, answer, label in answers
    ]
    trainer = KTOTrainer(
        model=policy,
        ref_model=copy.deepcopy(reference),
        args=KTOConfig(max_length=None, undesirable_weight=1.3, **arguments(folder)),
        train_dataset=Dataset.from_list(text),
        processing_class=word_tokenizer(),
    )
    features = list(trainer.train_dataset)
    judged = [as_judged(feature, f"row {i}") for i, feature in enumerate(features)]
    return Peer(trainer, trainer.data_collator(features), judged)


def trl_cpo(
    options: dict[str, Any], policy: nn.Module, reference: nn.Module, rows: Rows, folder: Path
) -> Peer:
    """TRL's CPOTrainer, which knows SimPO's loss as well."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return without_reference(CPOTrainer, CPOConfig, options, policy, rows, folder)


def trl_orpo(policy: nn.Module, reference: nn.Module, rows: Rows, folder: Path) -> Peer:
    """TRL's ORPOTrainer."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return without_reference(ORPOTrainer, ORPOConfig, {}, policy, rows, folder)


def trl_samples(
    kind: str, options: dict[str, Any], policy: nn.Module, reference: nn.Module, rows: Rows, folder: Path
) -> Peer:
    """TRL's GRPOTrainer or RLOOTrainer with given samples, for whose rewards it makes advantages itself.

    They were sampled by a policy that has moved a little since. Its log-probs reach both sides as rows hold them, in
    float32, in which TRL makes its advantages too.
    """
    from datasets import Dataset

    trainer_class: Any = getattr(import_module(f"trl.trainer.{kind.lower()}_trainer"), f"{kind}Trainer")
    config_class: Any = getattr(import_module(f"trl.trainer.{kind.lower()}_config"), f"{kind}Config")
    samples = len(rows[0].responses)
    prompts = [row.prompt_ids.tolist() for row in rows for _ in row.responses]
    answers = [response.tolist() for row in rows for response in row.responses]

    class Given(trainer_class):  # type: ignore[misc]
        def _generate(self, texts: list[str]) -> tuple[Any, ...]:
            found = [words(np.array(answer)) for answer in answers]
            if kind == "RLOO":
                return prompts, answers, found
            return prompts, answers, None, found, None, {}, None, None

    def rewards(completions: list[str], **_: Any) -> list[float]:
        return sample_rewards(len(rows), samples).flatten().tolist()

    texts = [{"prompt": words(row.prompt_ids)} for row in rows for _ in row.responses]
    # TRL loads the reference from where the policy says that it comes from.
    reference.save_pretrained(folder / "reference")  # type: ignore[operator]
    policy.config._name_or_path = str(folder / "reference")  # type: ignore[union-attr]
    batch_size = {"per_device_train_batch_size": len(answers)}
    trainer = Given(
        model=policy,
        reward_funcs=rewards,
        args=config_class(
            num_generations=samples,
            max_completion_length=LONGEST,
            **(arguments(folder) | batch_size | options),
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=word_tokenizer(),
    )
    # Which its training loop would say.
    trainer.current_gradient_accumulation_steps = 1
    now = copy.deepcopy(policy.state_dict())
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        trainer.model.train()
        batch = trainer._generate_and_score_completions(texts)
        ids, mask = (
            torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], dim=1)
            for name in ("ids", "mask")
        )
        keep = batch["completion_mask"].shape[1]
        behaviour = trainer._get_per_token_logps_and_entropies(policy, ids, mask, keep)[0].to(torch.float32)
        policy.load_state_dict(now)
    old = behaviour.to(policy.dtype) * batch["completion_mask"]  # type: ignore[call-overload]
    batch |= {"old_logps": old.sum(dim=1)} if kind == "RLOO" else {"old_per_token_logps": old}
    batch["advantages"] = batch["advantages"].to(torch.float32)
    cuts = iter(behaviour.numpy())
    advantages = batch["advantages"].view(-1, samples).numpy()
    known = [
        {"advantages": of_row, "behaviour": tuple(next(cuts)[: len(r)] for r in row.responses)}
        for of_row, row in zip(advantages, rows, strict=True)
    ]
    return Peer(trainer, batch, [replace(row, values=v) for row, v in zip(rows, known, strict=True)])


def sample_rewards(prompts: int, samples: int) -> np.ndarray:
    """`[prompts, samples]`"""
    return np.random.default_rng(1).integers(0, 4, (prompts, samples)) / 2


def without_reference(
    trainer_class: Any,
    config_class: Any,
    options: dict[str, Any],
    policy: nn.Module,
    rows: Rows,
    folder: Path,
) -> Peer:
    from datasets import Dataset

    class Tokenised(trainer_class):  # type: ignore[misc]
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return {}

    text = {"prompt": "", "chosen": "", "rejected": ""}
    trainer = Tokenised(
        model=policy,
        args=config_class(max_length=1_000_000, remove_unused_columns=False, **options, **arguments(folder)),
        train_dataset=Dataset.from_list([text | labelled(row) for row in rows]),
        processing_class=word_tokenizer(),
    )
    return Peer(trainer, trainer.data_collator(list(trainer.train_dataset)), rows)


def as_judged(feature: dict[str, Any], row_id: str) -> Row:
    prompt, answer, other, nothing = (
        np.array(ids, dtype=np.int32)
        for ids in (feature["prompt_ids"], feature["completion_ids"], feature["KL_completion_ids"], [])
    )
    chosen, rejected = (answer, nothing) if feature["label"] else (nothing, answer)
    return Row(prompt, (chosen, rejected, other), id=row_id)


def id_columns(row: Row, *names: str) -> dict[str, list[int]]:
    """The columns of TRL's DPO and TPO trainers."""
    answers = {f"{name}_ids": ids.tolist() for name, ids in zip(names, row.responses, strict=True)}
    return {"prompt_ids": row.prompt_ids.tolist(), **answers}


def labelled(row: Row) -> dict[str, list[int]]:
    """The columns of TRL's CPO and ORPO trainers."""
    prompt = row.prompt_ids.tolist()
    columns = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side, response in (("chosen", row.responses[0].tolist()), ("rejected", row.responses[1].tolist())):
        columns[f"{side}_input_ids"] = prompt + response
        columns[f"{side}_attention_mask"] = [1] * (len(prompt) + len(response))
        columns[f"{side}_labels"] = [IGNORED] * len(prompt) + response
    return columns


def arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": PAIRS,
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def words(ids: np.ndarray) -> str:
    return " ".join(f"w{i}" for i in ids)


@functools.cache
def word_tokenizer() -> Any:
    """A word a token, so that text says exactly which ids it becomes."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>"]
    vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(3, WORDS))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


class WideHead:
    """Stands in for TRL's fused head, which computes in float32 whatever the model: plain and in the model's dtype."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *unused: Any
    ) -> tuple[Tensor, ...]:
        logits = nn.functional.linear(hidden, weight, bias)
        logps = logits.log_softmax(dim=-1)
        entropy = -(logps.exp() * logps).sum(dim=-1)
        chosen = logps.gather(1, labels[:, None])[:, 0]
        squared = (2 * logps).logsumexp(dim=-1)
        return chosen, entropy, squared, logits.mean(dim=-1), logits.argmax(dim=-1) == labels


@contextmanager
def wide() -> Iterator[None]:
    """Inside, TRL rounds nothing to float32."""
    from trl.trainer import utils

    with (
        patch.object(utils, "_ChunkedLogProbFunction", WideHead),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield
