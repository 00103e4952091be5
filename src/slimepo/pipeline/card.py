"""The model card of an exported model."""

from __future__ import annotations

from typing import Any

from slimepo.pipeline.recipe import Recipe, Stage
from slimepo.settings import dump

_NAMES = {
    "logps/chosen": "chosen, nats per token",
    "logps/rejected": "rejected, nats per token",
    "margin": "margin, nats per token",
    "accuracy": "chosen likelier than rejected",
    "rejected_below_floor": "rejected tokens under the floor",
}


def model_card(recipe: Recipe, stage: Stage, result: dict[str, Any]) -> str:
    """What was trained, on what, with which settings and which figures, as Markdown with metadata."""
    base = result["base"]
    head = [
        "---",
        "library_name: transformers",
        "tags: [slimepo, preference-optimization, " + stage.loss + "]",
    ]
    # The Hub wants the id of a published model there, not a local folder or a made-up one.
    head += [f"base_model: {recipe.model}"] if isinstance(recipe.model, str) else []
    lines = [
        *head,
        "---",
        "",
        f"# {stage.name}",
        "",
        f"Trained with slimepo: objective `{stage.loss}`, {result['steps']} steps of {stage.batch_size} pairs at "
        f"learning rate {stage.learning_rate:g}, {result['rows']:,} rows of part `{stage.part}` of "
        f"`{recipe.data.path}`.",
        "",
        f"Started from {f'`{base}`' if isinstance(base, str) else 'random weights'}; "
        f"{result['trained_parameters']:,} of {result['parameters']:,} parameters trained.",
        "",
        *_heldout(result),
        "## Recipe",
        "",
        "```yaml",
        dump(recipe).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _heldout(result: dict[str, Any]) -> list[str]:
    if "heldout" not in result:
        return []
    before, after = result["heldout"]["before"], result["heldout"]["after"]
    rows = [
        f"| {label} | {before[key]:.3f} | {after[key]:.3f} |" for key, label in _NAMES.items() if key in after
    ]
    return [
        f"## {result['heldout']['pairs']} held-out pairs",
        "",
        "| | before | after |",
        "|---|---|---|",
        *rows,
        "",
        f"The chosen answer became less likely in {100 * result['heldout']['chosen_fell']:.0f} % of the pairs.",
        "",
    ]
