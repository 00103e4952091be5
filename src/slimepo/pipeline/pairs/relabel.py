"""`slimepo relabel`: pairs of a reference model's own answers, labelled so that DPO on them keeps constraints.

MoCAN and PeCAN of arXiv 2405.19544: rewards of all answers make the multipliers of `slimepo.onpolicy.dual`, and each
pair of answers gets the label that s = r + lambda . g gives it. MoCAN takes r and g from functions or reward models,
PeCAN from two models that were aligned to them: beta times their log-ratios to the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from slimepo.data.files import BadRow, file_rows
from slimepo.data.messages import MalformedRow, prompt_turns
from slimepo.errors import InputError
from slimepo.files import write_json_lines
from slimepo.onpolicy.dual import Array, Dual, preferred, solve_dual
from slimepo.onpolicy.rewards import Prompt, Rewarder
from slimepo.pipeline.rewards import check_rewards, make_rewards
from slimepo.pipeline.tasks import RunTasks
from slimepo.types import Message, Preference, Verdict

if TYPE_CHECKING:
    from rich.console import Console

Method = Literal["mocan", "pecan"]
# Fewer answers a prompt make the bound cost more than it has to.
ENOUGH = 100


@dataclass(frozen=True)
class Answered:
    """A prompt with the answers that a model gave to it, those that ended alone; `index`: their places in `row`."""

    place: str
    prompt: list[Message]
    answers: list[str]
    index: list[int]
    row: dict[str, Any]


def read_answers(path: Path) -> tuple[list[Answered], int, int]:
    """Prompts with two answers or more, as `slimepo generate --samples N --out FILE` writes them; how many answers were
    left out because they are empty or reached no end, and how many prompts because less than two were left of them.

    Raises:
        InputError: the file cannot be read, a row lacks what it needs, or no prompt has two answers.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}: slimepo generate --samples 128 --out {path} writes it")
    found, cut, alone = [], 0, 0
    for place, row in file_rows(path):
        if isinstance(row, BadRow):
            raise InputError(f"{place}: {row.reason}")
        answers = row.get("answers")
        if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
            raise InputError(f"{place}: 'answers' must be a list of texts, the model's answers to the prompt")
        finished = row.get("finished") or [True] * len(answers)
        if len(finished) != len(answers):
            raise InputError(
                f"{place}: 'finished' says something of {len(finished)} answers of {len(answers)}"
            )
        try:
            prompt = prompt_turns(row)
        except MalformedRow as malformed:
            raise InputError(f"{place}: {malformed}") from malformed
        index = [i for i, text in enumerate(answers) if text and finished[i]]
        cut += len(answers) - len(index)
        if len(index) < 2:
            alone += 1
            continue
        found.append(Answered(place, prompt, [answers[i] for i in index], index, dict(row)))
    if not found:
        raise InputError(f"{path}: no prompt has two answers that ended: give more samples or more tokens")
    return found, cut, alone


def check_scores(
    method: Method, names: Sequence[str], reference: str | None, answered: Sequence[Answered]
) -> None:
    """Refuse, before a model is loaded, what no answer can be scored by.

    Raises:
        InputError: its name, and what is missing.
    """
    if method == "mocan":
        if reference is not None:
            raise InputError("--reference is PeCAN's: MoCAN's rewards need none")
        check_rewards({name: 1.0 for name in names if name not in answered[0].row}, has_checker=False)
        return
    if reference is None:
        raise InputError("--method pecan needs --reference, the model that wrote the answers")
    from slimepo.model.chat import model_chat

    for name in (*names, reference):
        model_chat(name)


def scores(name: str, answered: Sequence[Answered], folder: Path) -> list[Array]:
    """What `name` says of each answer, for MoCAN: a column of numbers, or a reward."""
    if name in answered[0].row:
        return [_column(name, each) for each in answered]
    rewards = make_rewards({name: 1.0}, RunTasks([], [], _no_checker, 0, 0), folder)
    prompts = [Prompt(each.place, each.prompt, each.row, []) for each in answered]
    rewarder = Rewarder(rewards, way_out="mend the reward, and run this again")
    return [np.array(found) for found, _, _ in rewarder.of_all(prompts, [each.answers for each in answered])]


def log_ratios(
    name: str, reference: Sequence[Array], answered: Sequence[Answered], beta: float
) -> list[Array]:
    """What the model `name` says of each answer, for PeCAN: beta times its log-ratio to the reference's log-probs."""
    # The label's logit has this beta, which the paper's code leaves out of it.
    return [beta * (now - then) for now, then in zip(log_probs(name, answered), reference, strict=True)]


def _no_checker(task: Any, text: str) -> Verdict:
    raise InputError(f"task {task.id}: there is no checker here")


def _column(name: str, of: Answered) -> Array:
    values = of.row.get(name)
    try:
        numbers = np.array([float(values[i]) for i in of.index])  # type: ignore[index]
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{of.place}: {name!r} must be a list of numbers, one an answer") from error
    if not np.isfinite(numbers).all():
        raise InputError(f"{of.place}: {name!r} holds a number that is not finite")
    return numbers


