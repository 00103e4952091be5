"""Arena-Hard v2.0 with style control: a Bradley-Terry fit that also sees length and markdown of the answers.

For each battle between a model m and the baseline b, with t tokens and d_k = count_k / (t + 1) for headers, lists and
bold marks, the features are

    (t_m - t_b) / (t_m + t_b)   and   (d_m,k - d_b,k) / (d_m,k + d_b,k + 1),

each brought to mean 0 and standard deviation 1 over all battles of the table. The log-odds of the model's win are
strength_m - strength_b + features . coefficients; a model's score is its win rate at equal style.

Upstream fits this with 50 steps of L-BFGS at learning rate 0.1 without a line search, in float32, from 0.5 everywhere,
and stops there; the fit is not converged, and its scores depend on it: `fit_style` does the same. Upstream's
switches for length alone or markdown alone cut off the models' own columns instead of style columns, so that nothing
can be read from them; they are not offered here.

Source: lmarena/arena-hard-auto at 196f6b8, show_result.py, utils/math_utils.py, utils/add_markdown_info.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from slimepo.errors import InputError
from slimepo.evaluation.benchmarks.bootstrap import Floats
from slimepo.evaluation.judge.request import Measure

if TYPE_CHECKING:
    from torch import Tensor

STYLE_FEATURES = ("token_len", "header_count", "list_count", "bold_count")
PUBLISHED_STEPS = 50

_CODE = re.compile("```([^`]*)```")


def style_metadata(text: str, token_len: int) -> dict[str, Any]:
    """Length and markdown of an answer in upstream's format, counted outside of code blocks.

    `token_len` is the number of tokens by gpt-4o's tokenizer (o200k_base) in the official figures.
    """
    # As upstream: each block's inside is taken out wherever it occurs, and the fences stay.
    for block in _CODE.findall(text):
        text = text.replace(block, "")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "token_len": token_len,
        "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def style_of(text: str) -> dict[str, Any]:
    """Length and markdown of an answer whose row has none.

    Raises:
        InputError: gpt-4o's tokenizer is not at hand.
    """
    need_tokenizer()
    metadata = count_style(text)
    assert metadata is not None
    return metadata


def count_style(text: str) -> dict[str, Any] | None:
    """Length and markdown as upstream writes them, where gpt-4o's tokenizer is at hand."""
    encoding = _gpt_4o_tokenizer()
    if encoding is None:
        return None
    return style_metadata(text, len(encoding.encode(text, disallowed_special=())))


def need_tokenizer() -> None:
    """Nothing, where gpt-4o's tokenizer is at hand.

    Raises:
        InputError: it is not.
    """
    if _gpt_4o_tokenizer() is None:
        raise InputError(
            "style control counts tokens as gpt-4o does: pip install tiktoken (it fetches its vocabulary once)"
        )


def _gpt_4o_tokenizer() -> Any:
    try:
        import tiktoken

        return tiktoken.get_encoding("o200k_base")
    except (ImportError, OSError):
        return None


def style_scores(
    battles: Sequence[tuple[str, str, float]],
    baseline: str,
    style: Mapping[str, Mapping[str, Any]],
    seed: int | None,
    rounds: int,
) -> dict[str, Measure]:
    """Medians of `rounds` bootstrap fits with 5 and 95 percentiles, in percent.

    `battles` are (model, question, outcome).

    Raises:
        InputError: the style of an answer is missing, or a feature is the same in all battles.
    """
    design, outcomes, models = design_matrix(battles, baseline, style)
    indices = np.random.RandomState(seed).randint(low=0, high=len(battles), size=(rounds, len(battles)))
    rates = np.array([win_rates(fit_style(design[i], outcomes[i]), models, baseline) for i in indices])
    counts = {m: sum(b[0] == m for b in battles) for m in models}
    low, middle, high = 100 * np.quantile(rates, [0.05, 0.5, 0.95], axis=0)
    return {
        m: Measure(float(middle[i]), counts[m], float(low[i]), float(high[i]))
        for i, m in enumerate(models)
        if m != baseline
    }


def design_matrix(
    battles: Sequence[tuple[str, str, float]], baseline: str, style: Mapping[str, Mapping[str, Any]]
) -> tuple[Tensor, Tensor, list[str]]:
    """Regressors [battles, models + 4] in float32, outcomes [battles], and the sorted models with the baseline.

    A battle's row has 1 for the model, -1 for the baseline, and the standardised style features.
    """
    import torch

    models = sorted({name for name, _, _ in battles} | {baseline})
    of_model = torch.tensor([_counts(style, m, q) for m, q, _ in battles], dtype=torch.float32)
    of_baseline = torch.tensor([_counts(style, baseline, q) for _, q, _ in battles], dtype=torch.float32)
    features = torch.zeros_like(of_model)
    features[:, 0] = (of_model[:, 0] - of_baseline[:, 0]) / (of_model[:, 0] + of_baseline[:, 0])
    density_model = of_model[:, 1:] / (of_model[:, :1] + 1)
    density_baseline = of_baseline[:, 1:] / (of_baseline[:, :1] + 1)
    features[:, 1:] = (density_model - density_baseline) / (density_model + density_baseline + 1)
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    if not bool(features.isfinite().all()):
        bad = STYLE_FEATURES[int((~features.isfinite()).any(dim=0).nonzero()[0])]
        raise InputError(
            f"style control is undefined: {bad} is the same in all battles, or two answers are empty"
        )
    players = torch.zeros(len(battles), len(models))
    players[torch.arange(len(battles)), [models.index(m) for m, _, _ in battles]] = 1
    players[:, models.index(baseline)] = -1
    outcomes = torch.tensor([outcome for _, _, outcome in battles])
    return torch.cat([players, features], dim=1), outcomes, models


def _counts(style: Mapping[str, Mapping[str, Any]], model: str, question: str) -> list[float]:
    try:
        values = [style[model][question][name] for name in STYLE_FEATURES]
    except KeyError as error:
        raise InputError(
            f"style control needs the style of {model}'s answer to {question}; {error} is missing"
        ) from None
    return [float(sum(v.values())) if isinstance(v, Mapping) else float(v) for v in values]


def fit_style(design: Tensor, outcomes: Tensor, steps: int = PUBLISHED_STEPS) -> Floats:
    """Coefficients [models + 4] of upstream's fit: L-BFGS on the summed cross-entropy, at most `steps` iterations."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    weights = torch.full((design.shape[1],), 0.5, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], lr=0.1, max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-9
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(design @ weights, outcomes, reduction="sum")
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    result: Floats = weights.detach().double().numpy()
    return result


def win_rates(coefficients: Floats, models: Sequence[str], baseline: str) -> Floats:
    """Win rate [models] of each model over the baseline at equal style, from 0 to 1."""
    strengths = coefficients[: len(models)]
    rates: Floats = 1 / (1 + np.exp(strengths[list(models).index(baseline)] - strengths))
    return rates
