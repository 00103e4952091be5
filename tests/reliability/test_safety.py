"""Nothing that a folder or a file holds is run, and no secret is written anywhere."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM

from slimepo.pipeline.export import model_card, quoted
from slimepo.pipeline.recipe.read import load_recipe
from tests.command import Done, slimepo
from tests.evaluation.mock_judge import Fail, MockJudge, Say
from tests.reliability.fuzz import read_yaml, write_yaml
from tests.reliability.test_input import TRAIN, refused


class Payload:
    """A pickle that makes a file as it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path("payload-ran").absolute()),)


def nothing_ran() -> bool:
    return not Path("payload-ran").exists()


def test_the_payload_runs_where_nobody_looks(here: Path) -> None:
    torch.save(Payload(), "payload.bin")
    torch.load("payload.bin", weights_only=False)
    assert not nothing_ran()


@pytest.mark.case(
    22, "weights that are a pickle are refused, with the file's name and without reading it: exit 3"
)
@pytest.mark.parametrize(
    "command",
    [TRAIN, ("generate", "hello", "--model", "model"), ("export", "model", "out"),
     ("eval", "basics", "--model", "model", "--data", "pairs.jsonl")],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_model_that_is_a_pickle(here: Path, command: tuple[str, ...]) -> None:
    Path("model/model.safetensors").unlink()
    torch.save(Payload(), "model/pytorch_model.bin")
    refused(slimepo(*command), 3, "pytorch_model.bin", "safetensors")
    assert nothing_ran()


@pytest.mark.case(22, "an adapter that is a pickle is refused in the same way: exit 3")
def test_an_adapter_that_is_a_pickle(here: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(AutoModelForCausalLM.from_pretrained("model"), LoraConfig(r=2)).save_pretrained("adapter")
    Path("adapter/adapter_model.safetensors").unlink()
    torch.save(Payload(), "adapter/adapter_model.bin")
    refused(slimepo("generate", "hello", "--model", "adapter"), 3, "adapter_model.bin", "safetensors")
    assert nothing_ran()


@pytest.mark.case(
    22, "a pickle in place of a checkpoint's state is not executed when the run continues from it"
)
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_with_a_payload(here: Path, file: str) -> None:
    command = ["run", "recipe.yaml", "--out", "out", "stages.slime.max_steps=2", "stages.slime.save_every=1"]
    assert slimepo(*command).returncode == 0
    Path("out/slime/stage.json").unlink()
    for state in Path("out").rglob(file):
        torch.save(Payload(), state)
    done = slimepo(*command)
    assert done.returncode in (0, 3), done.stderr
    assert nothing_ran()


@pytest.mark.case(
    23,
    "a model that brings its own code is refused, and a `y` on standard input does not run it: exit 2 or 3",
)
@pytest.mark.parametrize(
    "command", [TRAIN, ("generate", "hello", "--model", "model"), ("plan", "recipe.yaml")], ids=lambda c: c[0]
)
def test_a_model_that_needs_its_own_code(here: Path, command: tuple[str, ...]) -> None:
    config = json.loads(Path("model/config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    }
    Path("model/config.json").write_text(json.dumps(config))
    Path("model/own.py").write_text("import os\nos.mkdir('payload-ran')\n")
    done = slimepo(*command, stdin="y\ny\ny\n")
    refused(done, done.returncode, "custom code")
    assert done.returncode in (2, 3)
    assert nothing_ran()


def test_a_tokenizer_that_needs_its_own_code(here: Path) -> None:
    config = json.loads(Path("model/tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    Path("model/tokenizer_config.json").write_text(json.dumps(config))
    Path("model/own.py").write_text("import os\nos.mkdir('payload-ran')\n")
    slimepo("data", "check", "pairs.jsonl", "--model", "model", stdin="y\ny\n")
    assert nothing_ran()


def test_a_recipe_s_tag_makes_no_object(here: Path) -> None:
    Path("recipe.yaml").write_text("model: !!python/object/apply:os.mkdir [payload-ran]\n")
    refused(slimepo("run", "recipe.yaml"), 2)
    assert nothing_ran()


# Secrets as they come: by a variable that is called so, by one that is not, in a recipe.
CANARIES = {
    "HF_TOKEN": "canary-environment-81",
    "MY_JUDGE": "canary-of-the-judge-82",
    "": "canary-in-the-recipe-83",
}


def told(done: Done, folder: Path) -> list[str]:
    """Where a canary sings: in what was printed, or in a file."""
    texts = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [
        f"{place}: {canary}"
        for place, text in texts.items()
        for canary in CANARIES.values()
        if canary.encode() in text
    ]


@pytest.mark.case(
    24, "no key or token appears in what a run, an evaluation, a report or a crash writes or prints"
)
def test_no_canary_sings(
    here: Path, data_dir: Path, mock: MockJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, canary in CANARIES.items():
        if name:
            monkeypatch.setenv(name, canary)
    run = ["run", "recipe.yaml", "--out", "out/run", "--debug"]
    done = slimepo(*run, f"stages.slime.args.hub_token={CANARIES['']}")
    assert done.returncode == 0, done.stderr
    assert told(done, here / "out") == []
    # Outlives the command that it was given to, as an export in a shell would.
    monkeypatch.setenv("HF_TOKEN", CANARIES["HF_TOKEN"])
    Path("own.py").write_text(
        "import os\n"
        "def loss(policy):\n"
        "    raise RuntimeError(os.environ['HF_TOKEN'] + ' Bearer ' + os.environ['MY_JUDGE'])\n"
    )
    crashed = slimepo(*run[:3], "out/crash", "stages.slime.loss=own.py:loss", "--debug")
    assert crashed.returncode == 2
    assert told(crashed, here / "out") == []
    reported = slimepo("report", "out/run", "--out", "out/page.html")
    assert reported.returncode == 0, reported.stderr
    assert told(reported, here / "out") == []
    questions = (data_dir / "mt_bench" / "question.jsonl").read_text().splitlines()[:2]
    answers = here / "out" / "eval" / "mt_bench" / "model_answer"
    answers.mkdir(parents=True)
    rows = [
        {"question_id": json.loads(q)["question_id"], "choices": [{"index": 0, "turns": ["a", "b"]}]}
        for q in questions
    ]
    (answers / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mock.script += [
        Say(f"{CANARIES['MY_JUDGE']} [[5]] Rating: [[5]]"),
        Fail(500, "key {key}"),
        Say(f"no rating, {CANARIES['MY_JUDGE']}"),
    ]
    command = [
        "eval",
        "mt-bench",
        "--model",
        "given",
        "--data-dir",
        data_dir,
        "--out",
        "out/eval",
        "--limit",
        2,
    ]
    judged = slimepo(
        *command, "--attempts", 1, "--concurrency", 1, "--key-variable", "MY_JUDGE", "--judge", mock.judge
    )
    assert CANARIES["MY_JUDGE"] in mock.keys
    assert judged.returncode == 6, judged.stderr
    assert told(judged, here / "out") == []


@pytest.mark.case(
    24, "a key in place of a variable's name or an address is refused without being repeated: exit 2"
)
@pytest.mark.parametrize(
    "given",
    [["--judge", "m@https://me:{key}@host/v1"], ["--judge", "m@https://host/v1?api_key={key}"],
     ["--judge", "m@https://host/v1", "--key-variable", "{key}"]],
)  # fmt: skip
def test_a_key_in_the_wrong_place(here: Path, data_dir: Path, given: list[str]) -> None:
    key = "sk-canary-84"
    arguments = [each.replace("{key}", key) for each in given]
    done = slimepo("eval", "mt-bench", "--model", "model", "--data-dir", data_dir, "--out", "out", *arguments)
    refused(done, 2)
    assert key not in done.stderr + done.stdout
    assert key not in "".join(map(str, here.rglob("*")))


def test_a_card_escapes_what_it_quotes(here: Path) -> None:
    recipe = read_yaml("recipe.yaml")
    recipe |= {"model": "a: b\n---\n<script>", "adapter": None}
    recipe["stages"][0]["name"] = "# [x](y) `<b>`"
    recipe["data"]["path"] = "``` <img src=x>"
    write_yaml(Path("recipe.yaml"), recipe)
    loaded = load_recipe("recipe.yaml")
    result = {"base": loaded.model, "steps": 1, "rows": 2, "trained_parameters": 3, "parameters": 4}
    card = model_card(loaded, loaded.stages[0], result)
    _, front, body = card.split("---\n", 2)
    # The Hub takes no card with a base_model that is none of its ids.
    assert "base_model" not in YAML(typ="safe").load(front)
    loaded = loaded.model_copy(update={"model": "some/model"})
    _, front, _ = model_card(loaded, loaded.stages[0], result).split("---\n", 2)
    assert YAML(typ="safe").load(front)["base_model"] == "some/model"
    assert "# `` # [x](y) `<b>` ``\n" in body
    assert "```` ``` <img src=x> ````" in body
    assert "\n````yaml\n" in body


def test_text_that_is_quoted_has_no_way_out() -> None:
    assert quoted("plain") == "`plain`"
    assert quoted("a`b\nc") == "`` a`b c ``"


def test_a_pickle_is_what_it_is_taken_for() -> None:
    assert b"mkdir" in pickle.dumps(Payload())
