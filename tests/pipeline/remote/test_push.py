"""A model is pushed to the Hub when it is asked for, as an account that may, and never in the open by itself."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from slimepo.errors import InputError
from slimepo.pipeline.recipe.read import load_recipe
from slimepo.pipeline.remote.push import check_push, model_of, push_model
from slimepo.pipeline.run import run_recipe
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.terminal import make_console
from tests.command import slimepo

TOKEN = "hf_thisisnotarealtoken1234"


class Missing(RepositoryNotFoundError):
    def __init__(self) -> None:
        Exception.__init__(self, "404")


class Hub:
    """What HfApi is asked for; repositories by name with whether they are private, and the files in them."""

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, dict[str, str]] = {}
        self.down = False

    def whoami(self) -> dict[str, Any]:
        return {"name": "me", "orgs": [{"name": "lab"}]}

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.repositories.setdefault(name, private)
        return f"https://huggingface.co/{name}"

    def repo_info(self, name: str) -> Any:
        if name not in self.repositories:
            raise Missing
        return SimpleNamespace(private=self.repositories[name])

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.down:
            raise ConnectionError(f"no way through with token={TOKEN}")
        self.files[repo_id] = {
            str(path.relative_to(folder_path)): path.read_bytes().decode(errors="replace")
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr("slimepo.pipeline.remote.push.HfApi", lambda: made)
    monkeypatch.setattr("slimepo.pipeline.remote.push.offline", lambda: False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return made


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Any]:
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": f"Add {i} and 2.", "chosen": str(i + 2), "rejected": str(i + 3)} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"""
model: {{init: random, architecture: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,
        num_attention_heads: 2, num_key_value_heads: 2, head_dim: 8}}
tokenizer: {tmp_path / "tokenizer"}
data: {{path: {tmp_path / "pairs.jsonl"}}}
stages:
  - {{loss: slime, learning_rate: 1e-3, batch_size: 8, max_steps: 1, monitor: false}}
"""
    )
    return lambda *overrides, **given: load_recipe(tmp_path / "recipe.yaml", [*overrides], **given)


def run(recipe: Any, out: Path) -> None:
    run_recipe(recipe, out, make_console(quiet=True))


def test_the_last_stages_model_goes_to_a_private_repository_with_its_card(
    hub: Hub, recipe: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(recipe("push_to_hub=lab/tiny"), out)
    assert hub.repositories == {"lab/tiny": True}
    sent = hub.files["lab/tiny"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= sent.keys()
    assert sent["README.md"] == (out / "slime" / "model" / "README.md").read_text()
    # Nothing that is left, here or there, has the token.
    written = [path.read_bytes() for path in out.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in each for each in written)
    assert not any(TOKEN in each for each in sent.values())
    # Once is enough.
    hub.files.clear()
    run(recipe("push_to_hub=lab/tiny"), out)
    assert hub.files == {}


def test_a_push_that_fails_is_tried_again_by_the_same_command(hub: Hub, recipe: Any, tmp_path: Path) -> None:
    hub.down = True
    with pytest.raises(InputError, match="push_to_hub: lab/tiny: no way through"):
        run(recipe("push_to_hub=lab/tiny"), tmp_path / "run")
    hub.down = False
    run(recipe("push_to_hub=lab/tiny"), tmp_path / "run")
    assert "README.md" in hub.files["lab/tiny"]


def test_what_could_not_be_pushed_is_refused_before_it_trains(
    hub: Hub, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, words in (
        ("tiny", "'tiny' is no name of a repository: it has to be owner/name"),
        ("lab/ti ny", "is no name of a repository"),
        ("they/tiny", "the token is one of me, lab, not of they"),
    ):
        with pytest.raises(InputError, match=words):
            run(recipe(f"push_to_hub={name}"), tmp_path / "run")
    monkeypatch.setattr("slimepo.pipeline.remote.push.offline", lambda: True)
    with pytest.raises(InputError, match="the Hugging Face Hub cannot be reached"):
        check_push("lab/tiny")
    monkeypatch.setattr("slimepo.pipeline.remote.push.get_token", lambda: None)
    with pytest.raises(InputError, match="no token of the Hugging Face Hub: set HF_TOKEN"):
        run(recipe("push_to_hub=lab/tiny"), tmp_path / "run")
    assert not (tmp_path / "run" / "slime").exists()
    assert hub.repositories == {}


def test_several_seeds_want_a_name_each(recipe: Any) -> None:
    with pytest.raises(InputError, match=r"push_to_hub: several seeds would share one name.*\{seed\}"):
        recipe("push_to_hub=lab/tiny", "seeds=[1,2]")
    assert recipe("push_to_hub=lab/tiny-{seed}", "seeds=[1,2]").push_to_hub == "lab/tiny-{seed}"


def test_a_smoke_run_is_not_pushed(hub: Hub, recipe: Any, tmp_path: Path) -> None:
    run(recipe("push_to_hub=lab/tiny", smoke=True), tmp_path / "run")
    assert hub.repositories == {}


def test_a_public_repository_has_to_be_asked_for(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    hub.repositories |= {"me/open": False, "me/closed": True}
    with pytest.raises(InputError, match=r"^push_to_hub: me/open is there and public: .* --public"):
        push_model(tmp_path, "me/open")
    with pytest.raises(InputError, match=r"^push_to_hub: me/closed is there and private: .* leave --public"):
        push_model(tmp_path, "me/closed", public=True)
    assert hub.files == {}
    with pytest.raises(InputError, match="me/open is there and public"):
        check_push("me/open")
    check_push("me/new")
    push_model(tmp_path, "me/open", public=True)
    push_model(tmp_path, "me/new", public=True)
    assert hub.repositories["me/new"] is False


def test_the_command_takes_a_run_a_stage_or_a_model(hub: Hub, recipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(recipe(), out)
    for source in (out, out / "slime", out / "slime" / "model"):
        assert model_of(source) == out / "slime" / "model"
    result = slimepo("push", str(out), "me/tiny")
    assert (result.returncode, hub.repositories) == (0, {"me/tiny": True})
    assert "https://huggingface.co/me/tiny" in result.stdout
    result = slimepo("push", str(tmp_path / "tokenizer"), "me/tiny")
    assert result.returncode == 2
    assert "no exported model there" in result.stderr
