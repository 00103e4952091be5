"""Training on the policy's own samples: by hand, however a step is laid out, and the same again after a kill."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimepo.data.batch import collate
from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.losses import Objective, count, slime, step_loss
from slimepo.model.adapters import lora_config
from slimepo.model.generate import completion_text, generate
from slimepo.onpolicy.rollouts import sample_seed
from slimepo.onpolicy.vllm import VLLM
from slimepo.training.config import PreferenceConfig
from slimepo.training.rollouts import sampled
from slimepo.training.step import output_of
from slimepo.training.trainer import PreferenceTrainer
from slimepo.types import LossOutput, SampleLogps
from tests.losses.problems import pairs_of, sigmoid
from tests.tiny import letter_tokenizer, random_rows, tiny_model
from tests.training.rank_worker import price, prompts, vowels


def trainer(
    folder: Path, rows: Any = None, reward: Any = vowels, cost: Any = None, **options: Any
) -> PreferenceTrainer:
    rollouts = {"samples": 4, "max_new_tokens": 8} | options.pop("rollouts", {})
    values: dict[str, Any] = dict(
        output_dir=str(folder), loss="grpo", rollouts=rollouts, learning_rate=0.02, optim="sgd", logging_steps=1,
        save_strategy="no", max_steps=2, per_device_train_batch_size=3, disable_tqdm=True, max_grad_norm=0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    adapter = lora_config(4) if options.pop("peft_config", False) else None
    # Far from even, so that answers end and log-probs differ.
    model = tiny_model(initializer_range=0.3)
    return PreferenceTrainer(
        model=model,
        args=PreferenceConfig(**(values | options)),
        train_dataset=prompts(8) if rows is None else rows,
        processing_class=letter_tokenizer(),
        reward=reward,
        cost=cost,
        peft_config=adapter,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def weights(made: PreferenceTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def losses(made: PreferenceTrainer) -> list[float]:
    return [line["loss"] for line in made.state.log_history if "loss" in line]


def watched(made: PreferenceTrainer) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Weights before each step and its gradient, filled while it trains."""
    seen: list[tuple[dict[str, Tensor], Tensor]] = []
    step = made.training_step

    def spy(model: Any, inputs: Any, n: Any = None) -> Any:
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        loss = step(model, inputs, n)
        seen.append((before, torch.cat([p.grad.flatten() for p in model.parameters()])))
        return loss

    made.training_step = spy  # type: ignore[method-assign]
    return seen


