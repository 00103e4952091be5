"""Presets of SLIME; the authors' published code computed anew, token by token, to hold `authors-code` to it."""

import pytest
import torch
from torch import Tensor

from slimepo.errors import InputError
from slimepo.losses import LOSSES, PRESETS, bind, count, find_objective, hyperparameters, slime, step_loss
from slimepo.types import PairLogps
from tests.losses.problems import pairs_of, random_pairs

NAMES = [f"{base}/{preset}" for base, presets in PRESETS.items() for preset in presets]

Answers = list[tuple[list[Tensor], list[Tensor]]]


def authors_micro_batch(pairs: Answers) -> Tensor:
    """What their trainer returns for one device's micro-batch, from the log-probs of the response tokens.

    From github.com/fpsigma/trl-slime at 042c097: `SlimeTrainer.dpo_loss` with the values of scripts/slime/train.py,
    called by DPOTrainer once for each letter of its loss type, "ipo".
    """
    total = torch.zeros((), dtype=torch.float64)
    for _letter in "ipo":
        penalty, counted = torch.zeros((), dtype=torch.float64), 0
        for _, rejected in pairs:
            for logp in rejected:
                if logp != 0:
                    penalty = penalty + torch.log(1 + torch.exp(-logp - 1.25)) ** 2.5
                    counted += 1
        # Their count is a float32, in which the 1e-8 that they add to it vanishes unless there is no token.
        floor = 0.0005 * (penalty / max(counted, 1))
        losses = []
        for chosen, rejected in pairs:
            mean_chosen, mean_rejected = sum(chosen) / len(chosen), sum(rejected) / len(rejected)
            apart = mean_chosen - mean_rejected
            missing = 1.5 - apart if apart < 1.5 else 0 * apart
            distance = 1.0 * missing * (1 / (1 + torch.exp(2.5 * (apart - 1.0))))
            losses.append(distance - 0.1 * mean_chosen + floor)
        total = total + sum(losses) / len(losses)
    return total


def answers(policy: PairLogps) -> Answers:
    return [
        ([*chosen[chosen_mask]], [*rejected[rejected_mask]])
        for chosen, chosen_mask, rejected, rejected_mask in zip(
            policy.chosen, policy.chosen_mask, policy.rejected, policy.rejected_mask, strict=True
        )
    ]


def ours(policy: PairLogps, size: int) -> Tensor:
    """A step with the preset in micro-batches of `size` pairs."""
    function, pairs = bind("slime/authors-code", {}), len(policy.chosen)
    counts = count(policy)
    cuts = [slice(start, start + size) for start in range(0, pairs, size)]
    parts = [PairLogps(*(value[cut] for value in vars(policy).values())) for cut in cuts]
    return torch.stack([step_loss(function(part), counts) for part in parts]).sum()


def theirs(policy: PairLogps, size: int) -> Tensor:
    """Their step: the mean over its micro-batches, as transformers' accumulation makes it."""
    pairs = answers(policy)
    parts = [authors_micro_batch(pairs[start : start + size]) for start in range(0, len(pairs), size)]
    return torch.stack(parts).mean()


def some_pairs(seed: int) -> PairLogps:
    """Eight ragged pairs, near and far apart, with rejected tokens whose log-prob is exactly 0."""
    policy = random_pairs(8, seed)
    policy.rejected[::3, 0] = 0.0
    policy.rejected[1::3] *= 3
    policy.chosen.requires_grad_(), policy.rejected.requires_grad_()
    return policy


