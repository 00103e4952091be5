"""The table of objectives: lookup, binding, a user's own."""

import inspect
import sys
from pathlib import Path

import pytest

from slimepo.errors import InputError
from slimepo.losses import LOSSES, bind, find_objective, hyperparameters, slime
from slimepo.losses.table import nearest


def test_every_objective_takes_policy_and_reference_and_keywords_with_defaults() -> None:
    for objective in LOSSES.values():
        parameters = list(inspect.signature(objective.function).parameters.values())
        given = ["policy", "reference", *["divergence"] * objective.mismatched]
        assert [p.name for p in parameters[: len(given)]] == given
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[len(given) :])


def test_a_reference_without_a_default_asks_for_a_reference_model() -> None:
    needing = {name for name, objective in LOSSES.items() if objective.needs_reference}
    assert needing == {"dpo", "ipo", "kto", "rpo", "lpo", "chi_po"}


def test_defaults_are_the_papers() -> None:
    paper = dict(chosen_weight=0.1, rejected_weight=0.1, distance_weight=1.0, threshold=1.25)
    paper |= dict(hard_margin=1.5, soft_margin=1.0, sharpness=2.5, exponent=2.5)
    assert paper.items() <= hyperparameters(slime).items()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("slim", {}, "unknown loss 'slim' \\(did you mean 'slime'"),
        ("dppo", {}, "unknown loss 'dppo' \\(did you mean 'dpo'"),
        ("sim_po", {}, "did you mean 'simpo'"),
        ("dpo", {"betta": 2}, "no hyperparameter 'betta' \\(did you mean 'beta'"),
        ("kto", {"beta": 0}, "loss 'kto': beta = 0"),
        ("slime/without-hard", {"hard_gte": "relu"}, "did you mean 'hard_gate'"),
        ("slime", {"expnent": 2}, "no hyperparameter 'expnent' \\(did you mean 'exponent'"),
        ("slime", {"exponent": 0.5}, "exponent = 0.5.*>= 1"),
        ("slime", {"hard_margin": "wide"}, "hard_margin = 'wide'"),
        ("no_such_module:loss", {}, "cannot be imported"),
        ("math:pi", {}, "not a function"),
    ],
)
def test_wrong_input_is_named_before_anything_is_loaded(
    name: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        bind(name, options)


def test_numbers_may_come_as_text_from_the_command_line() -> None:
    assert bind("slime", {"hard_margin": "2e0"}).keywords["hard_margin"] == 2.0  # type: ignore[attr-defined]


def test_a_users_own_objective_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_losses.py").write_text(
        "from slimepo.types import LossOutput\n"
        "def gap(policy, reference=None, *, scale=1.0):\n"
        "    return LossOutput(scale * (policy.rejected.sum(-1) - policy.chosen.sum(-1)), {})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_objective("my_losses:gap").function is sys.modules["my_losses"].gap
    bind("my_losses:gap", {"scale": 2.0})
    with pytest.raises(InputError, match="scale"):
        bind("my_losses:gap", {"scales": 2.0})


@pytest.mark.parametrize(
    ("signature", "needs"),
    [("policy, reference", True), ("policy, reference=None", False), ("policy", False)],
)
def test_a_users_own_objective_says_by_its_signature_whether_it_needs_a_reference(
    signature: str, needs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_{signature.count('reference')}{signature.count('None')}"
    reads = "(policy.chosen - reference.chosen)" if needs else "policy.chosen"
    (tmp_path / f"{name}.py").write_text(
        "from slimepo.types import LossOutput\n"
        f"def loss({signature}, *, scale=1.0):\n    return LossOutput(scale * {reads}.sum(-1), {{}})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_objective(f"{name}:loss").needs_reference is needs
    if signature != "policy":
        bind(f"{name}:loss", {"scale": 2})


def test_a_users_own_objective_takes_two_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lonely.py").write_text("def loss(policy):\n    return policy\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"made-up pair.*positional argument"):
        bind("lonely:loss", {})


def test_a_users_own_objective_lies_in_the_folder_where_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_the_recipe.py").write_text(
        "from slimepo.types import LossOutput\n"
        "def loss(policy, reference=None):\n    return LossOutput(-policy.chosen.sum(-1), {})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert find_objective("beside_the_recipe:loss").function.__module__ == "beside_the_recipe"


def test_an_objective_must_return_one_loss_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reduced.py").write_text(
        "def loss(policy, reference=None):\n    return policy.chosen.mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="one value a pair"):
        bind("reduced:loss", {})


def test_nearest_says_nothing_about_a_far_word() -> None:
    assert nearest("qqq", ["slime"]) == ""
