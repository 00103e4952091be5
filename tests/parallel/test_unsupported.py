"""Kinds of parallelism that are refused by name."""

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.parallelism_config import ParallelismConfig
from transformers.distributed import DistributedConfig

from slimepo.errors import InputError
from slimepo.parallel.unsupported import refuse_unsupported
from slimepo.training.config import PreferenceConfig

TENSOR = DistributedConfig(tp_size=2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"parallelism": ParallelismConfig(tp_size=2)}, "parallelism_config asks for tensor parallelism (tp_size)"),
        ({"parallelism": ParallelismConfig(cp_size=2)}, "context parallelism (cp_size)"),
        ({"parallelism": ParallelismConfig(dp_shard_size=2, dp_replicate_size=2)}, "(HSDP)"),
        ({"loading": {"tp_plan": "auto"}}, "model_init_kwargs asks for tensor parallelism (tp_plan)"),
        ({"loading": {"distributed_config": TENSOR}}, "distributed_config in model_init_kwargs asks for tensor"),
        ({"loading": {"distributed_config": DistributedConfig(pp_size=2)}}, "pipeline parallelism"),
        ({"loading": {"distributed_config": DistributedConfig(fsdp_size=2, ep_size=2)}}, "expert parallelism"),
        ({"environment": {"ACCELERATE_USE_MEGATRON_LM": "true"}}, "Megatron-LM"),
        (
            {"environment": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_SP_SIZE": "4"}},
            "accelerate's parallelism_config asks for sequence parallelism (sp_size)",
        ),
        ({"model": SimpleNamespace(config=SimpleNamespace(distributed_config=TENSOR))}, "the model's"),
    ],
    ids=str,
)  # fmt: skip
def test_it_is_named_with_its_place_and_the_way_out(given: dict[str, Any], words: str) -> None:
    asked = {"parallelism": None, "loading": {}, "environment": {}} | given
    with pytest.raises(InputError) as refused:
        refuse_unsupported(**asked)
    assert words in str(refused.value)
    assert "leave it out" in str(refused.value)


def test_sizes_of_one_ask_for_nothing() -> None:
    environment = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "1"}
    refuse_unsupported(ParallelismConfig(), {"revision": "main"}, environment)


def test_a_config_is_refused_before_a_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(InputError, match="Megatron-LM"):
        PreferenceConfig()
