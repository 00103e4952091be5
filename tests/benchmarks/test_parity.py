"""Loss and gradient of every objective that TRL has as well are TRL's."""

import copy
import math

import numpy as np
import pytest
import torch

from benchmarks import parity
from benchmarks.parity import CASES, Case, Comparison, compare
from benchmarks.parity_trl import sample_rewards
from slimepo.onpolicy.advantages import group_advantages
from slimepo.training.trl_names import LOSS_TYPES
from tests.model.test_logps import plain_logps

# TRL's configs set it themselves.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")

PAGE = f"before\n{parity.BEGIN}\nold\n{parity.END}\nafter\n"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs") / "objectives.md"
    path.write_text(PAGE)
    return path


@pytest.fixture(scope="module")
def results(page):
    return parity.main(["--page", str(page)])


def named(results: list[Comparison], dtype: str) -> dict[tuple[str, str], Comparison]:
    return {(r.objective, r.against): r for r in results if r.dtype == dtype}


def test_what_trl_has_is_compared():
    variants = {objective for kinds in LOSS_TYPES.values() for objective, _ in kinds.values()} - {"sft"}
    on_samples = {"grpo", "grpo/dapo", "grpo/dr", "grpo/gspo", "rloo"}
    assert {case.objective for case in CASES} >= variants | on_samples | {"orpo"}
    # Each with the words that TRL's trainer knows it by.
    for name in LOSS_TYPES["dpo"].keys() - {"sft"}:
        assert any(case.against.startswith(f"DPOTrainer, {name}") for case in CASES), name


def test_float64_agrees_to_the_last_digits(results):
    found = named(results, "float64")
    assert len(found) == sum("float64" in case.dtypes for case in CASES)
    for result in found.values():
        assert result.loss_error < 1e-13, result
        assert result.gradient_error < 1e-13, result


def test_float32_agrees_with_trl_as_it_is_to_rounding(results):
    found = named(results, "float32")
    assert len(found) == sum("float32" in case.dtypes for case in CASES)
    for result in found.values():
        # What rounding comes to is the processor's: 3.5e-6 on an Intel Xeon where an AMD EPYC has less than 2e-6.
        assert result.loss_error < 1e-5, result
        assert result.gradient_error < 1e-5, result


def test_the_policy_has_left_the_reference(results):
    # At the reference dpo is log 2 and ipo (1 / 0.2) ** 2, whatever else is wrong.
    losses = {against: r.ours for (_, against), r in named(results, "float64").items()}
    assert abs(losses["DPOTrainer, sigmoid"] - math.log(2)) > 1e-3
    assert abs(losses["DPOTrainer, ipo"] - 25) > 1e-3


def test_ktos_divergence_is_not_clamped(tmp_path):
    (case,) = (case for case in CASES if case.objective == "kto")
    reference, policy = parity.models(torch.float64)
    peer = case.peer(copy.deepcopy(policy), reference, parity.random_rows(case.prompts), tmp_path)
    peer.trainer.compute_loss(peer.trainer.model, peer.batch)
    assert peer.trainer._metrics["train"]["kl"][-1] > 0.1
    assert {len(row.responses[0]) > 0 for row in peer.rows} == {True, False}


@pytest.mark.parametrize("objective", ["grpo", "rloo"])
def test_advantages_of_samples_are_trls_and_some_ratios_are_clipped(objective, tmp_path):
    """TRL makes them of the same rewards, in float32; RLOO's rewards have the penalty in them."""
    case = next(case for case in CASES if case.objective == objective)
    reference, policy = parity.models(torch.float64)
    rows = parity.random_rows(case.prompts, case.responses)
    with parity.wide():
        peer = case.peer(copy.deepcopy(policy), reference, rows, tmp_path)
        peer.trainer.compute_loss(peer.trainer.model, peer.batch)
    rewards = sample_rewards(len(rows), case.responses)
    if objective == "rloo":
        for index, i in np.ndindex(rewards.shape):
            known = plain_logps(reference, rows[index], i).sum().item()
            rewards[index, i] -= 0.05 * (peer.rows[index].values["behaviour"][i].sum() - known)
    ours = group_advantages(rewards, {"grpo": "group", "rloo": "leave-one-out"}[objective])
    theirs = np.stack([row.values["advantages"] for row in peer.rows])
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert 0.05 < peer.trainer._metrics["train"]["clip_ratio/region_mean"][-1] < 0.9


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("grpo", {"clip_high": 0.25}),
        ("grpo", {"clip_low": 0.15}),
        ("grpo/dapo", {"clip_high": 0.2}),
        ("grpo/dr", {"length": 13}),
        ("grpo/gspo", {"level": "token"}),
        ("rloo", {"clip_low": 0.15}),
        ("dpo", {"beta": 0.11}),
        ("aot", {"label_smoothing": 0.14}),
        ("tpo", {"nll_weight": 0.99}),
        ("ipo", {"length_normalized": False}),
        ("cpo", {"nll_weight": 0.99}),
        ("kto", {"desirable_weight": 1.01, "undesirable_weight": 1.3}),
    ],
)
def test_a_wrong_option_shows(objective, options):
    case = next(case for case in CASES if case.objective == objective)
    result = compare(case._replace(options=options), torch.float64)
    assert result.loss_error > 1e-4
    assert result.gradient_error > 1e-4


def test_trls_orpo_counts_the_prompt_in_its_likelihood():
    orpo = next(case for case in CASES if case.objective == "orpo")
    assert compare(Case("orpo", orpo.against, orpo.peer), torch.float64).loss_error > 1e-3


def test_the_table_goes_between_its_markers(results, page):
    text = page.read_text()
    assert text.startswith(f"before\n{parity.BEGIN}\n| objective |")
    assert text.endswith(f"{parity.END}\nafter\n")
    assert "old" not in text
    for result in results:
        assert f"| `{result.objective}` | {result.against} | {result.dtype} |" in text
    assert "trl 1.16" in text


def test_the_documentation_shows_every_comparison():
    text = parity.DOCS.read_text()
    for case in CASES:
        for dtype in case.dtypes:
            assert f"| `{case.objective}` | {case.against} | {dtype} |" in text


def test_a_page_without_markers_is_refused(tmp_path):
    bare = tmp_path / "bare.md"
    bare.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the markers"):
        parity.write(bare, "table")