def log_probs(model: str, answered: Sequence[Answered]) -> list[Array]:
    """The log-prob in nats of each answer under a model."""
    from slimepo.model.chat import answer_logps

    records = [
        Preference(each.prompt, _turn(text), [], f"{each.place}, answer {i + 1}")
        for each in answered
        for i, text in zip(each.index, each.answers, strict=True)
    ]
    logps, dropped = answer_logps(model, records)
    if np.isnan(logps[:, 0]).any():
        raise InputError(f"{model}: {dropped[0]}")
    return np.split(logps[:, 0], np.cumsum([len(each.answers) for each in answered])[:-1])


def labelled(
    answered: Sequence[Answered],
    rewards: Sequence[Array],
    constraints: Sequence[Array],
    dual: Dual,
    *,
    pairs: int,
    seed: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of pairs: of each prompt the first answer against the second, the third against the fourth, and so on.

    Without a `seed` a pair stands there in both orders, each with its probability as `weight`: the mean loss is then
    the one that drawn labels have on the mean. With a seed its label is drawn, and it stands there once. Pairs of equal
    texts are left out.

    Args:
        rewards, constraints: as `solve_dual` takes them.
        pairs: the most of a prompt.
    """
    rows = []
    draws = None if seed is None else np.random.default_rng(seed)
    for each, r, g in zip(answered, rewards, constraints, strict=True):
        score = r + dual.multipliers @ g
        index = np.arange(min(len(score) // 2, pairs) * 2).reshape(-1, 2)
        for (first, second), second_wins in zip(
            index.tolist(), preferred(score[index]).tolist(), strict=True
        ):
            if each.answers[first] == each.answers[second]:
                continue
            ways = [(second, first, second_wins), (first, second, 1 - second_wins)]
            if draws is not None:
                ways = [(*ways[draws.random() >= second_wins][:2], 1.0)]
            rows += [
                {
                    "prompt": each.prompt,
                    "chosen": _turn(each.answers[one]),
                    "rejected": _turn(each.answers[other]),
                }
                | ({} if draws is not None else {"weight": weight})
                for one, other, weight in ways
                if weight > 0
            ]
    return rows


def _turn(text: str) -> list[Message]:
    return [Message(role="assistant", content=text)]


def relabel(
    source: Path,
    to: Path,
    console: Console,
    *,
    method: Method,
    reward: str,
    constraints: Sequence[str],
    bounds: Sequence[float],
    reference: str | None,
    beta: float,
    pairs: int,
    seed: int | None,
) -> Dual:
    """Read answers, solve the dual, write pairs, and say what the policy they stand for does.

    A bound of PeCAN is on E[g] less that of the reference, for a log-ratio is known but for a number a prompt.

    Raises:
        InputError: wrong input of any kind, or a bound that is out of reach.
    """
    if len(constraints) != len(bounds):
        raise InputError(
            f"{len(constraints)} of --constraint and {len(bounds)} of --bound: give each its bound"
        )
    if not all(map(math.isfinite, bounds)):
        raise InputError("--bound: give a finite number")
    answered, cut, alone = read_answers(source)
    check_scores(method, [reward, *constraints], reference, answered)
    if cut:
        console.print(f"{cut:,} answers left out: they are empty, or reached no end", highlight=False)
    if alone:
        console.print(f"{alone:,} prompts left out: fewer than two answers", highlight=False)
    fewest = min(len(each.answers) for each in answered)
    if fewest < ENOUGH:
        console.print(
            f"as few as {fewest} answers a prompt: below about {ENOUGH} the bound costs more than it has to",
            highlight=False,
        )
    if reference is not None:
        plain = log_probs(reference, answered)
        of_reward, *of_each = (log_ratios(name, plain, answered, beta) for name in (reward, *constraints))
        of_each = [[g - g.mean() for g in of_one] for of_one in of_each]
    else:
        of_reward, *of_each = (scores(name, answered, to.parent) for name in (reward, *constraints))
    together = [np.stack(of_prompt) for of_prompt in zip(*of_each, strict=True)]
    dual = solve_dual(of_reward, together, bounds, beta, constraints)
    rows = labelled(answered, of_reward, together, dual, pairs=pairs, seed=seed)
    if not rows:
        raise InputError(f"{source}: all answers to each prompt are the same: there is no pair")
    write_json_lines(to, rows)
    for j, name in enumerate(constraints):
        kept = "holds of itself" if dual.multipliers[j] == 0 else f"multiplier {dual.multipliers[j]:.4g}"
        console.print(
            f"{name}: {dual.before[j]:.4g} before, {dual.constraints[j]:.4g} expected, bound {bounds[j]:g}: {kept}",
            highlight=False, markup=False,
        )  # fmt: skip
    console.print(
        f"expected reward {dual.reward:.4g}, {dual.kl:.4g} nats from the reference\n{len(rows):,} rows of "
        f"{len(answered):,} prompts: {to}\ntrain on them with loss: dpo, loss_options: {{beta: {beta:g}}}, from the "
        "model that wrote the answers",
        highlight=False,
        markup=False,
    )
    return dual
