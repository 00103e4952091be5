"""Loss and gradient of slimepo's objectives beside TRL's trainers: same model, same token ids, same batch.

    python -m benchmarks.parity

Prints a table and writes it into docs/objectives.md. On both sides the trainer itself runs: TRL's collator and
`compute_loss`, slimepo's collator (in the layout that it takes by itself), `compute_loss` and, for the gradient,
`training_step` in micro-batches of another size. The policy is not the reference, so that no log-ratio is 0.

float32 is TRL as it is. For float64 what TRL rounds to float32 by itself is kept wide: the head of its DPO and KTO
trainers, and the log-probs in its ORPO loss. Nothing else of TRL is replaced.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peers import IGNORED
from slimepo.data.rows import Row
from slimepo.losses import find_objective
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer

DOCS = Path(__file__).resolve().parents[1] / "docs" / "objectives.md"
BEGIN, END = "<!-- parity: written by python -m benchmarks.parity -->", "<!-- end of parity -->"

WORDS = 61
PAIRS = 8
MICRO_BATCH = 3

Rows = Sequence[Row]


class Peer(NamedTuple):
    """TRL's trainer of an objective, the batch it collated, and the rows in it as slimepo reads them."""

    trainer: Any
    batch: dict[str, Any]
    rows: Rows


class Case(NamedTuple):
    """An objective with options, and TRL's trainer for it; `prompts` are the least and most tokens of a prompt."""

    objective: str
    against: str
    peer: Callable[[nn.Module, nn.Module, Rows, Path], Peer]
    options: Mapping[str, Any] = {}
    prompts: tuple[int, int] = (2, 8)


class Comparison(NamedTuple):
    """What came out on both sides; errors are relative, the gradient's in the Euclidean norm of all parameters."""

    objective: str
    against: str
    dtype: str
    ours: float
    theirs: float
    loss_error: float
    gradient_error: float


def compare(case: Case, dtype: torch.dtype) -> Comparison:
    """Both trainers on the same rows, from copies of the same weights."""
    reference, policy = models(dtype)
    with tempfile.TemporaryDirectory() as folder:
        with wide() if dtype == torch.float64 else nullcontext():
            peer = case.peer(copy.deepcopy(policy), reference, random_pairs(case.prompts), Path(folder))
            loss = peer.trainer.compute_loss(peer.trainer.model, peer.batch)
            loss.backward()
        theirs, their_gradient = loss.item(), gradient(peer.trainer.model)
        ours, our_gradient = slimepo_step(case, policy, reference, peer.rows, Path(folder))
    return Comparison(
        case.objective,
        case.against,
        str(dtype).removeprefix("torch."),
        ours,
        theirs,
        abs(ours - theirs) / abs(theirs),
        ((our_gradient - their_gradient).norm() / their_gradient.norm()).item(),
    )


def slimepo_step(
    case: Case, policy: nn.Module, reference: nn.Module, rows: Rows, folder: Path
) -> tuple[float, Tensor]:
    """Loss of all rows in one batch, and the gradient of a training step in micro-batches."""
    source = {"reference": "copy"} if "reference" in find_objective(case.objective).asks else {}
    trainer = PreferenceTrainer(
        model=copy.deepcopy(reference),
        args=PreferenceConfig(
            output_dir=str(folder),
            loss=case.objective,
            loss_options=dict(case.options),
            per_device_train_batch_size=MICRO_BATCH,
            pairs_per_step=len(rows),
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            report_to="none",
            **source,
        ),
        train_dataset=list(rows),
    )
    model: Any = trainer.model
    model.load_state_dict(policy.state_dict())
    loss = trainer.compute_loss(
        model, replace(trainer.data_collator, micro_batch_size=len(rows))(trainer.train_dataset)
    ).item()
    model.zero_grad()
    trainer.training_step(model, trainer.data_collator(trainer.train_dataset))
    return loss, gradient(model)


