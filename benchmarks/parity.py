"""Loss and gradient of slimepo's objectives beside TRL's trainers: same model, same token ids, same batch.

    python -m benchmarks.parity

Prints a table and writes it into docs/objectives.md. On both sides the trainer itself runs: TRL's collator and
`compute_loss`, slimepo's collator (in the layout that it takes by itself), `compute_loss` and, for the gradient,
`training_step` in micro-batches of another size. The policy is not the reference, so that no log-ratio is 0.

A step is one micro-batch on our side too where an objective ranks the pairs of a micro-batch, as TRL's does.

float32 is TRL as it is. For float64 what TRL rounds to float32 by itself is kept wide: the head of its DPO, KTO,
GRPO and RLOO trainers, and the log-probs in its ORPO loss. Nothing else of TRL is replaced.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.parity_trl import (
    LONGEST,
    PAIRS,
    WORDS,
    Peer,
    Rows,
    trl_cpo,
    trl_dpo,
    trl_kto,
    trl_orpo,
    trl_samples,
    trl_tpo,
    wide,
    word_tokenizer,
    words,
)
from slimepo.data.rows import Row
from slimepo.losses import find_objective
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer

DOCS = Path(__file__).resolve().parents[1] / "docs" / "objectives.md"
BEGIN, END = "<!-- parity: written by python -m benchmarks.parity -->", "<!-- end of parity -->"

MICRO_BATCH = 3
# One more function of the same log-probs, which float32 has been shown on.
WIDE = ("float64",)


class Case(NamedTuple):
    """An objective with options, and TRL's trainer for it; `prompts` are the least and most tokens of a prompt.

    `responses`: how many each prompt has. `dtypes`: in which both sides compute.
    """

    objective: str
    against: str
    peer: Callable[[nn.Module, nn.Module, Rows, Path], Peer]
    options: Mapping[str, Any] = {}
    prompts: tuple[int, int] = (2, 8)
    responses: int = 2
    dtypes: tuple[str, ...] = ("float64", "float32")


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
            peer = case.peer(
                copy.deepcopy(policy), reference, random_rows(case.prompts, case.responses), Path(folder)
            )
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
    objective = find_objective(case.objective, case.options)
    known: dict[str, Any] = {"train_dataset": list(rows)}
    options: dict[str, Any] = {"reference": "copy"} if "reference" in objective.asks else {}
    if objective.positions is None:
        options["rollouts"] = {"samples": case.responses, "max_new_tokens": 16}
        known = {
            "train_dataset": [{"prompt": words(row.prompt_ids)} for row in rows],
            "processing_class": word_tokenizer(),
            "reward": lambda prompt, completions, row: [0.0] * len(completions),
        }
    trainer = PreferenceTrainer(
        model=copy.deepcopy(reference),
        args=PreferenceConfig(
            output_dir=str(folder),
            loss=case.objective,
            loss_options=dict(case.options),
            per_device_train_batch_size=len(rows) if case.objective.startswith("aot") else MICRO_BATCH,
            pairs_per_step=len(rows),
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            report_to="none",
            **options,
        ),
        **known,
    )
    model: Any = trainer.model
    model.load_state_dict(policy.state_dict())
    given = trainer.train_dataset
    sampled = trainer.rollouts
    if sampled is not None:
        # What has been sampled already.
        given = list(rows)
        sampled.rows = lambda step, last_step: given  # type: ignore[method-assign]
    loss = trainer.compute_loss(
        model, replace(trainer.data_collator, micro_batch_size=len(rows))(given)
    ).item()
    model.zero_grad()
    trainer.training_step(model, trainer.data_collator(given))
    return loss, gradient(model)


def on_samples(
    objective: str, kind: str, theirs: dict[str, Any], options: Mapping[str, Any] | None = None
) -> Case:
    """A case of four samples a prompt; what TRL is told names it."""
    told = [value if key == "loss_type" else f"{key} {value}" for key, value in theirs.items()]
    peer = functools.partial(trl_samples, kind, theirs)
    # TRL pads prompts on the left without saying where they begin, which absolute positions would notice.
    return Case(
        objective, ", ".join([f"{kind}Trainer", *told]), peer, options or {}, prompts=(5, 5), responses=4
    )


def on_pairs(
    objective: str,
    theirs: dict[str, Any],
    options: Mapping[str, Any] | None = None,
    dtypes: tuple[str, ...] = ("float64", "float32"),
) -> Case:
    """A case of TRL's DPOTrainer; what that is told names it."""
    told = [str(value) if key == "loss_type" else f"{key} {value}" for key, value in theirs.items()]
    against = ", ".join(["DPOTrainer", *told])
    return Case(objective, against, functools.partial(trl_dpo, theirs), options or {}, dtypes=dtypes)