class Untouched:
    """A transformers model of its own, in float64, that answers for samples as they stand in rollouts.jsonl."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.model = tiny_model(initializer_range=0.3)
        self.model.load_state_dict(state)
        self.model.double()
        self.tokenizer = letter_tokenizer()

    def logps(self, line: dict[str, Any], i: int) -> Tensor:
        logps, answer = self._read(line, i)
        return logps.gather(1, answer[:, None]).squeeze(1)

    def _read(self, line: dict[str, Any], i: int) -> tuple[Tensor, Tensor]:
        """Log-probs `[tokens, vocabulary]` before each token of an answer, and its ids."""
        row = next(row for row in prompts(8) if row["id"] == line["prompt"])
        prompt, answer = (
            self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(text))
            for text in (f"<bos>{row['prompt']}:", line["samples"][i] + "<end>" * line["finished"][i])
        )
        logits = self.model(input_ids=torch.tensor([prompt + answer])).logits[0]
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        return logits.log_softmax(-1)[places], torch.tensor(answer)

    def entropy(self, line: dict[str, Any], i: int) -> Tensor:
        logps, _ = self._read(line, i)
        return -(logps.exp() * logps).sum(-1)

    def all(self, given: Sequence[dict[str, Any]]) -> list[list[Tensor]]:
        return [[self.logps(line, i) for i in range(len(line["samples"]))] for line in given]


Samples = list[list[Tensor]]


def clipped(ratio: Tensor, advantage: Tensor | float) -> Tensor:
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def grpo_by_hand(now: Samples, then: Samples, start: Samples, rewards: Sequence[list[float]]) -> Tensor:
    """Token ratios, mean over tokens and then over responses, .3 times k3."""
    parts = []
    for group in range(len(rewards)):
        r = np.array(rewards[group])
        for i, advantage in enumerate((r - r.mean()) / (r.std(ddof=1) + 1e-4)):
            d = now[group][i] - start[group][i]
            ratio = (now[group][i] - then[group][i]).exp()
            parts.append((clipped(ratio, advantage) + 0.3 * ((-d).exp() - 1 + d)).mean())
    return torch.stack(parts).mean()


def rloo_by_hand(now: Samples, then: Samples, start: Samples, rewards: Sequence[list[float]]) -> Tensor:
    """One ratio a response, .1 times the sum of k1 in the reward."""
    parts = []
    for group in range(len(rewards)):
        r = [
            reward - 0.1 * (then[group][i] - start[group][i]).sum().item()
            for i, reward in enumerate(rewards[group])
        ]
        for i in range(len(r)):
            advantage = r[i] - (sum(r) - r[i]) / (len(r) - 1)
            parts.append(clipped((now[group][i] - then[group][i]).sum().exp(), advantage))
    return torch.stack(parts).mean()


def reinforce_by_hand(now: Samples, then: Samples, start: Samples, rewards: Sequence[list[float]]) -> Tensor:
    """Rewards to come at each token, less .1 k1 a token, whitened over the step; mean over tokens."""
    to_come, ratios = [], []
    for group in range(len(rewards)):
        for i, reward in enumerate(rewards[group]):
            penalty = 0.1 * (then[group][i] - start[group][i])
            to_come += [reward - penalty[t:].sum().item() for t in range(len(penalty))]
            ratios.append((now[group][i] - then[group][i]).exp())
    advantages = torch.tensor(to_come, dtype=torch.float64)
    white = (advantages - advantages.mean()) / advantages.std(correction=0)
    return clipped(torch.cat(ratios), white).mean()


class TestByHand:
    @pytest.mark.parametrize(
        ("loss", "by_hand", "options", "rollouts"),
        [
            ("grpo", grpo_by_hand, {"kl": 0.3}, {}),
            ("rloo", rloo_by_hand, {}, {"kl": 0.1}),
            ("reinforce_pp", reinforce_by_hand, {}, {"kl": 0.1}),
        ],
    )
    def test_loss_and_gradient_of_every_step(
        self, tmp_path: Path, loss: str, by_hand: Any, options: dict[str, Any], rollouts: dict[str, Any]
    ) -> None:
        """Of a first rollout, on which the policy moves in its second step, and of another one."""
        made = trainer(
            tmp_path, loss=loss, loss_options=options, max_steps=3, reference="copy",
            rollouts={"steps_per_rollout": 2, **rollouts},
        )  # fmt: skip
        seen = watched(made)
        made.train()
        start = Untouched(seen[0][0])
        for step, (before, gradient) in enumerate(seen):
            given = [line for line in lines(tmp_path) if line["step"] == step + 1]
            now, then = Untouched(before), Untouched(seen[step - step % 2][0])
            with torch.no_grad():
                known = [then.all(given), start.all(given)]
            value = by_hand(now.all(given), *known, [line["rewards"] for line in given])
            value.backward()
            expected = torch.cat([p.grad.flatten() for p in now.model.parameters()])
            assert losses(made)[step] == pytest.approx(value.item(), rel=1e-4, abs=1e-5)
            assert (gradient - expected).norm() < 1e-4 * expected.norm()
            assert expected.norm() > 1e-3

    def test_further_epochs_take_the_same_samples_and_the_policy_that_wrote_them(
        self, tmp_path: Path
    ) -> None:
        """Two mini-batches of one sampling, then both again; the last rollout is of the one that is left."""
        made = trainer(
            tmp_path, loss_options={"kl": 0.3}, max_steps=6, reference="copy",
            rollouts={"steps_per_rollout": 2, "epochs": 2},
        )  # fmt: skip
        seen = watched(made)
        made.train()
        assert [line["step"] for line in lines(tmp_path)] == [1] * 3 + [2] * 3 + [5] * 2
        assert len({line["prompt"] for line in lines(tmp_path)}) == 8
        start = Untouched(seen[0][0])
        for step, first, batch in ((1, 0, 1), (2, 0, 0), (3, 0, 1), (4, 4, 4), (5, 4, 4)):
            given = [line for line in lines(tmp_path) if line["step"] == batch + 1]
            now, then = Untouched(seen[step][0]), Untouched(seen[first][0])
            with torch.no_grad():
                known = [then.all(given), start.all(given)]
            value = grpo_by_hand(now.all(given), *known, [line["rewards"] for line in given])
            value.backward()
            expected = torch.cat([p.grad.flatten() for p in now.model.parameters()])
            assert losses(made)[step] == pytest.approx(value.item(), rel=1e-4, abs=1e-5)
            assert (seen[step][1] - expected).norm() < 1e-4 * expected.norm()

    def test_ppo_learns_four_times_from_a_rollout_and_holds_values_near_those_of_its_time(
        self, tmp_path: Path
    ) -> None:
        made = trainer(
            tmp_path, loss="ppo", max_steps=8, rollouts={"value": {"learning_rate": 1e-2, "clip": 0.01}}
        )
        made.train()
        assert {line["step"] for line in lines(tmp_path)} == {1, 5}
        log = made.state.log_history[:8]
        # What is aimed at is measured from the values of the time of sampling, which the clip holds to as well.
        errors = [line["value/error"] for line in log]
        assert errors == pytest.approx([errors[0]] * 4 + [errors[4]] * 4)
        assert ["reward" in line for line in log] == [True, False, False, False] * 2
        assert log[0]["ratio"] == pytest.approx(1, abs=1e-6)
        assert abs(log[3]["ratio"] - 1) > 1e-6

    def test_an_epoch_of_the_run_samples_every_prompt_once(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, max_steps=-1, num_train_epochs=1, rollouts={"epochs": 2})
        made.train()
        assert made.state.global_step == 2 * 3
        assert made.state.epoch == 1
        assert sorted(line["prompt"] for line in lines(tmp_path)) == [f"p{i}" for i in range(8)]

    def test_a_users_own_objective_on_samples(self, tmp_path: Path) -> None:
        (tmp_path / "own.py").write_text(
            "from slimepo.types import LossOutput, SampleLogps\n"
            "def loss(policy: SampleLogps, advantages):\n"
            "    return LossOutput(-advantages * policy.logps.where(policy.mask, 0).sum(-1), {})\n"
        )
        made = trainer(
            tmp_path, loss=f"{tmp_path}/own.py:loss", max_steps=1, rollouts={"advantages": "centered"}
        )
        seen = watched(made)
        made.train()
        now, parts = Untouched(seen[0][0]), []
        for line in lines(tmp_path):
            r = np.array(line["rewards"])
            parts += [(-(r[i] - r.mean()) * now.logps(line, i).sum()).item() for i in range(4)]
        assert losses(made)[0] == pytest.approx(np.mean(parts), rel=1e-4)

    def test_what_it_asks_for_comes_by_response(self) -> None:
        """A number of a row, one of each response, and one of each token; position after position."""
        asked: dict[str, Tensor] = {}

        def own(policy: SampleLogps, weight: Any, worth: Any, advantages: Any) -> LossOutput:
            asked.update(weight=weight, worth=worth, advantages=advantages)
            return LossOutput(policy.logps.sum(-1), {})

        ids = [np.arange(1, n + 1, dtype=np.int32) for n in (2, 1, 1, 2)]
        rows = [
            Row(
                ids[0],
                tuple(ids[2 * i : 2 * i + 2]),
                {
                    "weight": float(i),
                    "worth": np.array([10.0 * i, 10.0 * i + 1], dtype=np.float32),
                    "advantages": tuple(each.astype(np.float32) for each in ids[2 * i : 2 * i + 2]),
                },
            )
            for i in range(2)
        ]
        batch = collate(rows, (0, 1))
        output_of(Objective(own, positions=None), own, torch.zeros(6), batch, None, None)
        assert asked["weight"].tolist() == [0, 1, 0, 1]
        assert asked["worth"].tolist() == [0, 10, 1, 11]
        assert asked["advantages"].tolist() == [[1, 2], [1, 0], [1, 0], [1, 2]]

    def test_rewards_are_of_what_was_sampled(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, max_steps=1)
        made.train()
        for line in lines(tmp_path):
            assert line["rewards"] == vowels([], line["samples"], {})
            assert len(set(line["samples"])) > 1
        log = made.state.log_history[0]
        assert log["reward"] == pytest.approx(np.mean([line["rewards"] for line in lines(tmp_path)]))
        assert {
            "ratio",
            "clipped",
            "reward/std",
            "reward/equal",
            "sampled/tokens",
            *(f"time/{part}" for part in ("sample", "reward", "score", "train")),
        } <= log.keys()
        assert log["sampled/total"] == sum(sum(line["tokens"]) for line in lines(tmp_path))

    @pytest.mark.parametrize("pairs", ["best-worst", "right-wrong"])
    def test_online_slime_is_slime_on_the_best_against_the_worst(self, tmp_path: Path, pairs: str) -> None:
        made = trainer(tmp_path, loss="slime", max_steps=1, rollouts={"pairs": pairs, "temperature": 0.9})
        seen = watched(made)
        made.train()
        now, chosen, rejected = Untouched(seen[0][0]), [], []
        for line in lines(tmp_path):
            r, texts = line["rewards"], line["samples"]
            best, worst = ([i for i in range(4) if r[i] == bound(r)] for bound in (max, min))
            if max(r) == min(r):
                continue
            cut = slice(None, 1 if pairs == "best-worst" else None)
            both = [(b, w) for b in best[cut] for w in worst[cut] if texts[b] != texts[w]]
            chosen += [now.logps(line, b).tolist() for b, _ in both]
            rejected += [now.logps(line, w).tolist() for _, w in both]
        policy = pairs_of(chosen, rejected)
        assert len(chosen) >= 2
        assert losses(made)[0] == pytest.approx(step_loss(slime(policy), count(policy)).item(), rel=1e-5)

    def test_online_dpo_begins_at_log_2_and_leaves_it(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, loss="dpo", reference="copy", rollouts={"steps_per_rollout": 2})
        made.train()
        first, second = losses(made)
        assert first == pytest.approx(math.log(2), abs=1e-6)
        assert second != pytest.approx(math.log(2), abs=1e-6)

    def test_xpo_sets_samples_against_those_of_the_reference(self, tmp_path: Path) -> None:
        made = trainer(
            tmp_path, loss="xpo", loss_options={"alpha": 0.05, "beta": 0.5}, reference="copy", max_steps=4,
            learning_rate=0.1,
        )  # fmt: skip
        seen = watched(made)
        made.train()
        start = Untouched(seen[0][0])
        for step, (before, _) in enumerate(seen):
            now, parts = Untouched(before), []
            for line in (line for line in lines(tmp_path) if line["step"] == step + 1):
                other = {"prompt": line["prompt"]} | line["against"]
                for i in range(4):
                    own, theirs = line["rewards"][i], other["rewards"][i]
                    if own == theirs or not line["samples"][i] or not other["samples"][i]:
                        continue
                    ours, known = (
                        [model.logps(each, i).sum().item() for each in (line, other)]
                        for model in (now, start)
                    )
                    ratios = [a - b for a, b in zip(ours, known, strict=True)]
                    won, lost = ratios if own > theirs else ratios[::-1]
                    parts.append(-math.log(sigmoid(0.5 * (won - lost))) + 0.05 * ours[1])
            assert len(parts) > 3
            assert losses(made)[step] == pytest.approx(np.mean(parts), rel=1e-4)
        # The reference says at the end what it said at the start: a function of the seed alone.
        assert made.rollouts is not None
        line, asked = lines(tmp_path)[-1], [prompt.id for prompt in made.train_dataset]
        item = asked.index(line["prompt"])
        (again,) = generate(
            start.model.float(), [made.train_dataset[item].ids], end_token_ids=made.rollouts.end_ids,
            max_new_tokens=8, temperature=1.0, samples=4, seed=sample_seed(0, 3, item, "opponent"),
        )  # fmt: skip
        texts = [completion_text(start.tokenizer, completion) for completion in again]
        assert texts == line["against"]["samples"]

    def test_nash_md_goes_by_what_is_preferred_to_a_mixture(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, loss="nash_md", reference="copy", learning_rate=0.1)
        seen = watched(made)
        made.train()
        start, now, parts = Untouched(seen[0][0]), Untouched(seen[1][0]), []
        for line in (line for line in lines(tmp_path) if line["step"] == 2):
            for i in range(4):
                chance = np.mean(
                    [sigmoid(line["rewards"][i] - other) for other in line["against"]["rewards"]]
                )
                logp, known = (model.logps(line, i).sum().item() for model in (now, start))
                parts.append(-(chance - 0.5) * logp + 0.1 * (logp - known) ** 2 / 2)
        assert losses(made)[1] == pytest.approx(np.mean(parts), rel=1e-4)
        assert 0 < made.state.log_history[1]["preferred"] < 1

    def test_an_opponent_without_adapters_needs_no_second_model(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, loss="xpo", learning_rate=1.0, rollouts={"samples": 2}, peft_config=True)
        assert made.reference is not None
        assert made.reference.source == "adapters-off"
        made.train()
        assert any(line["samples"] != line["against"]["samples"] for line in lines(tmp_path))

    @pytest.mark.parametrize("point", [True, False])
    def test_kto_judges_each_sample_by_the_mean_of_its_group(self, tmp_path: Path, point: bool) -> None:
        made = trainer(
            tmp_path, loss="kto", loss_options={"beta": 0.5, "reference_point": point}, reference="copy",
            learning_rate=0.5,
        )  # fmt: skip
        seen = watched(made)
        made.train()
        start, now, judged = Untouched(seen[0][0]), Untouched(seen[1][0]), []
        for line in (line for line in lines(tmp_path) if line["step"] == 2):
            mean = np.mean(line["rewards"])
            for i in range(4):
                if line["rewards"][i] != mean and line["samples"][i]:
                    ratio = (now.logps(line, i).sum() - start.logps(line, i).sum()).item()
                    judged.append((ratio, line["rewards"][i] > mean))
        assert 0 < sum(good for _, good in judged) < len(judged)
        # The mean log-ratio of the policy's own samples is an estimate of its KL to the reference.
        z0 = max(0.0, np.mean([ratio for ratio, _ in judged])) if point else 0.0
        by_hand = [sigmoid(-0.5 * (ratio - z0) * (1 if good else -1)) for ratio, good in judged]
        assert losses(made)[0] == pytest.approx(0.5, abs=1e-6)
        assert losses(made)[1] == pytest.approx(np.mean(by_hand), rel=1e-4)

    def test_pairs_too_are_learnt_from_again(self, tmp_path: Path) -> None:
        made = trainer(tmp_path, loss="dpo", reference="copy", learning_rate=0.2, rollouts={"epochs": 2})
        made.train()
        first, second = losses(made)
        assert first == pytest.approx(math.log(2), abs=1e-6)
        assert second < first - 0.01
        assert {line["step"] for line in lines(tmp_path)} == {1}


class TestFigures:
    """Held to a model that nothing is installed on, at samples as they stand in rollouts.jsonl."""

    @pytest.mark.parametrize("steps_per_rollout", [1, 2])
    def test_entropy_and_distance_from_the_start(self, tmp_path: Path, steps_per_rollout: int) -> None:
        rollouts = {"watch_kl": True, "steps_per_rollout": steps_per_rollout}
        made = trainer(tmp_path, max_steps=4, learning_rate=0.3, rollouts=rollouts)
        seen = watched(made)
        made.train()
        start = Untouched(seen[0][0])
        for step, log in enumerate(made.state.log_history[:4]):
            given = [line for line in lines(tmp_path) if line["step"] == step + 1]
            then = Untouched(seen[step - step % steps_per_rollout][0])
            with torch.no_grad():
                apart = [then.logps(line, 0) - start.logps(line, 0) for line in given]
                entropy = torch.cat([then.entropy(line, i) for line in given for i in range(4)])
            assert log["sampled/kl"] == pytest.approx(torch.cat(apart).mean().item(), rel=1e-4, abs=1e-6)
            assert log["sampled/entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
            assert log["reward"] == pytest.approx(np.mean([line["rewards"] for line in given]))
        assert log["sampled/kl"] > 0.01

    @pytest.mark.parametrize(
        ("options", "source"),
        [
            ({}, None),
            ({"rollouts": {"watch_kl": True}}, "copy"),
            ({"peft_config": True}, "adapters-off"),
            ({"loss": "dpo"}, "copy"),
            ({"loss": "rloo", "rollouts": {"kl": 0.1}}, "copy"),
        ],
    )
    def test_no_second_model_is_held_to_be_looked_at_unless_asked(
        self, tmp_path: Path, options: dict[str, Any], source: str | None
    ) -> None:
        made = trainer(tmp_path, max_steps=1, **options)
        assert (made.reference.source if made.reference else None) == source
        made.train()
        assert ("sampled/kl" in made.state.log_history[0]) == (source is not None)


class TestEngine:
    @pytest.mark.parametrize("breaks", [False, True])
    def test_an_engine_in_this_process_is_let_go_when_training_ends(
        self, tmp_path: Path, breaks: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []

        def sample(self: VLLM, ends: Any, prompts: Any, seeds: Any) -> Any:
            calls.append("sample")
            if breaks:
                raise MemoryError
            return sampled(made.model, ends, self.settings, prompts, seeds)

        monkeypatch.setattr(VLLM, "load", lambda self, model: calls.append("load"))
        monkeypatch.setattr(VLLM, "sample", sample)
        monkeypatch.setattr(VLLM, "close", lambda self: calls.append("close"))
        made = trainer(tmp_path, max_steps=2)
        assert made.rollouts is not None
        made.rollouts.engine = VLLM(made.rollouts.settings, 64, torch.float32, 0)
        if breaks:
            with pytest.raises((InputError, MemoryError)):
                made.train()
        else:
            made.train()
        assert calls == ["load", "sample"] * (1 if breaks else 2) + ["close"]


class TestLayout:
    """How a step is cut up changes nothing, nor how many answers are written side by side."""

    @pytest.mark.parametrize(
        ("loss", "rollouts"), [("grpo/dapo", {}), ("reinforce_pp", {"kl": 0.1}), ("slime", {})]
    )
    def test_any_layout_ends_in_the_same_weights(
        self, tmp_path: Path, loss: str, rollouts: dict[str, Any]
    ) -> None:
        found = []
        for number, options in enumerate(
            (
                {"layout": "padded", "per_device_train_batch_size": 8},
                {"layout": "padded", "per_device_train_batch_size": 1, "pairs_per_step": 8},
                {"layout": "packed", "per_device_train_batch_size": 3, "pairs_per_step": 8},
                {"layout": "shared", "max_tokens_per_batch": 60, "pairs_per_step": 8},
            )
        ):
            made = trainer(
                tmp_path / str(number), loss=loss, rollouts={"steps_per_rollout": 2, **rollouts}, **options
            )
            made.train()
            found.append((losses(made), weights(made), lines(tmp_path / str(number))))
        for loss_of, weights_of, lines_of in found[1:]:
            assert loss_of == pytest.approx(found[0][0], rel=1e-4, abs=1e-6)
            torch.testing.assert_close(weights_of, found[0][1], rtol=1e-4, atol=1e-5)
            assert lines_of == found[0][2]

    def test_samples_are_the_same_whatever_else_is_sampled_beside_them(self, tmp_path: Path) -> None:
        for rows in (1, 5, 256):
            trainer(tmp_path / str(rows), max_steps=1, rollouts={"batch_rows": rows}).train()
        first, *others = (lines(tmp_path / str(rows)) for rows in (1, 5, 256))
        assert others == [first, first]

    def test_every_step_and_every_prompt_has_samples_of_its_own(self, tmp_path: Path) -> None:
        rows = [{"prompt": "same"}] * 3
        trainer(tmp_path, rows=rows, learning_rate=0.0, max_steps=2).train()
        found = [tuple(line["samples"]) for line in lines(tmp_path)]
        assert len(found) == len(set(found)) == 6


# Of eight prompts in steps of 3, 3 and 2: the first step is on one side of it, the other two together on the other.
LIMIT = 3.55


class TestCosts:
    @pytest.mark.parametrize("gate", ["answer", "batch"])
    def test_rewards_are_those_less_the_penalty(self, tmp_path: Path, gate: str) -> None:
        """The batch gate goes by the mean of two rollouts, of 3, 3 and 2 prompts in turn."""
        cost = {"limit": LIMIT, "weight": 0.5, "gate": gate} | ({"window": 2} if gate == "batch" else {})
        made = trainer(tmp_path, cost=price, max_steps=5, rollouts={"cost": cost})
        made.train()
        steps = [[line for line in lines(tmp_path) if line["step"] == n + 1] for n in range(5)]
        costs = [np.array([line["costs"] for line in step]) for step in steps]
        gates = []
        for n, step in enumerate(steps):
            assert costs[n].tolist() == [price([], line["samples"], {"id": line["prompt"]}) for line in step]
            mean = np.concatenate(costs[max(0, n - 1) : n + 1]).mean()
            above = np.maximum(costs[n] - LIMIT, 0) if gate == "answer" else (mean > LIMIT) * costs[n]
            worth = np.array([line["parts"]["vowels"] for line in step])
            assert np.array([line["rewards"] for line in step]) == pytest.approx(worth - 0.5 * above)
            log = made.state.log_history[n]
            assert log["sampled/cost"] == pytest.approx(costs[n].mean())
            assert log["reward/vowels"] == pytest.approx(worth.mean())
            assert log.get("sampled/cost/window", mean) == pytest.approx(mean)
            gates.append(mean > LIMIT)
        assert len(set(gates)) == 2

    def test_a_cost_that_fails_ends_the_run_with_its_row(self, tmp_path: Path) -> None:
        def picky(prompt: Any, texts: Sequence[str], row: Any) -> list[float]:
            return [math.inf for _ in texts]

        made = trainer(tmp_path, cost=picky, rollouts={"cost": {"limit": 1, "weight": 1}})
        with pytest.raises(InputError, match=r"cost 'picky' gave \[inf.* on row p\d: every cost is a finite"):
            made.train()


class TestResume:
    @pytest.mark.parametrize(
        ("loss", "rollouts", "whole"),
        [
            ("grpo", {}, 1),
            ("grpo", {"steps_per_rollout": 2}, 2),
            ("ppo", {"epochs": 2, "value": {"learning_rate": 1e-2}}, 2),
            ("slime", {"admit": {"thresholds": [0, 0.3, 2], "share": 0.5}}, 1),
            ("rloo", {"cost": {"limit": LIMIT, "weight": 0.1, "window": 3}}, 1),
        ],
    )
    def test_after_a_kill_the_weights_are_those_of_the_whole_run(
        self, tmp_path: Path, loss: str, rollouts: dict[str, Any], whole: int
    ) -> None:
        options: dict[str, Any] = dict(
            max_steps=6, save_strategy="steps", save_steps=1, optim="adamw_torch", learning_rate=1e-2,
            loss=loss, rollouts=rollouts, cost=price if "cost" in rollouts else None,
        )  # fmt: skip
        straight = trainer(tmp_path / "whole", **options)
        straight.train()
        calls = []

        def dying(*given: Any) -> list[float]:
            calls.append(given)
            # In the fifth step: every mini-batch asks for 3, 3 and 2 prompts of 8 in turn.
            if len(calls) > (3 + 3 if loss == "ppo" else 3 + 3 + 2 + 3):
                raise KeyboardInterrupt
            return vowels(*given)

        # Parts of a reward stand in the file under its name.
        dying.__name__ = "vowels"
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / "cut", reward=dying, **options).train()
        kept = sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*"))
        assert kept == [f"checkpoint-{step}" for step in range(1, 5) if step % whole == 0]
        again = trainer(tmp_path / "cut", **options)
        # The reward that ended the run is another function.
        again.train(resume_from_checkpoint=True, accept=["source"])
        assert torch.equal(weights(again), weights(straight))
        assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
        windows = [made.state.log_history[4].get("sampled/cost/window") for made in (again, straight)]
        assert windows[0] == windows[1]
        assert ("cost" in rollouts) == (windows[0] is not None)
        if loss == "ppo":
            critics = [made.rollouts.critic.model.state_dict() for made in (again, straight)]  # type: ignore[union-attr]
            assert all(torch.equal(value, critics[1][name]) for name, value in critics[0].items())
        totals = [made.state.log_history[5]["sampled/total"] for made in (again, straight)]
        assert totals == [sum(sum(line["tokens"]) for line in lines(tmp_path / "cut"))] * 2

    def test_a_checkpoint_of_an_epoch_waits_for_its_rollout(self, tmp_path: Path) -> None:
        # Three steps an epoch, two a rollout: the first epoch's is saved with step 4.
        trainer(tmp_path, max_steps=6, save_strategy="epoch", rollouts={"steps_per_rollout": 2}).train()
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


class TestNothingToLearn:
    @pytest.mark.parametrize(
        ("loss", "rollouts", "what"),
        [("slime", {}, "a pair"), ("grpo", {"skip_equal": True}, "an advantage")],
    )
    def test_a_step_without_rows_is_said_and_changes_nothing(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, loss: str, rollouts: dict[str, Any], what: str
    ) -> None:
        made = trainer(
            tmp_path,
            loss=loss,
            rollouts=rollouts,
            max_steps=1,
            reward=lambda prompt, texts, row: [1.0] * len(texts),
        )
        before = weights(made)
        made.train()
        assert f"step 1: none of its 3 prompts gave {what}; it trains on nothing" in caplog.text
        assert torch.equal(weights(made), before)
        assert losses(made) == [0]
        assert made.state.log_history[0]["reward/equal"] == 1

    def test_it_is_said_in_the_progress_too(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        trainer(
            tmp_path,
            loss="slime",
            max_steps=1,
            disable_tqdm=False,
            reward=lambda prompt, texts, row: [1.0] * 4,
        ).train()
        assert "step 1: none of its 3 prompts gave a pair" in capsys.readouterr().out

    def test_answers_that_reach_no_end_can_be_left_out(self, tmp_path: Path) -> None:
        """Their tokens are in no denominator: the loss is the mean over the others."""
        made = trainer(
            tmp_path, max_steps=1, rollouts={"skip_unfinished": True, "samples": 8, "max_new_tokens": 40}
        )
        seen = watched(made)
        made.train()
        now, parts = Untouched(seen[0][0]), []
        for line in lines(tmp_path):
            ended = [i for i in range(8) if line["finished"][i]]
            r = np.array(line["rewards"])[ended]
            for i in ended:
                logps = now.logps(line, i)
                advantage = (r[ended.index(i)] - r.mean()) / (r.std(ddof=1) + 1e-4) if len(r) > 1 else 0.0
                parts.append(clipped((logps - logps.detach()).exp(), advantage).mean())
        assert 3 < len(parts) < 24
        torch.stack(parts).mean().backward()
        expected = torch.cat([p.grad.flatten() for p in now.model.parameters()])
        assert (seen[0][1] - expected).norm() < 1e-4 * expected.norm()


class TestFailures:
    def test_a_reward_that_fails_ends_the_run_with_its_row(self, tmp_path: Path) -> None:
        def picky(prompt: Any, texts: Sequence[str], row: dict[str, Any]) -> list[float]:
            if row["id"] == "p5":
                raise ValueError("no such letter")
            return [0.0] * len(texts)

        made = trainer(tmp_path, reward=picky, max_steps=3)
        with pytest.raises(InputError, match="reward 'picky' fails on row p5: ValueError: no such letter"):
            made.train()

    def test_one_that_ends_the_process_is_one_that_fails(self, tmp_path: Path) -> None:
        def leaving(prompt: Any, texts: Sequence[str], row: dict[str, Any]) -> list[float]:
            raise SystemExit(3)

        for timeout in (None, 5):
            made = trainer(tmp_path, reward=leaving, rollouts={"timeout": timeout})
            with pytest.raises(InputError, match=r"reward 'leaving' fails on row p\d: SystemExit: 3"):
                made.train()

    def test_or_the_row_is_left_out_and_its_line_says_why(self, tmp_path: Path) -> None:
        def picky(prompt: Any, texts: Sequence[str], row: dict[str, Any]) -> list[float]:
            return [math.nan] if row["id"] == "p5" else vowels(prompt, texts, row)

        trainer(tmp_path, reward=picky, max_steps=3, rollouts={"on_error": "skip"}).train()
        (skipped,) = (line for line in lines(tmp_path) if "skipped" in line)
        assert skipped["prompt"] == "p5"
        assert skipped["rewards"] == [None] * 4
        assert "1 numbers for 4 completions" in skipped["skipped"]

    def test_several_rewards_with_weights(self, tmp_path: Path) -> None:
        def short(prompt: Any, texts: Sequence[str], row: Any) -> list[float]:
            return [-float(len(text)) for text in texts]

        trainer(tmp_path, reward={"vowels": vowels, "short": (short, 0.5)}, max_steps=1).train()
        for line in lines(tmp_path):
            by_hand = [a + 0.5 * b for a, b in zip(*line["parts"].values(), strict=True)]
            assert line["rewards"] == pytest.approx(by_hand)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"reward": None}, "rollouts need a reward"),
            ({"reward": 3}, "is not a function"),
            ({"cost": vowels}, "a cost has a limit: give rollouts"),
            ({"rollouts": {"cost": {"limit": 1, "weight": 1}}}, "rollouts need a cost: a function"),
            ({"cost": 3, "rollouts": {"cost": {"limit": 1, "weight": 1}}}, "is not a function"),
            ({"reward": [vowels, vowels]}, "two rewards have the same name"),
            ({"rows": []}, "there is no prompt"),
            ({"rows": [{"prompt": "a"}, {"question": "b"}]}, "row 1 has no prompt"),
            ({"rows": random_rows(2)}, "row 0 has no prompt"),
            ({"loss": "dpo", "reference": "cache"}, "rollouts make them: use 'copy'"),
            ({"reference": "copy"}, "reads no reference model"),
        ],
    )
    def test_what_cannot_work_is_refused_before_a_step(
        self, tmp_path: Path, given: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            trainer(tmp_path, **given)

    def test_none_given_are_those_of_the_defaults_and_none_at_all_samples_nothing(
        self, tmp_path: Path
    ) -> None:
        for given in ({}, "{}"):
            asked = PreferenceConfig(output_dir=str(tmp_path), loss="dpo", rollouts=given).sampling
            assert asked is not None
            assert asked.samples == 8
        assert PreferenceConfig(output_dir=str(tmp_path), loss="dpo").sampling is None

    def test_a_monitor_without_pairs_is_said_and_settings_of_it_refused(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert trainer(tmp_path).monitor is None
        assert "no monitor: answers are sampled, and there are no held-out pairs to watch" in caplog.text
        for settings in ({"every": 3}, {"on_unlearning": "stop"}):
            with pytest.raises(
                InputError, match="it watches held-out pairs where answers are sampled: give eval"
            ):
                trainer(tmp_path, monitor=settings)

    def test_a_reward_without_rollouts_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="give rollouts in the config"):
            PreferenceTrainer(
                tiny_model(), PreferenceConfig(output_dir=str(tmp_path)), random_rows(2), reward=vowels
            )

    def test_a_reference_for_the_penalty_alone_may_be_another_model(self, tmp_path: Path) -> None:
        made = PreferenceTrainer(
            tiny_model(),
            PreferenceConfig(output_dir=str(tmp_path), loss="rloo", rollouts={"samples": 2, "kl": 0.1}),
            prompts(8),
            processing_class=letter_tokenizer(),
            reward=vowels,
            ref_model=tiny_model(seed=1),
        )
        assert made.reference is not None
        assert made.reference.reason == "a frozen model"

    def test_pairs_to_evaluate_on_are_refused_where_samples_are_read(self, tmp_path: Path) -> None:
        rows: list[Row] = random_rows(2)
        with pytest.raises(InputError, match="has no value 'advantages'"):
            trainer(tmp_path).evaluate(rows)
