"""The certificate of a recipe, without a run: each stage's loss and gradients beside the plain computation's."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from slimepo.data.chat import chat_format
from slimepo.files import read_json
from slimepo.pipeline.data import load_data, recipe_tokenizer, stage_rows
from slimepo.pipeline.recipe.arguments import stage_arguments
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.remote.standin import with_stand_ins
from slimepo.pipeline.rewards import stage_rewards
from slimepo.pipeline.run import check_reference
from slimepo.pipeline.stage import stage_trainer
from slimepo.pipeline.start import exported_model, given_adapter, stage_base
from slimepo.pipeline.tasks import load_tasks
from slimepo.training.callbacks import TrainingProgress

if TYPE_CHECKING:
    from rich.console import Console


def certify_recipe(recipe: Recipe, out: Path, console: Console) -> dict[str, dict[str, Any]]:
    """What `slimepo.training.certificate` finds for every stage of a recipe; nothing is trained or kept.

    A stage starts from the model that the run folder `out` has for it, else from the recipe's; one that trains on pairs
    which are not made yet is left out.

    Raises:
        CertificateError: of the first stage whose numbers differ.
    """
    found: dict[str, dict[str, Any]] = {}
    recipe = with_stand_ins(recipe, console)
    tasks, (parts, _) = load_tasks(recipe), load_data(recipe)
    chat = chat_format(recipe_tokenizer(recipe), recipe.template_options)
    for stage in recipe.stages:
        if stage.part in recipe.pairs and read_json(out / stage.part / "pairs.json") is None:
            console.print(f"{stage.name}: left out, for its pairs are not made yet")
            continue
        # It is looked at once: nothing of it is watched.
        stage = stage.model_copy(update={"monitor": False})
        if stage.reference in recipe.before(stage) and not exported_model(out / stage.reference).exists():
            console.print(f"{stage.name}: reference auto, for stage {stage.reference} is not done")
            stage = stage.model_copy(update={"reference": "auto"})
        check_reference(recipe, stage)
        args = stage_arguments(recipe, stage, out / stage.name)
        base = stage_base(recipe, stage, out)
        if (start := recipe.start_of(stage)) is not None and not Path(str(base)).exists():
            console.print(f"{stage.name}: from the recipe's model, for stage {start} is not done")
            base = recipe.model
            args.adapter = given_adapter(recipe, recipe.stages[0])
        with TemporaryDirectory(prefix="slimepo-certify-") as name:
            folder = Path(name)
            args.output_dir = str(folder / stage.name / "checkpoints")
            if stage.part in recipe.pairs:
                (folder / stage.part).symlink_to((out / stage.part).resolve())
            rows = stage_rows(recipe, stage, parts, tasks, chat, folder, console)
            rewards = stage_rewards(stage, rows.tasks, folder / stage.name)
            progress = TrainingProgress(console, stage.name)
            trainer = stage_trainer(
                recipe, args, base, rows, chat.tokenizer, folder / stage.name, [progress], **rewards
            )
            console.print(f"{stage.name}: layout {trainer.layout} ({trainer.layout_reason})")
            try:
                found[stage.name] = trainer.certify()
            finally:
                progress.close()
    return found
