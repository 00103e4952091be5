"""The quickstart: the built-in world from nothing to a table and a page, in minutes on a laptop."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from slimepo.data.chat import ChatFormat, chat_format, encode_prompt
from slimepo.data.rows import Row
from slimepo.data.split import fingerprint
from slimepo.data.tokenize import tokenize
from slimepo.errors import NonFiniteLossError
from slimepo.files import replace_folder, write_json
from slimepo.losses import find_objective, hyperparameters, slime
from slimepo.model.generate import Completion, generate
from slimepo.model.load import random_config, random_model
from slimepo.model.score import PairScores, chosen_fell, distributions, histogram, score_pairs, summary
from slimepo.monitor.callback import DisplacementMonitor
from slimepo.monitor.settings import MonitorSettings
from slimepo.playground.families import Task
from slimepo.playground.measure import measure
from slimepo.playground.pairs import PairStats, pair_source, pairs_from_samples
from slimepo.playground.settings import ObjectiveRuns, QuickstartRecipe
from slimepo.playground.tasks import check
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.playground.world import demonstrations, make_tasks, user_turn
from slimepo.settings import validate
from slimepo.training.callbacks import TrainingProgress
from slimepo.training.config import PreferenceConfig
from slimepo.training.trainer import PreferenceTrainer
from slimepo.types import Preference
from slimepo.versions import versions

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_SAMPLES = 24
_ALWAYS: dict[str, Any] = {
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 20,
}


@dataclass(frozen=True)
class Playground:
    """The world of a recipe: tasks by use, and how text becomes tokens."""

    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    demonstrated: list[Task]
    compared: list[Task]
    heldout: list[Task]


@dataclass(frozen=True)
class Answers:
    """Greedy answers to the held-out tasks; `texts` are without the end token, `lengths` are tokens with it."""

    texts: list[str]
    finished: list[bool]
    lengths: list[int]


@dataclass(frozen=True)
class Start:
    """What every objective starts from: the SFT model, the pairs, and where it stands on the held-out ones."""

    model: PreTrainedModel
    train: list[Row]
    heldout: list[Row]
    answers: Answers
    scores: PairScores


def run_quickstart(
    recipe: QuickstartRecipe, out: Path, console: Console, *, cache: Path | None
) -> dict[str, Any]:
    """SFT from scratch (or from `cache`), pairs from its own samples, then every objective from that model.

    Writes `quickstart.json`, `table.md` and `page.html` to `out` and returns what is in the first.
    """
    from slimepo.report.page import write_report

    seconds: dict[str, float] = {}
    world = build_world(recipe)
    started = time.perf_counter()
    model, cached = sft_model(recipe, world, console, cache)
    seconds["sft"] = time.perf_counter() - started
    started = time.perf_counter()
    with console.status("sampling answers of the SFT model"):
        train, pair_stats = sampled_pairs(recipe, world, model, world.compared)
        heldout, _ = sampled_pairs(recipe, world, model, world.heldout)
    seconds["samples"] = time.perf_counter() - started
    rows = tokenize(heldout, world.chat).rows
    standing = (greedy_answers(recipe, world, model), score_pairs(model, rows, batch_size=64))
    start = Start(model, tokenize(train, world.chat).rows, rows, *standing)
    before = _figures(world, start.answers, start.scores)
    runs, answers = [], {"sft": start.answers}
    for objective in recipe.objectives:
        for rate in objective.learning_rates or recipe.preference.learning_rates:
            run, given = one_run(recipe, world, start, objective, rate, console)
            runs.append(run | {"before": before})
            if given is not None:
                answers[run["name"]] = given
    result = {
        "title": "slimepo quickstart",
        "seed": recipe.seed,
        "versions": versions(),
        "recipe": recipe.model_dump(),
        "seconds": seconds,
        "sft": {"cached": cached, "seconds": seconds["sft"], "metrics": before},
        "pairs": _pair_facts(pair_stats, start),
        "heldout_prompts": len(world.heldout),
        "runs": runs,
        "samples": _samples(world, answers),
    }
    write_json(out / "quickstart.json", result)
    write_report([out], out / "page.html", out / "table.md")
    return result


def run_seeds(
    recipe: QuickstartRecipe, seeds: int, out: Path, console: Console, *, cache: Path | None
) -> list[Path]:
    """The quickstart with `seeds` seeds, from the recipe's on, each in a folder of its own; these are returned.

    `page.html` and `table.md` in `out` are of all of them: another seed is another world, SFT model and set of pairs.
    """
    from slimepo.report.page import write_report

    if seeds == 1:
        run_quickstart(recipe, out, console, cache=cache)
        return [out]
    folders = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        console.print(f"seed {seed}", style="bold")
        folders.append(out / f"seed-{seed}")
        run_quickstart(recipe.model_copy(update={"seed": seed}), folders[-1], console, cache=cache)
    write_report(folders, out / "page.html", out / "table.md")
    return folders


def build_world(recipe: QuickstartRecipe) -> Playground:
    """Tasks of the recipe's seed; no held-out problem is among those trained on, whatever its wording."""
    tokenizer = build_tokenizer()
    heldout = make_tasks(recipe.world.heldout_prompts, recipe.seed + 1_000_003)
    total = recipe.world.demonstrations + recipe.world.preference_prompts
    tasks = make_tasks(total, recipe.seed, exclude={task.key for task in heldout})
    demonstrated = tasks[: recipe.world.demonstrations]
    return Playground(tokenizer, chat_format(tokenizer), demonstrated, tasks[len(demonstrated) :], heldout)


