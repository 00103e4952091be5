"""The table of objectives: lookup, binding, a user's own."""

import inspect
import sys
from pathlib import Path

import pytest

from slimepo.errors import InputError
from slimepo.losses import LOSSES, Objective, bind, find_objective, hyperparameters, slime
from slimepo.types import OBJECTIVES, LossOutput
from slimepo.words import nearest


def test_every_objective_takes_the_policy_what_it_asks_for_and_keywords_with_defaults() -> None:
    for objective in LOSSES.values():
        parameters = list(inspect.signature(objective.function).parameters.values())
        assert parameters[0].name == "policy"
        hyper = [p for p in parameters[1:] if p.name not in ("reference", *objective.asks)]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in hyper)


def test_the_names_that_help_lists_are_the_tables() -> None:
    assert tuple(LOSSES) == OBJECTIVES


def test_a_parameter_without_a_default_asks_for_what_its_name_says() -> None:
    asked = {name: objective.asks for name, objective in LOSSES.items() if objective.asks}
    without = {"sft", "slime", "simpo", "alpha_po", "simper", "cpo", "slic", "orpo"}
    with_reference = dict.fromkeys(LOSSES.keys() - without, ("reference",))
    of_samples = dict.fromkeys(("grpo", "rloo", "reinforce_pp", "ppo"), ("behaviour", "advantages"))
    others = {
        "kto": ("reference", "divergence"),
        "xpo": ("reference", "opponent"),
        "reward_aware_rpo": ("reference", "rewards"),
        "bopo": ("weight",),
        "tpo": ("gold",),
        "nash_md": ("advantages", "reference"),
    }
    assert asked == with_reference | of_samples | others


@pytest.mark.parametrize("name", ["grpo", "grpo/gspo", "reinforce_pp", "reinforce_pp/baseline"])
def test_a_penalty_asks_for_the_reference_where_it_has_a_weight(name: str) -> None:
    assert find_objective(name).asks == ("behaviour", "advantages")
    assert find_objective(name, {"kl": 0}).asks == ("behaviour", "advantages")
    assert find_objective(name, {"kl": 0.1}).asks == ("behaviour", "advantages", "reference")


def test_what_is_asked_for_is_no_hyperparameter() -> None:
    def own(policy, reference, *, weight, scale=1.0):  # type: ignore[no-untyped-def]
        return LossOutput(policy.chosen.sum(-1), {})

    assert Objective(own).asks == ("reference", "weight")
    assert hyperparameters(own) == {"scale": 1.0}


def test_defaults_are_the_papers() -> None:
    paper = dict(chosen_weight=0.1, rejected_weight=0.1, distance_weight=1.0, threshold=1.25)
    paper |= dict(hard_margin=1.5, soft_margin=1.0, sharpness=2.5, exponent=2.5)
    assert paper.items() <= hyperparameters(slime).items()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("slim", {}, "unknown loss 'slim' \\(did you mean 'slime'"),
        ("ddpo", {}, "unknown loss 'ddpo' \\(did you mean 'dpo'"),
        ("sim_po", {}, "did you mean 'simpo'"),
        ("dpo", {"betta": 2}, "no hyperparameter 'betta' \\(did you mean 'beta'"),
        ("kto", {"beta": 0}, "loss 'kto': beta = 0"),
        ("grpo", {"clip_low": -1}, "loss 'grpo': clip_low = -1.0 is out of range: .*>= 0"),
        ("grpo", {"kl": -1}, "loss 'grpo': kl = -1.0"),
        ("grpo", {"level": "word"}, "loss 'grpo': level = 'word'.*'token' or 'sequence'"),
        ("grpo", {"aggregation": "constant"}, "length goes with aggregation: constant"),
        ("grpo", {"length": 9}, "length goes with aggregation: constant"),
        ("grpo/dr", {"length": 0}, "length = 0"),
        ("grpo/gsop", {}, "did you mean 'grpo/gspo'"),
        ("rloo", {"kl": 0.1}, "no hyperparameter 'kl'"),
        ("ppo", {"dual_clip": 1}, "dual_clip = 1.0.*> 1"),
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
        "from slimepo.types import OBJECTIVES, LossOutput\n"
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
        "from slimepo.types import OBJECTIVES, LossOutput\n"
        f"def loss({signature}, *, scale=1.0):\n    return LossOutput(scale * {reads}.sum(-1), {{}})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert (find_objective(f"{name}:loss").asks == ("reference",)) is needs
    bind(f"{name}:loss", {"scale": 2})


