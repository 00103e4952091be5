"""A forecast set against what a run did to pairs of a file."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from benchmarks.displacement import main
from slimepo.data.rows import Row
from slimepo.plan.displacement import forecast
from tests.tiny import letter_tokenizer, tiny_model


def test_of_a_data_set_pairs_are_cut_as_the_run_cut_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, trained = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    for model, folder in ((start, tmp_path / "start"), (trained, tmp_path / "run" / "dpo" / "model")):
        model.save_pretrained(folder)
        letter_tokenizer().save_pretrained(folder)
    recipe = {
        "seed": 3,
        "pairs": {},
        "data": {"max_length": 8, "cut_long_responses": True},
        "stages": [{"name": "dpo", "loss": "dpo", "learning_rate": 1e-5, "part": "preference"}],
    }
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "run" / "dpo" / "stage.json").write_text(json.dumps({"base": str(tmp_path / "start")}))
    texts = [("abcd"[: 1 + i % 4], "defghijklm"[i:] + "z", "no"[: 1 + i % 2]) for i in range(9)]
    told = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))

    main([str(tmp_path / "run"), "--pairs", str(tmp_path / "pairs.jsonl"), "--gradient-pairs", "7",
          "--out", str(tmp_path / "out.csv")])  # fmt: skip

    # The same from ids put together here: <bos>, the prompt, ":", then an answer with <end>, 8 tokens in all.
    tokenizer = letter_tokenizer()

    def row(prompt: str, *answers: str) -> Row:
        ids = tokenizer("<bos>" + prompt + ":")["input_ids"]
        cut = [np.array(tokenizer(a + "<end>")["input_ids"][: 8 - len(ids)], np.int32) for a in answers]
        return Row(np.array(ids, np.int32), tuple(cut))

    def chosen(model: torch.nn.Module, of: Row) -> float:
        ids = torch.from_numpy(np.concatenate([of.prompt_ids, of.responses[0]])).long()
        logps = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        return float(logps[len(of.prompt_ids) - 1 :].mean())

    rows = [row(*each) for each in texts]
    with torch.no_grad():
        change = np.array([chosen(trained.eval(), each) - chosen(start.eval(), each) for each in rows])
    with (tmp_path / "out.csv").open() as file:
        (found,) = csv.DictReader(file)
    assert (found["objective"], found["seed"], found["pairs"], found["gradient_pairs"]) == (
        "dpo",
        "3",
        "9",
        "7",
    )
    assert float(found["chosen_change"]) == pytest.approx(change.mean(), abs=1e-6)
    assert float(found["fell"]) == (change < 0).mean()
    expected = forecast(start, rows, 7)
    assert float(found["ches"]) == pytest.approx(spearmanr(expected.ches, change).statistic)
    there = ~np.isnan(expected.ratio)
    assert float(found["ratio"]) == pytest.approx(spearmanr(expected.ratio[there], change[there]).statistic)
    assert "| dpo, 1e-05 | 1 |" in capsys.readouterr().out