def sft_model(
    recipe: QuickstartRecipe, world: Playground, console: Console, cache: Path | None
) -> tuple[PreTrainedModel, bool]:
    """The model after supervised training on noisy demonstrations, and whether it came from the cache."""
    shares = {
        "right": recipe.world.right,
        "slip_share": recipe.world.slip,
        "malformed_share": recipe.world.malformed,
    }
    rows = demonstrations(world.demonstrated, recipe.seed, **shares)
    folder = cache / sft_key(recipe, rows) if cache else None
    if folder is not None and (folder / "config.json").exists():
        console.print(f"SFT model: from the cache ({folder})")
        return AutoModelForCausalLM.from_pretrained(folder), True
    config = random_config(recipe.model.architecture, recipe.model.sizes, world.tokenizer)
    model = random_model(config, recipe.seed)
    sft = recipe.sft
    args = PreferenceConfig(
        loss="sft", loss_options=sft.loss_options, learning_rate=sft.learning_rate, max_steps=sft.steps,
        per_device_train_batch_size=sft.batch_size, seed=recipe.seed, **(_ALWAYS | {"logging_steps": 250} | sft.args),
    )  # fmt: skip
    _train(model, world, tokenize(rows, world.chat, pairs=False).rows, "SFT", args, console)
    if folder is not None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        model.save_pretrained(temporary)
        world.tokenizer.save_pretrained(temporary)
        replace_folder(temporary, folder)
    return model, False


def sft_key(recipe: QuickstartRecipe, rows: Sequence[Preference]) -> str:
    """What the SFT model is a function of: its part of the recipe, the rows, the libraries' versions."""
    parts = [recipe.seed, recipe.model.model_dump(), recipe.sft.model_dump(), fingerprint(rows), versions()]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def sampled_pairs(
    recipe: QuickstartRecipe, world: Playground, model: PreTrainedModel, tasks: Sequence[Task]
) -> tuple[list[Preference], PairStats]:
    """Pairs from the model's own samples; unfinished ones are left out."""
    samples = recipe.samples
    completions = generate(
        model,
        [encode_prompt(world.chat, user_turn(task)) for task in tasks],
        end_token_ids={world.chat.end_id},
        max_new_tokens=samples.max_new_tokens,
        temperature=samples.temperature,
        samples=samples.per_prompt,
        seed=recipe.seed,
    )
    texts = [[_text(world, c) for c in of_task if c.finished] for of_task in completions]
    return pairs_from_samples(tasks, texts)