def test_a_users_own_objective_lies_in_the_folder_where_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_the_recipe.py").write_text(
        "from slimepo.types import OBJECTIVES, LossOutput\n"
        "def loss(policy, reference=None):\n    return LossOutput(-policy.chosen.sum(-1), {})\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert find_objective("beside_the_recipe:loss").function.__module__ == "beside_the_recipe"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def loss(policy, reference=None)\n    return 1\n", "SyntaxError"),
        ("def loss(policy, reference=None): return missing\nmissing_too\n", "NameError.*missing_too"),
        ("import no_such_package\n", "no_such_package"),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_an_objective_that_cannot_be_imported_says_why(
    text: str, message: str, as_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"broken_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=f"cannot be imported: .*{message}"):
        find_objective(f"{tmp_path / name}.py:loss" if as_file else f"{name}:loss")


def test_a_file_may_hold_whatever_a_module_may_and_is_run_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dataclasses look their module up by its name."""
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from slimepo.types import OBJECTIVES, LossOutput\nprint('run')\n"
        "@dataclass\nclass Scale:\n    value: float = 2.0\n"
        "def loss(policy, reference=None):\n    return LossOutput(-Scale().value * policy.chosen.sum(-1), {})\n"
    )
    name = f"{tmp_path}/own.py:loss"
    bind(name, {})
    assert find_objective(name).function is find_objective(name).function
    assert capsys.readouterr().out == "run\n"


def test_a_file_is_found_beside_the_recipe_as_a_module_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside.py").write_text(
        "from slimepo.types import OBJECTIVES, LossOutput\n"
        "def loss(policy, reference=None):\n    return LossOutput(-policy.chosen.sum(-1), {})\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert find_objective("beside.py:loss").function.__name__ == "loss"
    with pytest.raises(InputError, match="no such file"):
        find_objective("elsewhere.py:loss")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("policy.chosen.sum(-1).view(1)", "made-up rows: RuntimeError"),
        ("-policy.chosen.detach().sum(-1)", "no gradient"),
        ("policy.chosen.sum(-1) * float('nan')", "not finite"),
    ],
)
def test_what_would_fail_in_the_first_step_fails_before_a_model_is_loaded(
    expression: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "late.py").write_text(
        "from slimepo.types import OBJECTIVES, LossOutput\n"
        f"def loss(policy, reference=None):\n    return LossOutput({expression}, {{}})\n"
    )
    with pytest.raises(InputError, match=message):
        bind(f"{tmp_path}/late.py:loss", {})


def test_an_objective_must_return_one_loss_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reduced.py").write_text(
        "def loss(policy, reference=None):\n    return policy.chosen.mean()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="one value a pair"):
        bind("reduced:loss", {})


def test_nearest_says_nothing_about_a_far_word() -> None:
    assert nearest("qqq", ["slime"]) == ""


def test_the_type_of_its_first_parameter_says_that_a_function_reads_samples(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from slimepo.types import LossOutput, SampleLogps\n"
        "def push(policy: SampleLogps, advantages) -> LossOutput:\n"
        "    return LossOutput(-(policy.logps * policy.mask).sum(-1) * advantages, {})\n"
    )
    objective = find_objective(f"{tmp_path}/own.py:push")
    assert (objective.positions, objective.asks) == (None, ("advantages",))
    bind(f"{tmp_path}/own.py:push", {})


def test_who_asks_for_a_gold_answer_reads_three(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from slimepo.types import LossOutput\n"
        "def imitate(policy, gold):\n"
        "    return LossOutput(-(gold.logps * gold.mask).sum(-1) - policy.chosen.sum(-1), {})\n"
    )
    objective = find_objective(f"{tmp_path}/own.py:imitate")
    assert (objective.positions, objective.asks) == ((0, 1, 2), ("gold",))
    bind(f"{tmp_path}/own.py:imitate", {})
