"""What the monitor measures on a model, against plain sums over its own logits and the paper's gradients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from slimepo.data.batch import StepCollator
from slimepo.data.rows import Row
from slimepo.model.adapters import lora_config
from slimepo.model.logps import install_logps
from slimepo.model.tryout import choose_layout
from slimepo.monitor.displacement import SideScores
from slimepo.monitor.probe import (
    end_token,
    entanglement,
    gradient_share,
    greedy_answers,
    prompts_for,
    sample,
    score_sample,
)
from tests.tiny import random_rows, tiny_model


class TestSample:
    def test_it_is_a_function_of_content_and_seed(self) -> None:
        rows = random_rows(40)
        ids = [row.id for row in sample(rows, 8, 0)]
        assert ids == [row.id for row in sample(rows[::-1], 8, 0)]
        assert ids != [row.id for row in sample(rows, 8, 1)]
        assert len(sample(rows, 100, 0)) == 40

    def test_judged_rows_are_counted_by_their_chosen_answers(self) -> None:
        """Every other row has a chosen answer here; however rare they are, no more than four times as many rows."""
        judged = [
            replace(row, responses=(row.responses[0][:0], row.responses[1]) if at % 2 else row.responses[:1])
            for at, row in enumerate(random_rows(80))
        ]
        found = sample(judged, 10, 0)
        assert sum(len(row.responses[0]) > 0 for row in found) == 10 < len(found)
        assert len(sample([replace(row, responses=()) for row in judged], 10, 0)) == 40

    def test_prompts_differ(self) -> None:
        rows = random_rows(60)
        found = prompts_for([*rows, *rows], 4, 0)
        assert len({row.prompt_ids.tobytes() for row in found}) == len(found) == 4
        assert prompts_for(rows, 0, 0) == []

    def test_the_end_token_is_what_answers_end_in(self) -> None:
        def row(*last: int) -> Row:
            w, l = (np.array([5, 6, token], dtype=np.int32) for token in last)  # noqa: E741
            return Row(w[:1], (w, l), id="row")

        assert end_token([row(1, 1), row(1, 9)]) == 1
        assert end_token([row(1, 2), row(3, 4)]) is None
        assert end_token([]) is None


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("adapter", [False, True])
def test_scores_are_those_of_the_models_own_logits(layout: str, adapter: bool) -> None:
    from peft import get_peft_model

    model = tiny_model()
    if adapter:
        # An adapter on the head, which then is no plain matrix.
        model = get_peft_model(model, lora_config(4, target_modules=["q_proj", "lm_head"], train_head=False))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    install_logps(model)
    choose_layout(model, layout)
    rows = random_rows(7)
    rows[2] = replace(rows[2], responses=rows[2].responses[:1])
    chosen, rejected = score_sample(model, rows, StepCollator(3, layout=layout))  # type: ignore[arg-type]
    model.eval()
    for row, w, l, entropy, top1 in zip(  # noqa: E741
        rows, chosen.logps, rejected.logps, chosen.entropy, chosen.top1, strict=True
    ):
        for answer, logps in ((row.response(0), w), (row.response(1), l)):
            assert len(logps) == len(answer)
            if len(answer):
                table = _table(model, row, answer)
                np.testing.assert_allclose(logps, table[np.arange(len(answer)), answer], atol=2e-5)
        table = _table(model, row, row.responses[0])
        np.testing.assert_allclose(entropy, -(np.exp(table) * table).sum(-1), atol=1e-5)
        np.testing.assert_array_equal(top1, table.argmax(-1) == row.responses[0])


def _table(model: torch.nn.Module, row: Row, answer: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(np.concatenate([row.prompt_ids, answer]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
    table: np.ndarray = logits.double().log_softmax(-1).numpy()
    return table


class TestGradientShare:
    def side(self, *rows: list[float]) -> SideScores:
        arrays = [np.array(row) for row in rows]
        return SideScores(arrays, arrays, arrays)

    def test_it_is_that_of_the_papers_closed_form(self) -> None:
        """Appendix A, for one pair of two tokens a side: Delta = 1, softplus(0.75) at both rejected tokens."""
        raised, sigmoid = math.log1p(math.exp(0.75)), 1 / (1 + math.exp(-0.75))
        norms = {
            "chosen": 0.1 / 2 * math.sqrt(2),
            "rejected": 0.1 / 2 * 2.5 * raised**1.5 * sigmoid * math.sqrt(2),
            # u = 0.5, v = 0.5: dL/dDelta = -(0.5 + 2.5 * 0.5 * 0.25), half of it at each of four tokens.
            "distance": (0.5 + 2.5 * 0.5 * 0.25) / 2 * 2,
        }
        with torch.no_grad():
            found = gradient_share({}, self.side([-0.5, -1.5]), self.side([-2.0, -2.0]))
        assert found == pytest.approx(
            {name: norm / sum(norms.values()) for name, norm in norms.items()}, abs=1e-6
        )

    def test_a_term_that_is_switched_off_has_none(self) -> None:
        found = gradient_share({"rejected_weight": 0.0}, self.side([-1.0]), self.side([-2.0]))
        assert found is not None
        assert (found["rejected"], found["distance"] > 0) == (0, True)
        off = dict.fromkeys(("chosen_weight", "rejected_weight", "distance_weight"), 0.0)
        assert gradient_share(off, self.side([-1.0]), self.side([-2.0])) is None


class TestEntanglement:
    def test_equal_answers_are_wholly_entangled_and_no_gradient_is_left_behind(self) -> None:
        model = tiny_model()
        install_logps(model)
        rows = random_rows(3)
        rows[0] = replace(rows[0], responses=(rows[0].responses[0],) * 2)
        found = entanglement(model, rows)
        assert len(found) == 3
        assert found[0] == pytest.approx(1, abs=1e-4)
        assert all(p.grad is None for p in model.parameters())

    def test_it_is_the_product_of_the_gradients_over_the_smaller_square(self) -> None:
        from tests.model.test_logps import plain_logps

        model, (row,) = tiny_model(), random_rows(1)
        install_logps(model)
        gradients = []
        for position in (0, 1):
            parameters = list(model.parameters())
            grads = torch.autograd.grad(plain_logps(model, row, position).mean(), parameters)
            gradients.append(torch.cat([g.flatten() for g in grads]))
        w, l = gradients  # noqa: E741
        expected = float(w @ l / min(w @ w, l @ l))
        assert entanglement(model, [row]) == [pytest.approx(expected, rel=1e-3)]


def test_greedy_answers_are_counted_and_checked() -> None:
    model = tiny_model()
    install_logps(model)
    rows = prompts_for(random_rows(40), 3, 0)
    found = greedy_answers(model, rows, 1, 12, lambda ids: " ".join(map(str, ids)), lambda _, text: text > "")
    assert len(found["answers"]) == 3
    for answer in found["answers"]:
        assert answer["tokens"] == 12 or answer["finished"]
        assert answer["valid"] is answer["finished"]
    assert found["finished"] == pytest.approx(sum(a["finished"] for a in found["answers"]) / 3, abs=1e-6)
    silent = greedy_answers(model, rows, 1, 12, lambda ids: None, None)
    assert silent["valid"] is None
    assert all(a["text"] is None for a in silent["answers"])
