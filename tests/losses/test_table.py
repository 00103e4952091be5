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
        assert [p.name for p in parameters[:2]] == ["policy", "reference"]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[2:])


def test_defaults_are_the_papers() -> None:
    paper = dict(chosen_weight=0.1, rejected_weight=0.1, distance_weight=1.0, threshold=1.25)
    paper |= dict(hard_margin=1.5, soft_margin=1.0, sharpness=2.5, exponent=2.5)
    assert paper.items() <= hyperparameters(slime).items()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("slim", {}, "unknown loss 'slim' \\(did you mean 'slime'"),
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


def test_an_objective_must_return_one_loss_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reduced.py").write_text(
        "def loss(policy, reference=None):\n    return policy.chosen.mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="one value a pair"):
        bind("reduced:loss", {})


def test_nearest_says_nothing_about_a_far_word() -> None:
    assert nearest("qqq", ["slime"]) == ""