class TestAuthorsCode:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    def test_value_and_gradient_are_those_of_their_code(self, seed: int, size: int) -> None:
        policy = some_pairs(seed)
        mine, authors = ours(policy, size), theirs(policy, size)
        torch.testing.assert_close(mine, authors, rtol=1e-13, atol=0)
        inputs = [policy.chosen, policy.rejected]
        for a, b in zip(torch.autograd.grad(mine, inputs), torch.autograd.grad(authors, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)

    def test_a_step_depends_on_how_it_is_cut(self) -> None:
        policy = some_pairs(0)
        losses = {size: ours(policy, size).item() for size in (1, 2, 4, 8)}
        assert len({round(loss, 9) for loss in losses.values()}) == 4

    def test_the_order_of_pairs_counts_through_the_cut_alone(self) -> None:
        policy = some_pairs(0)
        order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
        shuffled = PairLogps(*(value[order] for value in vars(policy).values()))
        assert ours(shuffled, 8).item() == pytest.approx(ours(policy, 8).item(), rel=1e-14)
        assert ours(shuffled, 2).item() != pytest.approx(ours(policy, 2).item(), rel=1e-6)

    def test_worked_by_hand(self) -> None:
        # One pair: bar_l(w) = -1 and bar_l(l) = -1, of one token that counts and one that does not, as it is 0.
        policy = pairs_of([[-1.0]], [[-2.0, 0.0]])
        floor = 0.0005 * torch.log1p(torch.tensor(0.75, dtype=torch.float64).exp()).item() ** 2.5
        middle = 1.5 / (1 + torch.tensor(-2.5, dtype=torch.float64).exp().item())
        assert ours(policy, 1).item() == pytest.approx(3 * (0.1 + floor + middle), rel=1e-7)

    def test_a_certain_rejected_token_has_no_pull_from_the_floor(self) -> None:
        policy = pairs_of([[-1.0]], [[-2.0, 0.0]])
        slime(policy, rejected_mean="micro_batch", chosen_weight=0, distance_weight=0).loss.sum().backward()
        assert policy.rejected.grad[0, 1].item() == 0
        assert policy.rejected.grad[0, 0].item() < 0

    def test_rejected_answers_that_are_all_certain_cost_nothing(self) -> None:
        policy = pairs_of([[-1.0]], [[0.0, 0.0]])
        assert ours(policy, 1).isfinite()
        assert slime(policy, rejected_mean="micro_batch").metrics["loss/rejected"].tolist() == [0]

    def test_without_its_quirks_it_is_the_paper(self) -> None:
        # A third of every term, the paper's weight and the paper's mean.
        policy = some_pairs(1)
        options = {
            "chosen_weight": 0.1,
            "rejected_weight": 0.1,
            "distance_weight": 1.0,
            "rejected_mean": "sequence",
        }
        mended = bind("slime/authors-code", options)(policy)
        torch.testing.assert_close(mended.loss, slime(policy).loss, rtol=0, atol=0)


class TestAblations:
    @pytest.mark.parametrize(
        ("preset", "term"), [("without-chosen", "loss/chosen"), ("without-rejected", "loss/rejected")]
    )
    def test_a_term_is_gone_and_the_others_stay(self, preset: str, term: str) -> None:
        policy = random_pairs()
        whole, part = slime(policy), bind(f"slime/{preset}", {})(policy)
        assert part.metrics[term].tolist() == [0] * 8
        torch.testing.assert_close(part.loss, whole.loss - whole.metrics[term], rtol=1e-12, atol=1e-15)

    def test_without_the_soft_margin_the_distance_is_the_hinge(self) -> None:
        # Delta = 1: relu(1.5 - 1) * 1.
        output = bind("slime/without-soft", {})(pairs_of([[-1.0]], [[-2.0]]))
        assert output.metrics["loss/distance"].item() == pytest.approx(0.5)

    def test_without_the_hard_margin_the_distance_is_the_sigmoid(self) -> None:
        # Delta = 1: 1 * sigma(0). Delta = 3, past the hard margin: sigma(-5), where the paper has 0.
        function = bind("slime/without-hard", {})
        assert function(pairs_of([[-1.0]], [[-2.0]])).metrics["loss/distance"].item() == pytest.approx(0.5)
        far = function(pairs_of([[-1.0]], [[-4.0]])).metrics["loss/distance"].item()
        assert far == pytest.approx(1 / (1 + torch.tensor(5.0, dtype=torch.float64).exp().item()))

    @pytest.mark.parametrize("exponent", [1, 1.5, 2, 2.5, 3])
    def test_exponents(self, exponent: float) -> None:
        # One token with softplus(-l_t - 1.25) = log(1 + e^0.75).
        output = bind(f"slime/exponent-{exponent}", {})(pairs_of([[-1.0]], [[-2.0]]))
        raised = torch.log1p(torch.tensor(0.75, dtype=torch.float64).exp()).item() ** exponent
        assert output.metrics["loss/rejected"].item() == pytest.approx(0.1 * raised, rel=1e-12)


class TestNames:
    @pytest.mark.parametrize("name", NAMES)
    def test_a_preset_is_its_objective_with_those_options(self, name: str) -> None:
        base, _, preset = name.partition("/")
        options = dict(PRESETS[base][preset])
        assert options.keys() <= hyperparameters(LOSSES[base].function).keys()
        assert bind(name, {}).keywords == bind(base, options).keywords  # type: ignore[attr-defined]
        assert find_objective(name) == LOSSES[base]._replace(preset=PRESETS[base][preset])

    def test_the_papers_preset_is_the_defaults(self) -> None:
        policy = random_pairs()
        assert bind("slime/paper", {})(policy).loss.tolist() == slime(policy).loss.tolist()

    def test_options_come_on_top(self) -> None:
        keywords = bind("slime/without-hard", {"exponent": 3, "hard_gate": "softplus"}).keywords  # type: ignore[attr-defined]
        assert keywords == {"hard_gate": "softplus", "exponent": 3.0}

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("slime/witout-hard", "did you mean 'slime/without-hard'"),
            ("slime/author-code", "did you mean 'slime/authors-code'"),
            ("slime/", "unknown loss 'slime/'"),
            ("dpo/paper", "unknown loss 'dpo/paper'"),
            ("without-hard", "did you mean 'slime/without-hard'"),
        ],
    )
    def test_an_unknown_preset_is_named_with_the_nearest_one(self, name: str, hint: str) -> None:
        with pytest.raises(InputError, match=hint):
            bind(name, {})
