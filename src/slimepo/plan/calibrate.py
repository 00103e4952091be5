"""SLIME's knobs from one pass over a sample of pairs with the model that training starts from.

The paper's numbers are in nats per token of its own models and data. Here they are read in units of what is measured:
zero at the median margin of the start, one standard deviation of margins for one nat. So a pair stands to the two
margins as it does in the paper, whatever the scale of the model's log-probs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from slimepo.data.batch import StepCollator, pair_logps, to_device
from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.files import refuse_folder
from slimepo.losses import hyperparameters, slime
from slimepo.model.logps import install_logps, response_logps
from slimepo.model.score import PairScores, score_pairs, scoring_batches
from slimepo.words import plural, short_number

if TYPE_CHECKING:
    from rich.console import Console

    from slimepo.pipeline.recipe.schema import Recipe

# So many rejected tokens lie under the proposed floor at the start: it is for those that training pushes down.
BELOW_FLOOR = 0.05
# The floor's pull on a pair's rejected answer at the start, as a share of the separation's push.
FLOOR_SHARE = 0.1
# Pairs with both answers; fewer say nothing.
LEAST = 20
_SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Calibration:
    """What was measured, in nats per token, and the proposal: `options` of `slime`, `reasons` by option.

    `terms`: gradient of each term at the start with respect to the mean log-prob of the answer that it acts on, with
    the paper's knobs and with the proposal. `rates`: lowest and highest learning rate worth trying in `steps` steps.
    """

    pairs: int
    chosen: float
    rejected: float
    margins: dict[str, float]
    rejected_tokens: dict[str, float]
    tokens: dict[str, float]
    options: dict[str, float]
    reasons: dict[str, str]
    terms: dict[str, dict[str, float]]
    rates: tuple[float, float] | None = None
    steps: int | None = None
    scores: PairScores | None = field(default=None, repr=False, compare=False)


def calibrate(scores: PairScores) -> Calibration:
    """The proposal that follows from the scores of a sample of pairs.

    Raises:
        InputError: fewer than 20 pairs with both answers, or all margins are equal.
    """
    both = (
        ~np.isnan(scores.chosen) & ~np.isnan(scores.rejected) if len(scores.rejected) else np.zeros(0, bool)
    )
    _check_enough(int(both.sum()))
    tokens = [each for each, has in zip(scores.rejected_tokens, both, strict=True) if has]
    margin = (scores.chosen - scores.rejected)[both]
    middle, spread = float(np.median(margin)), float(margin.std(ddof=1))
    if not spread > 0:
        raise InputError(
            "calibrate: the model gives all pairs the same margin, so there is no scale to set margins by"
        )
    paper = {key: value for key, value in hyperparameters(slime).items() if type(value) is float}
    low = float(np.quantile(np.concatenate(tokens), BELOW_FLOOR))
    options = paper | {
        "threshold": -low,
        # None below 0: rejected answers need not stay the likelier ones because they are that at the start.
        "hard_margin": max(0.0, middle + paper["hard_margin"] * spread),
        "soft_margin": middle + paper["soft_margin"] * spread,
        "sharpness": paper["sharpness"] / spread,
    }
    separation = float(separation_pulls(margin, options).mean())
    whole_floor = floor_pull(tokens, options | {"rejected_weight": 1.0})
    options["chosen_weight"] = separation
    options["rejected_weight"] = min(
        paper["rejected_weight"], FLOOR_SHARE * separation / max(whole_floor, 1e-12)
    )
    options = {key: float(f"{value:.2g}") for key, value in options.items()}
    under = float(np.mean(np.concatenate(tokens) < -paper["threshold"]))
    passed = {
        name: float(np.mean(margin > knobs["hard_margin"])) for name, knobs in (("p", paper), ("o", options))
    }
    reasons = {
        "threshold": f"{1 - BELOW_FLOOR:.0%} of the rejected tokens lie above {low:.2f} nats at the start, so "
        f"the floor waits for those that training pushes down; with the paper's {paper['threshold']:g} it acts on "
        f"{under:.0%} of them from the first step",
        "hard_margin": f"the median margin is {middle:.2f}, the standard deviation of margins {spread:.2f}: "
        f"{paper['hard_margin']:g} deviations above the median, or 0 where that is more. {passed['o']:.0%} of the "
        f"pairs have passed it already, and {passed['p']:.0%} the paper's {paper['hard_margin']:g}",
        "soft_margin": f"{paper['soft_margin']:g} deviation above the median: there the separation has half its weight",
        "sharpness": f"{paper['sharpness']:g} for one deviation, as the paper's for one nat",
        "chosen_weight": f"the anchor pulls as hard as the separation at the start, {separation:.2f}: a chosen answer "
        "falls only where its gradient and the rejected one's overlap by more than 1 + chosen_weight / separation = 2 "
        f"times its own square; the paper's {paper['chosen_weight']:g} allows "
        f"{1 + paper['chosen_weight'] / separation:.2f}",
        "rejected_weight": f"the floor pulls {FLOOR_SHARE:.0%} as hard as the separation at the start, or as the "
        f"paper's {paper['rejected_weight']:g} would where that is less",
    }
    return Calibration(
        pairs=int(both.sum()),
        chosen=float(scores.chosen[both].mean()),
        rejected=float(scores.rejected[both].mean()),
        margins=_quantiles(margin) | {"mean": float(margin.mean()), "deviation": spread},
        rejected_tokens=_quantiles(np.concatenate(tokens)),
        tokens=_quantiles(np.array([len(each) for each in tokens], dtype=float)),
        options={key: options[key] for key in reasons},
        reasons=reasons,
        terms={
            name: {
                "chosen": knobs["chosen_weight"],
                "rejected": floor_pull(tokens, knobs),
                "distance": float(separation_pulls(margin, knobs).mean()),
            }
            for name, knobs in (("paper", paper), ("proposal", options))
        },
        scores=scores,
    )


def separation_pulls(margin: NDArray[np.float64], knobs: dict[str, float]) -> NDArray[np.float64]:
    """-dL_dist/dDelta at margins `[pairs]`: Appendix A's gradient of Eq. 8-10."""
    room = np.maximum(knobs["hard_margin"] - margin, 0)
    gate = _sigmoid(-knobs["sharpness"] * (margin - knobs["soft_margin"]))
    pull = knobs["distance_weight"] * (gate + knobs["sharpness"] * room * gate * (1 - gate))
    return np.where(room > 0, pull, 0)


