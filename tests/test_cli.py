"""The command line from outside: one-line errors, exit codes, a light start."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from slimepo.playground.tokenizer import build_tokenizer
from tests.command import slimepo
from tests.tiny import tiny_model


def in_a_process(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slimepo.cli", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with the world's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tiny_model(vocab_size=len(tokenizer), tied=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Add {i} and 2.", "chosen": str(i + 2), "rejected": str(i + 3)} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_light_start() -> None:
    check = "import sys, slimepo, slimepo.cli, slimepo.pipeline.recipe.read, slimepo.data.read, slimepo.data.split; "
    check += "sys.exit(str({'torch', 'transformers', 'datasets'} & {*sys.modules} or ''))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stderr.strip() == ""


def test_a_process_answers_prompts_from_standard_input(model: Path) -> None:
    result = in_a_process(
        "generate", "--model", model, "--max-new-tokens", 2, stdin="Add 1 and 2.\n\nAdd 2 and 2.\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("> Add") == 2
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("args.report_to=neptunes", "report_to: unknown tracker 'neptunes'"),
        ("args.optim=adamw_9bit", "adamw_9bit"),
        ("args.adam_beta2=7", "Invalid beta parameter"),
        ("args.gradient_accumulation_steps=4", "give batch_size"),
        ("args.precompute_ref_log_probs=true", "is a setting of TRL's"),
    ],
)
def test_arguments_that_cannot_be_are_one_line_before_a_model_is_loaded(
    model: Path, pairs: Path, tmp_path: Path, override: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("slimepo.pipeline.stage.stage_model", no_model)
    done = slimepo("train", "--model", model, "--data", pairs, "--out", tmp_path / "run", override)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr


def test_a_process_with_wrong_input_ends_with_2() -> None:
    result = in_a_process("run", "absent.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: recipe absent.yaml: No such file")


def test_help_and_version() -> None:
    for arguments in (
        ["--help"],
        ["run", "--help"],
        ["data", "check", "--help"],
        ["quickstart", "--help"],
        ["report", "--help"],
    ):
        result = slimepo(*arguments)
        assert result.returncode == 0
        assert "Usage" in result.stdout
    assert slimepo("--version").stdout.startswith("slimepo ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "absent.yaml"], "recipe absent.yaml: No such file"),
        (["plan", "absent.yaml"], "recipe absent.yaml: No such file"),
        (["train", "--model", "m", "--data", "absent.jsonl", "los=x"], "unknown key 'los'"),
        (["train", "--model", "m", "--data", "x", "--loss", "slme"], "did you mean 'slime'"),
        (["train", "--model", "m", "--data", "x", "loss_options.exponent=0"], "exponent = 0"),
        (["train", "--model", "m", "--data", "absent.jsonl", "--out", "TMP"], "model 'm' cannot be loaded"),
        (["quickstart", "preference.epoch=1"], "did you mean 'epochs'"),
        (["quickstart", "--objective", "dpoo"], "unknown loss 'dpoo'"),
        (["export", "nowhere", "TMP"], "nowhere: no such folder"),
        (["export", "nowhere", "TMP", "--bits", "5"], "--bits 5: give one of 8, 4, 3"),
        (["export", "nowhere", "TMP", "--prune", "1"], "--prune 1: give the share of weights that becomes 0"),
        (
            ["export", "nowhere", "TMP", "--prune", "nan"],
            "--prune nan: give the share of weights that becomes 0",
        ),
        (["report", "nowhere"], "report nowhere: no such folder"),
        (["report", "TMP", "--out", "page.html"], "no such folder"),
        (["generate", "hello", "--model", "no/where"], "no/where"),
        (["data", "check", "absent.jsonl", "--model", "no/where"], "absent.jsonl"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = slimepo(*(str(tmp_path / "out") if a == "TMP" else a for a in arguments))
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_debug_shows_the_traceback() -> None:
    result = slimepo("--debug", "run", "absent.yaml")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_plan(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ndata: {{path: absent.jsonl, max_length: 32}}\nstages: [{{loss: slime}}]\n"
    )
    shown = slimepo("plan", recipe)
    assert shown.returncode == 0, shown.stderr
    assert "largest max_tokens_per_batch" in shown.stdout
    result = slimepo("plan", recipe, "stages.slime.micro_batch_size=2", "--gpu", "h100", "--json")
    plan = json.loads(result.stdout)
    assert plan["device"]["name"] == "h100"
    assert plan["stages"][0]["pairs"] == 2
    assert slimepo("plan", recipe, "--gpu", "h1000").returncode == 2


def test_train_generate_and_export(model: Path, pairs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = slimepo("train", "--model", model, "--data", pairs, "--out", run, "batch_size=4", "adapter.r=2")
    assert result.returncode == 0, result.stderr
    assert f"model: {run / 'slime' / 'model'}" in result.stdout
    answers = tmp_path / "answers.jsonl"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Add 1 and 2.\nAdd 3 and 4.\n")
    result = slimepo(
        "generate", "--model", run / "slime", "--prompts", prompts, "--out", answers, "--max-new-tokens", 4
    )
    assert result.returncode == 0, result.stderr
    assert [len(json.loads(line)["answers"]) for line in answers.read_text().splitlines()] == [1, 1]
    result = slimepo("export", run / "slime", tmp_path / "exported")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "exported" / "model.safetensors").exists()
    assert slimepo("export", run / "slime", tmp_path / "exported").returncode == 2


def test_an_objective_in_the_folder_the_command_is_given_in(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from slimepo.types import LossOutput\n"
        "def gap(policy, reference=None, *, scale=1.0):\n"
        "    return LossOutput(scale * (policy.rejected.sum(-1) - policy.chosen.sum(-1)), {})\n"
        "def referring(policy, reference):\n"
        "    return LossOutput(policy.chosen.sum(-1) - reference.chosen.sum(-1), {})\n"
    )
    command = ["train", "--model", model, "--data", pairs, "batch_size=8", "max_steps=1", "adapter.r=2"]
    result = slimepo(*command, "--loss", "mine:gap", "--out", "run", "loss_options.scale=0.5")
    assert result.returncode == 0, result.stderr
    assert Path("run/gap/model/config.json").exists()
    result = slimepo(*command, "--loss", "mine:referring")
    assert result.returncode == 0, result.stderr
    assert "referring: reference adapters-off" in result.stdout


def test_help_names_every_objective() -> None:
    """Written out there, as the table of objectives stands behind an import of torch."""
    from slimepo import LOSSES, cli

    (option,) = get_type_hints(cli.train, include_extras=True)["loss"].__metadata__
    assert set(LOSSES) <= set(option.help.replace(",", "").split())


def test_no_prompt_is_said(model: Path) -> None:
    assert "no prompt" in slimepo("generate", "--model", model, stdin="").stderr


def test_data_check_counts_and_shows_trained_tokens(model: Path, pairs: Path) -> None:
    with pairs.open("a") as file:
        file.write(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n{broken\n")
    result = slimepo("data", "check", pairs, "--model", model)
    assert result.returncode == 2
    assert "pairs.jsonl:32" in result.stderr
    result = slimepo("data", "check", pairs, "--model", model, "--skip-bad-rows", "--show", 1)
    assert result.returncode == 0, result.stderr
    assert "identical responses" in result.stdout
    assert "<end>" in result.stdout


def test_data_check_that_keeps_no_row_ends_with_2_as_run_does(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "same.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    result = slimepo("data", "check", data, "--model", model)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"{data}: no row is left to train on (identical responses: 1)" in result.stderr
    assert "rows left out" in result.stdout


def test_a_column_is_mapped_or_left_out_as_in_a_recipe(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "other.jsonl"
    row = {"prompt": "a", "good": "b", "bad": "c", "label": 3}
    data.write_text(json.dumps(row) + "\n")
    columns = ["--column", "chosen=good", "--column", "rejected=bad"]
    for nothing in ("label=", "label=null"):
        result = slimepo("data", "check", data, "--model", model, *columns, "--column", nothing)
        assert result.returncode == 0, result.stderr
    basics = ("eval", "basics", "--model", model, "--data", data, "--samples", 0, *columns)
    result = slimepo(*basics, "--column", "label=")
    assert result.returncode == 0, result.stderr
    result = slimepo(*basics, "--column", "label=", "--format", "kto")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    for command in (basics, ("data", "check", data, "--model", model)):
        result = slimepo(*command, "--column", "question=prompt")
        assert "ours comes first: did you mean" not in result.stderr
        assert slimepo(*command, "--column", "goods=chosen").returncode == 2
    assert "'null=label': it is OURS=THEIRS" in slimepo(*basics, "--column", "null=label").stderr


@pytest.mark.parametrize("command", ["generate", "export", "eval"])
def test_a_stage_that_is_not_finished_a_run_and_a_folder_that_is_not_there_are_told_apart(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_hub() -> str:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("slimepo.hub._look", no_hub)
    run = tmp_path / "runs" / "mine"
    (run / "slime").mkdir(parents=True)
    (run / "slime" / "data.json").write_text("{}")
    (run / "recipe.yaml").write_text("{}")
    (run / ".slimepo-run").touch()
    monkeypatch.chdir(tmp_path)

    def said(name: str) -> str:
        arguments = {
            "generate": ["generate", "hello", "--model", name],
            "export": ["export", name, tmp_path / "out"],
            "eval": ["eval", "basics", "--model", name, "--data", "pairs.jsonl"],
        }
        (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
        result = slimepo(*arguments[command])
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        return result.stderr

    assert "stage slime is not finished: the command that began it goes on with it" in said("runs/mine/slime")
    assert "it is a run, and none of its stages is finished" in said("runs/mine")
    (run / "slime" / "stage.json").write_text("{}")
    assert "it is a run: give one of its stages, such as runs/mine/slime" in said("runs/mine")
    nearest = said("runs/mone")
    assert "no such folder" in nearest or "there is no file or folder runs/mone" in nearest
    assert "(did you mean 'mine'?)" in nearest


def test_a_bracket_that_the_shell_has_split_is_told(model: Path, pairs: Path) -> None:
    for command in ("train", "calibrate"):
        result = slimepo(
            command, "--model", model, "--data", pairs, "data.columns={prompt:", "Customer", "question}"
        )
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "quote the whole argument in the shell" in result.stderr
    result = slimepo("train", "--model", model, "--data", pairs, "data.columns={prompt: }x}")
    assert "quote the whole" not in result.stderr


def test_a_key_of_a_stage_is_told_by_the_name_of_the_stage(model: Path, pairs: Path) -> None:
    start = ("train", "--model", model, "--data", pairs)
    assert (
        "unknown key 'stages.slime.lerning_rate' (did you mean 'learning_rate'?)"
        in slimepo(*start, "stages.slime.lerning_rate=1").stderr
    )
    assert "learning_rate: " in slimepo(*start, "learning_rate=-1").stderr
    nothing = slimepo(*start, "max_steps=0").stderr
    assert "stages.slime.max_steps: 0 steps train nothing: give 1 or more, or leave it out" in nothing


def test_calibrate_says_how_columns_are_given_there(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "other.jsonl"
    data.write_text(json.dumps({"ask": "a", "good": "b", "bad": "c"}) + "\n")
    said = slimepo("calibrate", "--model", model, "--data", data).stderr
    assert "data.columns={prompt: THEIRS, ...}' after other commands" in said
    assert "data.columns=" in slimepo("calibrate", "--help").stdout


def test_help_waits_for_no_library_that_it_does_not_need() -> None:
    code = (
        "import sys, slimepo.cli; print(*{'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
