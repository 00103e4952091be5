"""What makes a run the run that a checkpoint is of."""

from pathlib import Path

import numpy as np
import pytest
import torch

from slimepo.checkpoints.identity import (
    differences,
    refuse_differences,
    row_digest,
    rows_digest,
    source_digest,
    weights_digest,
)
from slimepo.data.rows import Row
from slimepo.errors import InputError
from slimepo.imports import find_function
from slimepo.losses import slime


def row(*tokens: int, **values: float) -> Row:
    ids = np.array(tokens, dtype=np.int32)
    return Row(ids[:1], (ids[1:2], ids[2:]), dict(values), id=str(tokens))


def test_rows_are_known_by_their_tokens_and_values_and_their_order_by_itself() -> None:
    one, two = row(1, 2, 3), row(4, 5, 6)
    names = rows_digest(map(row_digest, [one, two]))
    turned = rows_digest(map(row_digest, [two, one]))
    assert differences(names, turned) == {"row_order": "the rows stand in another order"}
    assert differences(names, rows_digest(map(row_digest, [row(1, 2, 9), two]))).keys() == {
        "rows",
        "row_order",
    }
    assert row_digest(row(1, 2, 3, weight=0.5)) != row_digest(one)
    assert row_digest(Row(one.prompt_ids, one.responses, {"reference": 1.0}, "other")) == row_digest(one)


def test_a_users_source_counts_and_slimepos_own_is_its_version(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def loss(logps):\n    return 1\n")
    before = source_digest(find_function(f"{file}:loss", "loss"))
    file.write_text("def loss(logps):\n    return 2\n\n")
    after = source_digest(find_function(f"{file}:loss", "loss"))
    assert None not in (before, after)
    assert before != after
    assert source_digest(slime) is None
    assert source_digest(len) is None


def test_weights_of_another_model_have_another_name() -> None:
    one, two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    assert weights_digest(one.named_parameters()) == weights_digest(one.named_parameters())
    assert weights_digest(one.named_parameters()) != weights_digest(two.named_parameters())


def test_what_is_not_accepted_by_its_name_is_refused_with_all_the_others() -> None:
    found = differences({"seed": 1, "world_size": 2, "rows": "a"}, {"seed": 1, "world_size": 1, "rows": "b"})
    refuse_differences(found, ["rows", "world_size"], "it is of another run", "leave it")
    with pytest.raises(InputError) as caught:
        refuse_differences(found, ["seed"], "it is of another run", "leave it")
    said = str(caught.value)
    assert "the rows are others" in said
    assert "world_size was 2, is now 1" in said
    assert "--accept rows --accept world_size" in said