def one_run(
    recipe: QuickstartRecipe,
    world: Playground,
    start: Start,
    objective: ObjectiveRuns,
    learning_rate: float,
    console: Console,
) -> tuple[dict[str, Any], Answers | None]:
    """Train one objective at one learning rate from the SFT model; the record, and its greedy answers.

    A run whose loss stops being finite is a result too: its record holds the message.
    """
    model = copy.deepcopy(start.model)
    name = f"{objective.name} {_short(learning_rate)}"
    settings = recipe.preference
    # A pair is two judged answers, so that every objective takes the same number of steps.
    rows_of_pair = 2 if find_objective(objective.loss).judged else 1
    args = PreferenceConfig(
        loss=objective.loss, loss_options=objective.loss_options, learning_rate=learning_rate, seed=recipe.seed,
        num_train_epochs=settings.epochs, per_device_train_batch_size=rows_of_pair * settings.batch_size, **_ALWAYS,
    )  # fmt: skip
    run: dict[str, Any] = {
        "name": name,
        "objective": objective.name,
        "learning_rate": learning_rate,
        "options": {"loss": objective.loss, **objective.loss_options},
        "error": None,
    }
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        monitor = _monitor(world, start, Path(folder))
        try:
            history = _train(model, world, start.train, name, args, console, monitor)
        except NonFiniteLossError as error:
            console.print(f"{name}: {error}", style="red")
            seconds = time.perf_counter() - started
            return run | {"error": str(error), "seconds": seconds, "monitor": monitor.record.lines}, None
        run["seconds"] = time.perf_counter() - started
        answers = greedy_answers(recipe, world, model)
        scores = score_pairs(model, start.heldout, batch_size=64)
        monitor.conclude(start.scores, scores)
    run["curve"] = [line for line in history if "loss" in line]
    run["monitor"] = monitor.record.lines
    run["steps"] = run["curve"][-1]["step"]
    run["after"] = _figures(world, answers, scores)
    run["chosen_fell"] = chosen_fell(start.scores, scores)
    lengths = histogram(start.answers.lengths, answers.lengths)
    run["distributions"] = distributions(start.scores, scores) | {"answer_lengths": lengths}
    return run, answers


def greedy_answers(recipe: QuickstartRecipe, world: Playground, model: PreTrainedModel) -> Answers:
    """The likeliest answer to every held-out task."""
    completions = generate(
        model,
        [encode_prompt(world.chat, user_turn(task)) for task in world.heldout],
        end_token_ids={world.chat.end_id},
        max_new_tokens=recipe.samples.max_new_tokens,
    )
    ended, lengths = [c.finished for (c,) in completions], [len(c.token_ids) for (c,) in completions]
    return Answers([_text(world, c) for (c,) in completions], ended, lengths)


def _monitor(world: Playground, start: Start, folder: Path) -> DisplacementMonitor:
    """A monitor with the world's held-out pairs and its checker of answers."""
    tasks = {pair_source(task): task for task in world.heldout}

    def valid(row_id: str, text: str) -> bool:
        return check(tasks[row_id], text).valid

    return DisplacementMonitor(
        validate(MonitorSettings, {}, "monitor"), folder, heldout=start.heldout, valid=valid
    )


def _train(
    model: PreTrainedModel,
    world: Playground,
    rows: list[Row],
    title: str,
    args: PreferenceConfig,
    console: Console,
    monitor: DisplacementMonitor | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place and return the log lines; nothing is left on disk."""
    set_seed(args.seed)
    progress = TrainingProgress(console, title)
    if monitor is not None:
        monitor.record.say = progress.warn
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        try:
            trainer = PreferenceTrainer(
                model=model, args=args, train_dataset=rows, processing_class=world.tokenizer,
                callbacks=[progress, *([monitor] if monitor else [])],
            )  # fmt: skip
            trainer.train()
        finally:
            progress.close()
    return list(trainer.state.log_history)


def _figures(world: Playground, answers: Answers, scores: PairScores) -> dict[str, float]:
    floor = hyperparameters(slime)["threshold"]
    return measure(world.heldout, answers.texts, answers.finished) | summary(scores, floor)


def _pair_facts(stats: PairStats, start: Start) -> dict[str, Any]:
    shares = {"gold_share": stats.gold_share, "invalid_share": stats.invalid_share}
    return asdict(stats) | shares | {"train": len(start.train), "heldout": len(start.heldout)}


def _samples(world: Playground, answers: dict[str, Answers]) -> list[dict[str, Any]]:
    """The first held-out tasks of each family, with every run's answer judged."""
    shown: dict[str, list[int]] = {}
    for index, task in enumerate(world.heldout):
        shown.setdefault(task.family, []).append(index)
    each = max(1, SHOWN_SAMPLES // len(shown))
    rows = []
    for index in (i for family in shown.values() for i in family[:each]):
        task = world.heldout[index]
        given = {name: _judged(task, a.texts[index], a.finished[index]) for name, a in answers.items()}
        rows.append({"family": task.family, "prompt": task.prompt, "gold": task.gold, "answers": given})
    return rows


def _judged(task: Task, text: str, finished: bool) -> dict[str, Any]:
    verdict = check(task, text)
    return {"text": text, "correct": verdict.correct, "valid": verdict.valid, "finished": finished}


def _short(learning_rate: float) -> str:
    """1e-4 for 0.0001, 1.5e-4 for 0.00015."""
    digits, _, power = f"{learning_rate:.6e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _text(world: Playground, completion: Completion) -> str:
    ids = completion.token_ids[:-1] if completion.finished else completion.token_ids
    return str(world.tokenizer.decode(ids))
