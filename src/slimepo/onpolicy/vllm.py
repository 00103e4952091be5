"""vLLM as the engine that samples, in this process or as a server; its weights are the policy's.

vLLM is imported when an engine in this process is first loaded. A server needs none of it here.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from slimepo.errors import InputError
from slimepo.files import write_json
from slimepo.model.adapters import checkpoint_weights
from slimepo.model.generate import Completion
from slimepo.model.load import load_config
from slimepo.model.logps import causal_lm
from slimepo.onpolicy.rewards import Prompt
from slimepo.onpolicy.settings import Rollouts
from slimepo.words import first_line

# Seconds for a server to say what it is. Weights and answers take as long as they take.
_PATIENCE = 30


@dataclass
class VLLM:
    """vLLM in this process, on the device of the model that trains.

    `context`: tokens of the longest prompt with its answer; `dtype`: what training computes in.
    """

    settings: Rollouts
    context: int
    dtype: torch.dtype
    seed: int
    _llm: Any = None
    # Whether the process belonged to a group before the engine made one.
    _grouped: bool = False

    @property
    def words(self) -> str:
        """What a run says of it."""
        repeats = not torch.cuda.is_available()
        return "answers come from vLLM in this process" + (
            "" if repeats else ": on a GPU this run need not repeat"
        )

    def load(self, model: nn.Module) -> None:
        """Give the engine the weights that `model` has now; the first time, make one of its kind.

        Raises:
            InputError: vLLM does not take such a model, or finds no room for it.
        """
        with _apart():
            if self._llm is None:
                self._llm = self._opened(causal_lm(model))
            self._llm.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": iter(checkpoint_weights(model).items())}
            )
            self._llm.reset_prefix_cache()

    def sample(
        self, end_ids: Collection[int], prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """Answers with their log-probs; draws go by the first of the seeds, for vLLM draws for a batch at a time."""
        from vllm import SamplingParams

        if not prompts:
            return []
        asked = SamplingParams(**sampling_parameters(self.settings, end_ids), detokenize=False)
        with _apart():
            torch.manual_seed(seeds[0])
            outputs = self._llm.generate(
                [{"prompt_token_ids": prompt.ids} for prompt in prompts], asked, use_tqdm=False
            )
        return [
            [
                _completion(
                    list(said.token_ids),
                    [step[token].logprob for token, step in zip(said.token_ids, said.logprobs, strict=True)],
                    end_ids,
                )
                for said in output.outputs
            ]
            for output in outputs
        ]

    def close(self) -> None:
        """Let the engine go, with its memory and what it has set up in this process; `load` would make another."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory, destroy_model_parallel

        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        if not self._grouped:
            cleanup_dist_env_and_memory()
            return
        # The group is training's, or another engine's.
        destroy_model_parallel()
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def _opened(self, inner: Any) -> Any:
        self._grouped = torch.distributed.is_initialized()
        # One process: weights are handed over as they are, and there is nothing to start or to be left behind.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # It warns at each handing over of what has no weights, such as rotary embeddings.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        share = self.settings.vllm_gpu_memory_utilization
        device = inner.get_input_embeddings().weight.device
        with tempfile.TemporaryDirectory() as folder:
            # A config is all that an engine needs of the model: its weights come from the policy.
            architecture = {"architectures": [type(inner).__name__]}
            write_json(Path(folder) / "config.json", inner.config.to_dict() | architecture)
            try:
                return vllm.LLM(
                    model=folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    dtype=self.dtype,
                    seed=self.seed % 2**32,
                    max_model_len=self.context,
                    max_num_seqs=self.settings.batch_rows,
                    **(on_cpu(share) if device.type == "cpu" else {"gpu_memory_utilization": share}),
                )
            except Exception as error:
                # Of what a model, a device or its memory lack, vLLM speaks in many kinds of errors.
                said = " ".join(str(error).split())[:300]
                raise InputError(f"rollouts: vLLM cannot be started for this model: {said}") from error


