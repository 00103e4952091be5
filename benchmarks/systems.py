"""What relabelling and selection do in the built-in world: the figures of docs/systems.md.

    python -m benchmarks.systems {relabel,select} RUN... [--out CSV]

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
from slimepo.data.rows import PAIR
from slimepo.data.tokenize import tokenize
from slimepo.means import mean_of
from slimepo.model.chat import ChatModel, load_chat_model
from slimepo.model.generate import completion_text, generate
from slimepo.model.score import score_pairs
from slimepo.onpolicy.dual import solve_dual
from slimepo.pipeline.pairs.make import read_pairs
from slimepo.pipeline.pairs.relabel import Answered, labelled
from slimepo.pipeline.tasks import Task, read_tasks
from slimepo.plan.select import select, signal_to_curvature
from slimepo.playground.tasks import judge
from slimepo.types import Preference

RESULTS = Path(__file__).parent / "results"
BETA = 0.1


def world(run: Path) -> tuple[ChatModel, list[Task], list[Task]]:
    """The SFT model of a run, its tasks for training and those held out."""
    train, heldout = (read_tasks(str(run / "world" / f"{name}.jsonl")) for name in ("tasks", "heldout"))
    return load_chat_model(str(run / "sft")), train, heldout


def sampled(chat: ChatModel, tasks: Sequence[Task], samples: int, seed: int) -> list[list[str]]:
    """Texts that the model gives to each task at temperature 1, those that end."""
    found = generate(
        chat.model, [encode_prompt(chat.chat, task.prompt) for task in tasks], end_token_ids=chat.end_ids,
        max_new_tokens=64, temperature=1.0, samples=samples, seed=seed, batch_rows=256,
    )  # fmt: skip
    return [[completion_text(chat.tokenizer, c) for c in given if c.finished] for given in found]


def greedy(chat: ChatModel, tasks: Sequence[Task]) -> float:
    """The share of tasks whose likeliest answer is right."""
    found = generate(
        chat.model, [encode_prompt(chat.chat, task.prompt) for task in tasks], end_token_ids=chat.end_ids,
        max_new_tokens=64, temperature=0.0, batch_rows=256,
    )  # fmt: skip
    return float(
        np.mean([right(t, completion_text(chat.tokenizer, c[0])) for t, c in zip(tasks, found, strict=True)])
    )


def trained(run: Path, rows: Any, start: ChatModel | None = None, **settings: Any) -> ChatModel:
    """The SFT model of a run, or another one of it, after a stage on rows."""
    chat = load_chat_model(str(run / "sft"))
    if start is not None:
        chat.model.load_state_dict(start.model.state_dict())
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
    return replace(chat, model=trainer.model.eval())


def right(task: Task, text: str) -> float:
    """1 for the right answer."""
    return float(judge(task.row, text).correct)


def short(task: Task, text: str) -> float:
    """Minus the length in tens of characters."""
    return -len(text) / 10


def measured(chat: ChatModel, tasks: Sequence[Task], seed: int) -> dict[str, float]:
    """Means over four samples of each task: of brevity, and of right answers."""
    said = [
        (t, text) for t, given in zip(tasks, sampled(chat, tasks, 4, seed), strict=True) for text in given
    ]
    return {f.__name__: float(np.mean([f(task, text) for task, text in said])) for f in (short, right)}


def relabel(run: Path, seed: int) -> Iterator[dict[str, Any]]:
    """E[g] that the dual expects and that DPO on its labels gives, for five bounds on brevity; r is 1 for right."""
    chat, train, heldout = world(run)
    tasks, heldout = train[:200], heldout[:200]
    texts = sampled(chat, tasks, 16, seed)
    kept = [(task, given) for task, given in zip(tasks, texts, strict=True) if len(given) > 1]
    answered = [Answered(task.id, task.prompt, given, [], {}) for task, given in kept]
    rewards = [np.array([right(task, text) for text in given]) for task, given in kept]
    costs = [np.array([[short(task, text) for text in given]]) for task, given in kept]
    before, best = (float(np.mean([of(g) for g in costs])) for of in (np.mean, np.max))
    start = measured(chat, heldout, seed)
    for share in (0.1, 0.25, 0.4, 0.55, 0.7):
        dual = solve_dual(rewards, costs, [before + share * (best - before)], BETA)
        rows = labelled(answered, rewards, costs, dual, pairs=4)
        pairs = [Preference(r["prompt"], r["chosen"], r["rejected"], weight=r["weight"]) for r in rows]
        after = trained(run, pairs, loss="dpo", loss_options={"beta": BETA}, learning_rate=3e-4, seed=seed)
        yield {
            "arm": f"{share:.0%} of the way", "bound": before + share * (best - before),
            "multiplier": float(dual.multipliers[0]), "expected": float(dual.constraints[0]),
            **measured(after, heldout, seed), "expected_right": dual.reward,
            **{f"{name}_before": value for name, value in start.items()},
        }  # fmt: skip


def select_half(run: Path, seed: int) -> Iterator[dict[str, Any]]:
    """A second round of DPO on half of the pairs, random or selected; with sound labels, and a fifth of them turned.

    The first round, on 800 other pairs, makes the model that z is measured with; all arms start from it.
    """
    chat, _, heldout = world(run)
    pairs, heldout = read_pairs(run / "samples" / "train.jsonl")[:1600], heldout[:400]
    dpo: dict[str, Any] = dict(
        loss="dpo", loss_options={"beta": BETA}, learning_rate=2e-4, num_train_epochs=2, seed=seed
    )
    first = trained(run, pairs[:800], **dpo)
    for flipped in (0.0, 0.2):
        random = np.random.default_rng(seed)
        turned = random.random(800) < flipped
        rows = [
            replace(row, chosen=row.rejected, rejected=row.chosen) if turn else row
            for row, turn in zip(pairs[800:], turned.tolist(), strict=True)
        ]
        tokens = tokenize(rows, chat.chat).rows
        margins = []
        for model in (first, chat):
            scores = score_pairs(model.model, tokens, 64)
            lengths = np.array([[len(row.response(i)) for i in PAIR] for row in tokens])
            margins.append(scores.chosen * lengths[:, 0] - scores.rejected * lengths[:, 1])
        value = signal_to_curvature(BETA * (margins[0] - margins[1]))
        index = list(range(len(rows)))
        halves = {
            "random": sorted(random.permutation(len(rows))[: len(rows) // 2].tolist()),
            "1 pool": select(index, value, 0.5, 1),
            "4 pools": select(index, value, 0.5, 4),
        }
        for name, half in halves.items():
            after = trained(run, [rows[i] for i in half], start=first, **dpo)
            found = greedy(after, heldout)
            arm = f"{name}, {flipped:.0%} of labels turned"
            yield {"arm": arm, "right": found, "turned_share": float(turned[half].mean())}


DEMONSTRATIONS: dict[str, Callable[[Path, int], Iterator[dict[str, Any]]]] = {
    "relabel": relabel,
    "select": select_half,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one demonstration over all seeds, write its CSV file and print means."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.systems", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("what", choices=list(DEMONSTRATIONS))
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="the CSV file (benchmarks/results/systems-WHAT.csv)")
    args = parser.parse_args(arguments)
    out = args.out or RESULTS / f"systems-{args.what}.csv"
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