def trl_dpo(loss_type: str, policy: nn.Module, reference: nn.Module, rows: Rows, folder: Path) -> Peer:
    """TRL's DPOTrainer with a reference model beside the policy."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    columns = [
        {
            "prompt_ids": row.prompt_ids.tolist(),
            "chosen_ids": row.responses[0].tolist(),
            "rejected_ids": row.responses[1].tolist(),
        }
        for row in rows
    ]
    trainer = Tokenised(
        model=policy,
        ref_model=copy.deepcopy(reference),
        args=DPOConfig(loss_type=[loss_type], max_length=None, **arguments(folder)),
        train_dataset=Dataset.from_list(columns),
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


CASES = (
    Case("dpo", "DPOTrainer, sigmoid", functools.partial(trl_dpo, "sigmoid")),
    Case("ipo", "DPOTrainer, ipo", functools.partial(trl_dpo, "ipo")),
    Case(
        "simpo",
        "CPOTrainer, simpo, cpo_alpha 0",
        functools.partial(trl_cpo, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5}),
    ),
    Case(
        "simpo",
        "CPOTrainer, simpo, cpo_alpha 1",
        functools.partial(trl_cpo, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}),
        {"nll_weight": 1.0},
    ),
    Case("cpo", "CPOTrainer", functools.partial(trl_cpo, {})),
    # TRL counts the prompt's tokens in ORPO's likelihood; a prompt of one token has none that is predicted.
    Case("orpo", "ORPOTrainer", trl_orpo, prompts=(1, 1)),
    Case("kto", "KTOTrainer, undesirable_weight 1.3", trl_kto, {"undesirable_weight": 1.3}),
)


def models(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A tiny reference with random weights and a policy that has moved away from it."""
    # GPT-2 has no norm that rounds to float32 by itself, as Llama's does.
    config = AutoConfig.for_model(
        "gpt2", vocab_size=WORDS, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, tie_word_embeddings=False, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    reference: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        policy = copy.deepcopy(reference)
        for parameter in policy.parameters():
            # Flatter than the reference, so that KTO's divergence is positive and not clamped to 0.
            parameter.mul_(0.8).add_(0.03 * torch.randn_like(parameter))
    return reference.to(dtype), policy.to(dtype)


def random_pairs(prompts: tuple[int, int]) -> list[Row]:
    """Pairs of unequal lengths."""
    random = np.random.default_rng(0)

    def ids(low: int, high: int) -> np.ndarray:
        return random.integers(3, WORDS, random.integers(low, high + 1)).astype(np.int32)

    return [Row(ids(*prompts), (ids(1, 12), ids(1, 12)), id=f"row {i}") for i in range(PAIRS)]


def as_judged(feature: dict[str, Any], row_id: str) -> Row:
    prompt, answer, other, nothing = (
        np.array(ids, dtype=np.int32)
        for ids in (feature["prompt_ids"], feature["completion_ids"], feature["KL_completion_ids"], [])
    )
    chosen, rejected = (answer, nothing) if feature["label"] else (nothing, answer)
    return Row(prompt, (chosen, rejected, other), id=row_id)


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


def gradient(model: nn.Module) -> Tensor:
    """The gradient of all parameters as one vector, in float64."""
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([part.flatten().double() for part in parts])


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
        return chosen, entropy, torch.zeros_like(chosen), logits.mean(dim=-1), logits.argmax(dim=-1) == labels


@contextmanager
def wide() -> Iterator[None]:
    """Inside, TRL rounds nothing to float32."""
    from trl.trainer import utils

    with (
        patch.object(utils, "_ChunkedLogProbFunction", WideHead),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def markdown(results: Sequence[Comparison]) -> str:
    """The table with what it was measured with."""
    lines = [
        "| objective | against (TRL) | dtype | loss ours | loss theirs | error of loss | error of gradient |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| `{r.objective}` | {r.against} | {r.dtype} | {digits(r.ours, r.dtype)} | {digits(r.theirs, r.dtype)} "
            f"| {r.loss_error:.0e} | {r.gradient_error:.0e} |"
            for r in results
        ),
        "",
        ", ".join(f"{name} {version(name)}" for name in ("trl", "torch", "transformers")) + ".",
    ]
    return "\n".join(lines)


def digits(value: float, dtype: str) -> str:
    return f"{value:.12f}" if dtype == "float64" else f"{value:.7f}"


def write(page: Path, table: str) -> None:
    """Put the table between the two markers of a page."""
    before, found, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"{page} lacks the markers {BEGIN!r} and {END!r}")
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def show(results: Sequence[Comparison]) -> None:
    table = Table(*Comparison._fields)
    for r in results:
        numbers = (digits(r.ours, r.dtype), digits(r.theirs, r.dtype))
        table.add_row(
            r.objective, r.against, r.dtype, *numbers, f"{r.loss_error:.1e}", f"{r.gradient_error:.1e}"
        )
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> list[Comparison]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=DOCS, help="the page that holds the table")
    page = parser.parse_args(argv).page
    disable_progress_bars()
    results = [compare(case, dtype) for case in CASES for dtype in (torch.float64, torch.float32)]
    show(results)
    write(page, markdown(results))
    return results


if __name__ == "__main__":
    main()