CASES = (
    on_pairs("dpo", {"loss_type": "sigmoid"}),
    on_pairs("ipo", {"loss_type": "ipo"}),
    *(
        on_pairs(name, {"loss_type": name}, dtypes=WIDE)
        for name in (
            "sigmoid_norm",
            "hinge",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "apo_zero",
            "apo_down",
            "discopop",
        )
    ),
    *(
        on_pairs(name, {"loss_type": name, "label_smoothing": 0.125}, {"label_smoothing": 0.125}, dtypes)
        # TRL takes the logarithms of exo_pair's share in float32, whatever the model.
        for name, dtypes in (
            ("robust", WIDE),
            ("exo_pair", ("float32",)),
            ("aot", WIDE),
            ("aot_unpaired", WIDE),
        )
    ),
    on_pairs("dpo", {"loss_type": "sigmoid", "ld_alpha": 0.5}, {"ld_alpha": 0.5}, WIDE),
    on_pairs(
        "dpo",
        {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
        {"f_divergence": "forward_kl"},
        WIDE,
    ),
    on_pairs(
        "hinge",
        {"loss_type": "hinge", "f_divergence_type": "js_divergence"},
        {"f_divergence": "js_divergence"},
        WIDE,
    ),
    on_pairs(
        "ipo",
        {"loss_type": "ipo", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        {"f_divergence": "alpha_divergence", "f_alpha": 0.7},
        ("float32",),
    ),
    on_pairs("wpo(dpo)", {"loss_type": "sigmoid", "use_weighting": True}),
    on_pairs("wpo(ipo)", {"loss_type": "ipo", "use_weighting": True}, dtypes=WIDE),
    on_pairs(
        "0.8*dpo+0.2*bco_pair+1.0*sft",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"sft": {"average": "token"}},
        WIDE,
    ),
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
    Case(
        "alpha_po",
        "CPOTrainer, alphapo, alpha 0.25",
        functools.partial(trl_cpo, {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.0, "simpo_gamma": 0.5}),
        dtypes=WIDE,
    ),
    Case("cpo", "CPOTrainer", functools.partial(trl_cpo, {})),
    Case("slic", "CPOTrainer, hinge", functools.partial(trl_cpo, {"loss_type": "hinge"}), dtypes=WIDE),
    Case("tpo", "TPOTrainer", functools.partial(trl_tpo, {}), responses=3, dtypes=WIDE),
    Case(
        "tpo/l",
        "TPOTrainer, tpo-l, tpo_l_gamma 0.5",
        functools.partial(trl_tpo, {"loss_type": "tpo-l", "beta": 0.1}),
        {"beta": 0.1},
        responses=3,
        dtypes=WIDE,
    ),
    # TRL counts the prompt's tokens in ORPO's likelihood; a prompt of one token has none that is predicted.
    Case("orpo", "ORPOTrainer", trl_orpo, prompts=(1, 1)),
    Case("kto", "KTOTrainer, undesirable_weight 1.3", trl_kto, {"undesirable_weight": 1.3}),
    on_samples("grpo", "GRPO", {"loss_type": "grpo"}),
    on_samples(
        "grpo",
        "GRPO",
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
        {"kl": 0.04},
    ),
    on_samples("grpo", "GRPO", {"loss_type": "grpo", "beta": 0.04}, {"kl": 0.04, "kl_times_ratio": True}),
    on_samples("grpo/dapo", "GRPO", {"loss_type": "dapo", "epsilon_high": 0.28}),
    on_samples("grpo/dr", "GRPO", {"loss_type": "dr_grpo"}, {"length": LONGEST}),
    on_samples(
        "grpo/gspo",
        "GRPO",
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    on_samples("rloo", "RLOO", {"beta": 0.05}),
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


def random_rows(prompts: tuple[int, int], responses: int = 2) -> list[Row]:
    """Prompts and responses of unequal lengths."""
    random = np.random.default_rng(0)

    def ids(low: int, high: int) -> np.ndarray:
        return random.integers(3, WORDS, random.integers(low, high + 1)).astype(np.int32)

    return [
        Row(ids(*prompts), tuple(ids(1, LONGEST) for _ in range(responses)), id=f"row {i}")
        for i in range(PAIRS)
    ]


def gradient(model: nn.Module) -> Tensor:
    """The gradient of all parameters as one vector, in float64."""
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([part.flatten().double() for part in parts])


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
    results = [compare(case, getattr(torch, dtype)) for case in CASES for dtype in case.dtypes]
    show(results)
    write(page, markdown(results))
    return results


if __name__ == "__main__":
    main()