def floor_pull(tokens: Sequence[NDArray[np.float64]], knobs: dict[str, float]) -> float:
    """Mean over pairs of -dL_l/d(mean log-prob of the rejected answer), all tokens moved alike: of Eq. 7."""
    pulls = []
    for logps in tokens:
        below = -logps - knobs["threshold"]
        softplus = np.logaddexp(0, below)
        pulls.append(
            float(np.mean(knobs["exponent"] * softplus ** (knobs["exponent"] - 1) * _sigmoid(below)))
        )
    return knobs["rejected_weight"] * float(np.mean(pulls))


def rate_range(
    model: nn.Module, rows: Sequence[Row], options: dict[str, Any], steps: int
) -> tuple[float, float]:
    """The learning rates between which training moves the loss by about one nat in `steps` steps of Adam.

    Adam's first steps move every weight by the learning rate, and so the loss by rate x |gradient|_1. With a rate that
    falls linearly to zero, steps that all agree in direction move it by half of that each, and steps of which none
    does by the square root of their number. The lowest rate is that of the first case, the highest of the second.

    model: as it will train (adapters in place). rows: pairs.
    """
    install_logps(model)
    device = next(model.parameters()).device
    collator = StepCollator(4)
    model.zero_grad()
    for index in scoring_batches(rows, collator):
        batch = to_device(collator.batch([rows[i] for i in index]), device)
        loss = slime(pair_logps(response_logps(model, batch), batch), **options).loss.sum() / len(rows)
        torch.autograd.backward(loss)
    norm = sum(float(p.grad.abs().sum(dtype=torch.float64)) for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    return 2 / (steps * norm), 2 / (math.sqrt(steps) * norm)


def calibrate_recipe(recipe: Recipe, rows_used: int, console: Console) -> Calibration:
    """Calibrate the one stage of a recipe (`slimepo.pipeline.recipe.read.one_stage_recipe`) on some of its rows.

    Raises:
        InputError: wrong input of any kind, or too few pairs.
    """
    import tempfile

    from slimepo.data.chat import chat_format
    from slimepo.data.read import left_out_in_words
    from slimepo.data.split import row_hash
    from slimepo.data.tokenize import in_words, tokenize_for
    from slimepo.pipeline.data import StageRows, load_data, recipe_tokenizer
    from slimepo.pipeline.recipe.arguments import stage_arguments
    from slimepo.pipeline.stage import stage_trainer

    stage = recipe.stages[0]
    if stage.loss != "slime" or stage.loss_options or stage.rollouts is not None:
        raise InputError(
            "calibrate: it seeks the loss_options of slime, from pairs that are there: leave loss, loss_options and "
            "rollouts out"
        )
    parts, facts = load_data(recipe)
    chat = chat_format(recipe_tokenizer(recipe), recipe.template_options)
    pairs = sorted((row for row in parts[stage.part] if row.chosen and row.rejected), key=row_hash)
    tokens = tokenize_for(pairs[:rows_used], chat, recipe.data, pairs=True, one_sided=False)
    for note in (*left_out_in_words(facts), *facts.get("notes", ()), *chat.notes, *in_words(tokens)):
        console.print(f"note: {note}", highlight=False, markup=False)
    kept = tokens.rows
    _check_enough(len(kept))
    # Of all pairs, of which the trainer below sees a few.
    of_epochs = max(1, math.ceil(stage.epochs * len(pairs) / stage.batch_size))
    steps = stage.max_steps if stage.max_steps > 0 else of_epochs
    with tempfile.TemporaryDirectory() as folder:
        args = stage_arguments(recipe, stage, Path(folder))
        trainer = stage_trainer(
            recipe, args, str(recipe.model), StageRows(kept, []), chat.tokenizer, Path(folder)
        )
        with console.status("scoring") as status:
            scores = score_pairs(
                trainer.model, kept, progress=lambda done, total: status.update(f"scoring: {done}/{total}")
            )
        found = calibrate(scores)
        with console.status("one backward pass"):
            rates = rate_range(trainer.model, kept, found.options, steps)
    return replace(found, rates=rates, steps=steps)


def _check_enough(pairs: int) -> None:
    if pairs < LEAST:
        raise InputError(
            f"calibrate: {pairs} pairs have both answers; {LEAST} are the least that says something"
        )


def fragment(found: Calibration) -> str:
    """The proposal as keys of a stage."""
    options = "\n".join(f"    {key}: {value:g}" for key, value in found.options.items())
    rate = ""
    if found.rates is not None:
        low, high = (short_number(float(f"{rate:.1g}")) for rate in found.rates)
        middle = short_number(float(f"{math.sqrt(found.rates[0] * found.rates[1]):.1g}"))
        # Few steps leave no room between steps that all agree and steps of which none does.
        steps = plural(found.steps or 1, "step")
        meaning = f"worth trying in {steps}: {low} to {high}"
        if low == high:
            meaning = f"for {steps}; more steps (a smaller batch_size, more epochs) give a range"
        rate = f"\n  learning_rate: {middle}  # {meaning}"
    return f"- loss: slime{rate}\n  loss_options:\n{options}\n"


def as_json(found: Calibration) -> dict[str, Any]:
    """Everything but the scores, as plain data."""
    values = asdict(replace(found, scores=None))
    del values["scores"]
    return values


def print_calibration(found: Calibration, console: Console) -> None:
    """What was measured, and the proposal with its reasons."""
    console.print(
        f"{found.pairs} pairs: chosen {found.chosen:.2f}, rejected {found.rejected:.2f} nats per token; margin "
        f"{found.margins['50%']:.2f} in the middle, {found.margins['5%']:.2f} to {found.margins['95%']:.2f} for nine "
        f"of ten; rejected answers of {found.tokens['50%']:.0f} tokens, and nine of ten tokens between "
        f"{found.rejected_tokens['5%']:.2f} and {found.rejected_tokens['95%']:.2f} nats"
    )
    for name, terms in found.terms.items():
        told = ", ".join(f"{term} {pull:.2g}" for term, pull in terms.items())
        console.print(f"pull of each term at the start, {name}: {told}")
    for key, reason in found.reasons.items():
        console.print(f"{key} {found.options[key]:g}: {reason}", highlight=False)
    console.print(fragment(found))


def check_plot(path: Path) -> None:
    """Nothing, where `draw` can write there, as far as can be told before there is anything to draw.

    Raises:
        InputError: matplotlib is not installed, or the name ends in nothing that it draws.
    """
    refuse_folder(path, "--plot")
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"--plot {path}: give a name that ends in .png or .svg")
    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'slimepo[report]'")


def draw(found: Calibration, path: Path) -> None:
    """Margins and rejected tokens with the paper's and the proposed knobs, as PNG or SVG by the file's name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    assert found.scores is not None
    paper = hyperparameters(slime)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.hist(found.scores.chosen - found.scores.rejected, bins=40, color="#999999")
    left.set(xlabel="margin at the start, nats per token", ylabel="pairs")
    right.hist(np.concatenate(found.scores.rejected_tokens), bins=60, color="#999999")
    right.set(xlabel="rejected tokens at the start, nats", ylabel="tokens", yscale="log")
    for axes, key, sign in ((left, "hard_margin", 1), (left, "soft_margin", 1), (right, "threshold", -1)):
        line = "--" if key == "soft_margin" else "-"
        words = key.replace("_", " ")
        axes.axvline(sign * float(paper[key]), color="#D55E00", linestyle=line, label=f"{words}, paper")
        axes.axvline(sign * found.options[key], color="#0072B2", linestyle=line, label=f"{words}, proposed")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -values))


def _quantiles(values: NDArray[np.float64]) -> dict[str, float]:
    return {
        f"{100 * share:g}%": float(at)
        for share, at in zip(_SHARES, np.quantile(values, _SHARES), strict=True)
    }
