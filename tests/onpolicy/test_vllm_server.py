"""A vLLM server as the engine that samples: what it is sent, and what is refused before a model loads."""

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimepo.errors import InputError
from slimepo.model.adapters import add_adapter, lora_config, merge
from slimepo.onpolicy.rewards import Prompt
from slimepo.onpolicy.settings import Rollouts
from slimepo.onpolicy.vllm import VLLMServer, check_server, open_engine
from tests.tiny import tiny_model


class Server:
    """Answers as `vllm serve` does, and keeps what it was sent; `folder` holds the model that it serves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.takes_weights = folder, True
        self.asked: list[tuple[str, Any]] = []
        self.weights: dict[str, torch.Tensor] = {}

    def answer(self, path: str, body: Any) -> Any:
        self.asked.append((path, body))
        if path == "/v1/models":
            return {"data": [{"id": "served", "root": str(self.folder), "max_model_len": 8}]}
        if path == "/v1/completions":
            # Out of order, and with a token whose log-prob it does not know.
            choices = [
                {
                    "index": i,
                    "token_ids": [5, 1] if i % 2 else [6, 7],
                    "logprobs": {"token_logprobs": [-0.5 - i, None]},
                }
                for i in range(len(body["prompt"]) * body["n"])
            ]
            return {"choices": choices[::-1]}
        if not self.takes_weights:
            return None
        if path == "/collective_rpc":
            self.weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
        return {}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Server, Rollouts]]:
    tiny_model(tied=True).save_pretrained(tmp_path / "served")
    made = Server(tmp_path / "served")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = made.answer(self.path, json.loads(sent) if sent else None)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield made, Rollouts(engine=f"http://127.0.0.1:{http.server_port}/", samples=2, max_new_tokens=4)
        http.shutdown()


def test_prompts_go_out_as_ids_and_answers_come_back_in_order(
    server: tuple[Server, Rollouts], tmp_path: Path
) -> None:
    made, settings = server
    engine = VLLMServer(settings, 8, tmp_path / "weights")
    prompts = [Prompt("a", [], {}, [2, 3]), Prompt("b", [], {}, [4])]
    first, second = engine.sample({1}, prompts, [0, 0])
    assert [each.token_ids for each in first + second] == [[6, 7], [5, 1], [6, 7], [5, 1]]
    assert [each.finished for each in first] == [False, True]
    assert [each.logps[0] for each in first + second if each.logps] == [-0.5, -1.5, -2.5, -3.5]
    assert all(each.logps and each.logps[1] != each.logps[1] for each in first + second)
    path, body = made.asked[-1]
    assert path == "/v1/completions"
    assert body["prompt"] == [[2, 3], [4]]
    given = {"model": "served", "n": 2, "max_tokens": 4, "stop_token_ids": [1], "ignore_eos": True}
    assert given.items() <= body.items()


def test_the_server_gets_the_weights_with_adapters_folded_in_and_the_policy_keeps_its_own(
    server: tuple[Server, Rollouts], tmp_path: Path
) -> None:
    made, settings = server
    policy = add_adapter(tiny_model(tied=True), lora_config(r=2, alpha=4, train_head=False))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    before = copy.deepcopy(policy.state_dict())
    VLLMServer(settings, 8, tmp_path / "weights").load(policy)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    expected = merge(copy.deepcopy(policy)).state_dict()
    # Head and embedding share a weight, and a server may hold a copy for each.
    assert made.weights.keys() == expected.keys() >= {"lm_head.weight", "model.embed_tokens.weight"}
    for name, value in expected.items():
        torch.testing.assert_close(made.weights[name], value, rtol=0, atol=0)
    # What was computed with the weights before counts no more, and the files are gone.
    assert made.asked[-1][0] == "/reset_prefix_cache"
    assert not (tmp_path / "weights").exists()


def test_a_head_of_its_own_is_refused_where_the_server_has_none(
    server: tuple[Server, Rollouts], tmp_path: Path
) -> None:
    policy = add_adapter(tiny_model(tied=True), lora_config(r=2, alpha=4, train_head=True))
    with pytest.raises(InputError, match="one weight for head and embedding, and the policy has two"):
        VLLMServer(server[1], 8, tmp_path / "weights").load(policy)


def test_weights_that_are_quantised_are_refused(server: tuple[Server, Rollouts], tmp_path: Path) -> None:
    policy = tiny_model(tied=True)
    policy.hf_quantizer = object()
    with pytest.raises(InputError, match="quantised cannot be handed to vLLM"):
        VLLMServer(server[1], 8, tmp_path / "weights").load(policy)


def test_a_server_that_takes_no_weights_or_is_not_there_is_refused(server: tuple[Server, Rollouts]) -> None:
    made, settings = server
    check_server(settings)
    made.takes_weights = False
    with pytest.raises(InputError, match="start it with VLLM_SERVER_DEV_MODE=1"):
        check_server(settings)
    with pytest.raises(InputError, match="start it with --max-model-len 9"):
        VLLMServer(settings, 9, Path("nowhere"))
    with pytest.raises(InputError, match="there is no vLLM server"):
        check_server(Rollouts(engine="http://127.0.0.1:9"))


def test_an_engine_in_process_is_not_shared_by_ranks(tmp_path: Path) -> None:
    given: dict[str, Any] = dict(context=8, dtype=torch.float32, seed=0, folder=tmp_path)
    with pytest.raises(InputError, match="there are 2 ranks: start a vllm serve"):
        open_engine(Rollouts(engine="vllm"), ranks=2, **given)
    assert open_engine(Rollouts(), ranks=2, **given) is None