@dataclass
class VLLMServer:
    """A `vllm serve` at `url`. Weights reach it by way of `folder`, which it must see under the same name.

    `context`: tokens of the longest prompt with its answer.

    Raises:
        InputError: it is not there, or serves no answers of that length.
    """

    settings: Rollouts
    context: int
    folder: Path
    url: str = field(init=False)
    model: str = field(init=False)
    tied: bool = field(init=False)

    words = "answers come from a vLLM server, which draws by a seed of its own: this run does not repeat"

    def __post_init__(self) -> None:
        self.url = self.settings.engine.rstrip("/")
        served = call(self.url, "/v1/models", timeout=_PATIENCE)["data"][0]
        self.model = served["id"]
        if (served.get("max_model_len") or self.context) < self.context:
            raise InputError(
                f"rollouts: the longest prompt and its answer may have {self.context} tokens, and {self.url} serves "
                f"{served['max_model_len']}: start it with --max-model-len {self.context}, or lower max_new_tokens"
            )
        self.tied = bool(load_config(served["root"]).get_text_config().tie_word_embeddings)

    def load(self, model: nn.Module) -> None:
        """Give the server the weights that `model` has now.

        Raises:
            InputError: it does not take them.
        """
        inner = causal_lm(model)
        apart = inner.get_output_embeddings().weight is not inner.get_input_embeddings().weight
        if apart and self.tied:
            raise InputError(
                f"rollouts: the model that {self.url} serves has one weight for head and embedding, and the policy "
                "has two: train without the head (lora: {train_head: false}), or sample with engine: vllm"
            )
        # Tied weights by each of their names: vLLM may hold a copy for each, and renews what it is given.
        weights = {
            name: each.to("cpu", copy=True).contiguous() for name, each in checkpoint_weights(model).items()
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(weights, self.folder / "model.safetensors")
            path = str(self.folder.absolute())
            call(self.url, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        call(self.url, "/reset_prefix_cache", {})

    def close(self) -> None:
        """Nothing: the server goes on."""

    def sample(
        self, end_ids: Collection[int], prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """Answers with their log-probs; the server knows no seeds."""
        if not prompts:
            return []
        asked = {
            "model": self.model,
            "prompt": [prompt.ids for prompt in prompts],
            "return_token_ids": True,
            **sampling_parameters(self.settings, end_ids),
        }
        choices = call(self.url, "/v1/completions", asked)["choices"]
        flat = [
            _completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], end_ids)
            for choice in sorted(choices, key=lambda choice: choice["index"])
        ]
        count = self.settings.samples
        return [flat[start : start + count] for start in range(0, len(flat), count)]


def on_cpu(share: float) -> dict[str, Any]:
    """What vLLM is to do otherwise on a CPU, where its cache takes the share of the memory."""
    import psutil  # which vLLM needs itself

    # vLLM would count what training holds in this process as its own. Compiling takes longer than most runs would gain.
    return {"kv_cache_memory_bytes": int(share * psutil.virtual_memory().total), "enforce_eager": True}


@contextmanager
def _apart() -> Iterator[None]:
    """Inside, the random draws and the precision of training are left alone: vLLM in this process has its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(), torch.autocast(device, enabled=False):
        yield


def sampling_parameters(settings: Rollouts, end_ids: Collection[int]) -> dict[str, Any]:
    """What vLLM is asked for. What a model's own generation config has beside that is overruled: no policy has it."""
    return {
        "n": settings.samples,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(end_ids),
        # These alone end an answer, as they do elsewhere.
        "ignore_eos": True,
        # Of the token itself, and of no other.
        "logprobs": 0,
    }


def open_engine(
    settings: Rollouts, *, context: int, dtype: torch.dtype, seed: int, folder: Path, ranks: int = 1
) -> VLLM | VLLMServer | None:
    """What writes the answers in place of the model that trains, where that is asked for.

    context: tokens of the longest prompt with its answer; dtype: what training computes in; folder: where weights may
    pass through.

    Raises:
        InputError: the server is not there, or several ranks are to share an engine in one process.
    """
    if settings.engine == "transformers":
        return None
    if settings.engine != "vllm":
        check_server(settings)
        return VLLMServer(settings, context, folder)
    if ranks > 1:
        raise InputError(
            f"rollouts: engine: vllm serves the process that it is in, and there are {ranks} ranks: start a vllm serve "
            "and give its address"
        )
    return VLLM(settings, context, dtype, seed)


def check_server(settings: Rollouts) -> None:
    """Nothing, where the server that `settings.engine` names is there and takes weights.

    Raises:
        InputError: it is not.
    """
    url = settings.engine.rstrip("/")
    try:
        call(url, "/server_info?config_format=json", timeout=_PATIENCE)
    except InputError as error:
        if " 404" in str(error):
            raise InputError(
                f"rollouts: the vLLM server at {url} takes no weights: start it with VLLM_SERVER_DEV_MODE=1 in its "
                "environment"
            ) from error
        raise


def call(url: str, path: str, body: Any = None, timeout: float | None = None) -> Any:
    """What a server answers, from JSON: to a GET, or with a body to a POST.

    Raises:
        InputError: it is not there, or refuses.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode(errors="replace").split())[:300]
        raise InputError(
            f"rollouts: the vLLM server at {url} answers {path} with {error.code}: {said}"
        ) from error
    except OSError as error:
        raise InputError(f"rollouts: there is no vLLM server at {url}: {first_line(error)}") from error
    return json.loads(text) if text.strip() else None


def _completion(ids: list[int], logps: Sequence[float | None], end_ids: Collection[int]) -> Completion:
    return Completion(
        ids, bool(ids) and ids[-1] in end_ids, [math.nan if each is None else each for each in logps]
    )
