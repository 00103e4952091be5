"""What relabelling, selection, clipping and thresholds do in the built-in world: the figures of docs/systems.md.

    python -m benchmarks.systems {relabel,select,clip} RUN... [--out CSV]

Each RUN is a run folder of the world, one a seed (`slimepo quickstart --seeds 3 --out runs/world`), of which the SFT
model, the world's tasks and the pairs of its samples are taken. Prints means over seeds with 95 % intervals.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slimepo import PreferenceConfig, PreferenceTrainer
from slimepo.data.render import encode_prompt
from slimepo.means import mean_of
from slimepo.model.chat import ChatModel, load_chat_model
from slimepo.model.generate import completion_text, generate
from slimepo.onpolicy.dual import solve_dual
from slimepo.pipeline.relabel import Answered, labelled
from slimepo.pipeline.tasks import Task, read_tasks
from slimepo.playground.tasks import judge
from slimepo.types import Preference

RESULTS = Path(__file__).parent / "results" / "systems.csv"
BETA, SAMPLES = 0.1, 32


def world(run: Path) -> tuple[ChatModel, list[Task], list[Task]]:
    """The SFT model of a run, its tasks for training and those held out."""
    tasks = (read_tasks(str(run / "world" / f"{name}.jsonl")) for name in ("tasks", "heldout"))
    train, heldout = tasks
    return load_chat_model(str(run / "sft")), train, heldout


def sampled(chat: ChatModel, tasks: Sequence[Task], samples: int, seed: int) -> list[list[str]]:
    """Texts that the model gives to each task at temperature 1, those that end."""
    found = generate(
        chat.model, [encode_prompt(chat.chat, task.prompt) for task in tasks], end_token_ids=chat.end_ids,
        max_new_tokens=64, temperature=1.0, samples=samples, seed=seed, batch_rows=256,
    )  # fmt: skip
    return [[completion_text(chat.tokenizer, c) for c in given if c.finished] for given in found]


def trained(run: Path, rows: Any, **settings: Any) -> tuple[ChatModel, PreferenceTrainer]:
    """The SFT model of a run after a stage on rows."""
    chat = load_chat_model(str(run / "sft"))
    with tempfile.TemporaryDirectory() as folder:
        args = PreferenceConfig(
            folder, per_device_train_batch_size=64, save_strategy="no", report_to="none", disable_tqdm=True,
            monitor=False, certificate=False, verify_model=False, max_length=256, logging_steps=1,
            train_sampling_strategy="group_by_length", **settings,
        )  # fmt: skip
        trainer = PreferenceTrainer(
            chat.model, args=args, train_dataset=rows, processing_class=chat.tokenizer
        )
        trainer.train()
    return replace(chat, model=trainer.model.eval()), trainer


def right(task: Task, text: str) -> float:
    """1 for the right answer."""
    return float(judge(task.row, text).correct)


def short(task: Task, text: str) -> float:
    """Minus the length in tens of characters."""
    return -len(text) / 10


def relabel(run: Path, seed: int) -> Iterator[dict[str, Any]]:
    """E[g] that the dual expects and that DPO on its labels gives, for five bounds on brevity; r is 1 for right."""
    chat, train, heldout = world(run)
    tasks = train[:400]
    texts = sampled(chat, tasks, SAMPLES, seed)
    kept = [(task, given) for task, given in zip(tasks, texts, strict=True) if len(given) > 1]
    answered = [Answered(task.id, task.prompt, given, [], {}) for task, given in kept]
    rewards = [np.array([right(task, text) for text in given]) for task, given in kept]
    costs = [np.array([[short(task, text) for text in given]]) for task, given in kept]
    before = float(np.mean([g.mean() for g in costs]))
    best = float(np.mean([g.max() for g in costs]))
    for share in (0.1, 0.25, 0.4, 0.55, 0.7):
        bound = before + share * (best - before)
        dual = solve_dual(rewards, costs, [bound], BETA)
        rows = labelled(answered, rewards, costs, dual, pairs=2)
        pairs = [Preference(r["prompt"], r["chosen"], r["rejected"], weight=r["weight"]) for r in rows]
        after, _ = trained(
            run,
            pairs,
            loss="dpo",
            loss_options={"beta": BETA},
            learning_rate=3e-4,
            num_train_epochs=2,
            seed=seed,
        )
        said = sampled(after, heldout[:300], 4, seed)
        g, r = (
            float(
                np.mean([f(t, text) for t, given in zip(heldout[:300], said, strict=True) for text in given])
            )
            for f in (short, right)
        )
        yield {
            "arm": f"{share:.0%} of the way", "reference": before, "bound": bound, "multiplier": dual.multipliers[0],
            "expected": dual.constraints[0], "measured": g, "expected_right": dual.reward, "right": r, "kl": dual.kl,
        }  # fmt: skip


DEMONSTRATIONS: dict[str, Callable[[Path, int], Iterator[dict[str, Any]]]] = {"relabel": relabel}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one demonstration over all seeds, write its CSV file and print means."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.systems", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("what", choices=list(DEMONSTRATIONS))
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help=f"the CSV file ({RESULTS.parent.name}/systems-WHAT.csv)")
    args = parser.parse_args(arguments)
    out = args.out or RESULTS.with_name(f"systems-{args.what}.csv")
    rows: list[dict[str, Any]] = []
    for seed, run in enumerate(args.runs):
        for row in DEMONSTRATIONS[args.what](run, seed):
            rows.append({"seed": seed, **row})
            print(rows[-1], flush=True)
            with out.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    figures = [key for key in rows[0] if key not in ("seed", "arm")]
    print(f"| | {' | '.join(figures)} |\n|---|{'---:|' * len(figures)}")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        told = [mean_of([row[key] for row in rows if row["arm"] == arm]) for key in figures]
        cells = [f"{m.value:.3f}" + (f" ± {m.half:.3f}" if m.n > 1 else "") for m in told]
        print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
