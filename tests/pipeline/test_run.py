"""Whole pipelines on files: stages, resuming, kill -9, and what is left in the run folder."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from slimepo.errors import InputError, NonFiniteLossError
from slimepo.files import json_lines
from slimepo.model.score import PairScores
from slimepo.monitor.callback import DisplacementMonitor
from slimepo.pipeline.console import print_summary
from slimepo.pipeline.recipe.arguments import stage_arguments
from slimepo.pipeline.recipe.read import load_recipe
from slimepo.pipeline.recipe.schema import Recipe
from slimepo.pipeline.run import run_recipe, runs_of, unread
from slimepo.pipeline.stage import StageRows, stage_trainer
from slimepo.playground.tokenizer import build_tokenizer
from slimepo.playground.world import demonstrations, make_tasks
from slimepo.report.folders import read_source
from slimepo.report.page import write_report
from slimepo.settings import dump
from slimepo.terminal import make_console
from slimepo.training.trainer import PreferenceTrainer
from tests.command import slimepo
from tests.tiny import random_rows

CLI = [sys.executable, "-m", "slimepo.cli"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, a file of pairs and a recipe."""
    folder = tmp_path_factory.mktemp("world")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    tasks = make_tasks(240, seed=0)
    wrong = demonstrations(tasks, 1, right=0.0, slip_share=1.0, malformed_share=0.0)
    rows = [
        {"prompt": task.prompt, "chosen": task.gold, "rejected": row.chosen[0]["content"]}
        for task, row in zip(tasks, wrong, strict=True)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"""
model: {{init: random, architecture: llama, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 2, num_key_value_heads: 2, head_dim: 16, tie_word_embeddings: true}}
tokenizer: {folder / "tokenizer"}
adapter: {{r: 4}}
data:
  path: {folder / "pairs.jsonl"}
  parts: {{sft: 0.3, preference: 0.6, heldout: 0.1}}
stages:
  - {{loss: sft, learning_rate: 1e-2, epochs: 2, batch_size: 8, micro_batch_size: 3}}
  - {{loss: slime, learning_rate: 1e-3, batch_size: 8, args: {{logging_steps: 5}}}}
"""
    )
    return folder


def console() -> Console:
    return make_console(quiet=True)


def weights(run: Path, stage: str = "slime") -> dict[str, torch.Tensor]:
    return load_file(run / stage / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_recipe(load_recipe(world / "recipe.yaml"), out, console())
    return out


def test_the_run_folder_holds_everything(finished: Path) -> None:
    files = {".slimepo-run", ".lock", "recipe.yaml", "versions.json", "data.json", "status.json"}
    assert {p.name for p in finished.iterdir()} == files | {"sft", "slime"}
    for stage in ("sft", "slime"):
        names = {p.name for p in (finished / stage).iterdir()}
        base = {"base"} if stage == "sft" else set()
        files = {
            "certificate.json",
            "settings.json",
            "metrics.jsonl",
            "monitor.jsonl",
            "stage.json",
            "data.json",
            "distributions.json",
        }
        assert names == base | files | {"checkpoints", "model"}
        lines = [json.loads(line) for line in (finished / stage / "metrics.jsonl").read_text().splitlines()]
        assert lines[0]["step"] >= 1
        assert "logps/chosen" in lines[0]
        card = (finished / stage / "model" / "README.md").read_text()
        assert "nats per token" in card
        done = json.loads((finished / stage / "stage.json").read_text())
        assert min(done["times"][part] for part in ("set_up", "training", "monitor", "after")) > 0
        assert sum(done["times"].values()) - done["times"]["before"] == pytest.approx(
            done["seconds"], abs=0.4
        )
    parts = json.loads((finished / "data.json").read_text())["parts"]
    assert sum(part["rows"] for part in parts.values()) == 240
    assert all(part["fingerprint"] for part in parts.values())


def test_the_figures_are_of_held_out_pairs_before_and_after(finished: Path) -> None:
    sft, slime = (json.loads((finished / s / "stage.json").read_text()) for s in ("sft", "slime"))
    assert sft["heldout"]["after"] == pytest.approx(slime["heldout"]["before"], abs=1e-5)
    assert sft["heldout"]["after"]["logps/chosen"] > sft["heldout"]["before"]["logps/chosen"]
    assert slime["base"] == str((finished / "sft" / "model").resolve())
    assert slime["export_difference"] <= 1e-4


def test_the_report_reads_what_a_run_has_left(finished: Path) -> None:
    (record,) = read_source(finished).records
    stage = json.loads((finished / "slime" / "stage.json").read_text())
    assert record.after == stage["heldout"]["after"]
    assert record.state == "finished"
    assert record.peak_memory == stage["peak_memory"] > 10 * 2**20
    for side in (record.distributions["margin"].before, record.distributions["margin"].after):
        assert sum(side) == stage["heldout"]["pairs"]


def test_a_run_that_breaks_says_why_and_may_be_given_again(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    broken = load_recipe(
        world / "recipe.yaml", ["stages.slime.learning_rate=1e30", "stages.slime.args.max_grad_norm=0"]
    )
    with pytest.raises(NonFiniteLossError):
        run_recipe(broken, out, console())
    (record,) = read_source(out).records
    assert record.state == "failed"
    assert "not finite" in record.note
    run_recipe(load_recipe(world / "recipe.yaml"), out, console(), restart=True)
    assert read_source(out).records[0].state == "finished"


def test_so_does_one_that_runs_out_of_memory(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    monkeypatch.setattr(PreferenceTrainer, "training_step", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        run_recipe(load_recipe(world / "recipe.yaml"), tmp_path / "run", console())
    (record,) = read_source(tmp_path / "run").records
    assert record.state == "failed"
    assert "tried to allocate 2.00 GiB" in record.note


def test_all_held_out_pairs_have_the_monitor_s_last_word(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, float]] = []

    def conclude(self: DisplacementMonitor, before: PairScores, after: PairScores) -> None:
        asked.append((len(before.chosen), float((after.chosen - before.chosen).mean())))

    monkeypatch.setattr(DisplacementMonitor, "conclude", conclude)
    results = run_recipe(load_recipe(world / "recipe.yaml"), tmp_path / "run", console())
    for (pairs, change), result in zip(asked, results, strict=True):
        heldout = result["heldout"]
        assert pairs == heldout["pairs"]
        assert change == pytest.approx(heldout["after"]["logps/chosen"] - heldout["before"]["logps/chosen"])


def test_a_stage_that_breaks_hides_none_that_does_not_need_it(world: Path, tmp_path: Path) -> None:
    text = (world / "recipe.yaml").read_text()
    keys = "batch_size: 8, max_steps: 2"
    text += f"  - {{loss: slime, name: later, learning_rate: 1e-3, {keys}}}\n"
    text += f"  - {{loss: simpo, start: sft, learning_rate: 1e-3, {keys}}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    overrides = ["stages.slime.learning_rate=1e30", "stages.sft.max_steps=2", "seeds=[1, 2]"]
    shown = make_console(file=io.StringIO(), width=200)
    with pytest.raises(NonFiniteLossError):
        run_recipe(load_recipe(tmp_path / "recipe.yaml", overrides), tmp_path / "out", shown)
    for seed in (1, 2):
        run = tmp_path / "out" / f"seed-{seed}"
        assert (run / "simpo" / "stage.json").exists()
        assert not (run / "later").exists()
    assert "later: left out, for slime has no model" in shown.file.getvalue()


def test_seeds_are_runs_of_their_own_and_one_is_the_folder_itself(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    two = load_recipe(world / "recipe.yaml", ["seeds=[0, 3]"])
    assert [(run.seed, folder) for run, folder in runs_of(two, tmp_path)] == [
        (0, tmp_path / "seed-0"),
        (3, tmp_path / "seed-3"),
    ]
    # A seed that was done before is not run again, whatever became of the others.
    shutil.copytree(finished, tmp_path / "seed-0")
    results = run_recipe(two, tmp_path, console())
    assert [r["name"] for r in results] == ["sft", "slime"] * 2
    one, other = (weights(tmp_path / f"seed-{seed}") for seed in (0, 3))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    ((run, folder),) = runs_of(load_recipe(world / "recipe.yaml", ["seeds=[3]"]), tmp_path)
    assert (run.seed, folder) == (3, tmp_path)
    assert run == load_recipe(world / "recipe.yaml", ["seed=3"])


def test_done_stages_are_skipped(world: Path, finished: Path) -> None:
    before = (finished / "slime" / "stage.json").stat().st_mtime_ns
    results = run_recipe(load_recipe(world / "recipe.yaml"), finished, console())
    assert [r["name"] for r in results] == ["sft", "slime"]
    assert (finished / "slime" / "stage.json").stat().st_mtime_ns == before


def test_no_secret_reaches_a_file_or_the_console(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    canary, out = "CANARYcanary0123", tmp_path / "run"
    # Where the token goes; put back after the test.
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("WANDB_API_KEY", f"{canary}-of-wandb")
    secret = [f"stages.sft.args.hub_token=hf_{canary}", "stages.sft.args.run_name=trial"]
    run_recipe(load_recipe(world / "recipe.yaml", secret, smoke=True), out, make_console())
    assert os.environ["HF_TOKEN"] == f"hf_{canary}"
    # The run is the same one without the token, and its errors hold none.
    results = run_recipe(load_recipe(world / "recipe.yaml", smoke=True), out, make_console())
    assert len(results) == 2

    def fail(*_: object, **__: object) -> None:
        raise ValueError(f"cannot reach https://me:{canary}@host with {canary}-of-wandb")

    monkeypatch.setattr("slimepo.pipeline.run.run_stage", fail)
    with pytest.raises(ValueError, match="cannot reach"):
        run_recipe(load_recipe(world / "recipe.yaml", smoke=True), tmp_path / "other", make_console())
    write_report([out, tmp_path / "other"], tmp_path / "report.html")
    make_console().print(f"https://me:{canary}@host")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or canary.encode() not in path.read_bytes(), path
    assert canary not in capsys.readouterr().out
    odd = load_recipe(world / "recipe.yaml", [f"stages.sft.args.run_name=https://a:{canary}@h"])
    with pytest.raises(InputError, match=r"args.run_name holds a secret.* environment variable") as caught:
        run_recipe(odd, tmp_path / "third", make_console())
    assert canary not in str(caught.value)


def test_a_folder_of_another_recipe_is_refused(world: Path, finished: Path, tmp_path: Path) -> None:
    other = load_recipe(world / "recipe.yaml", ["seed=1"])
    with pytest.raises(InputError, match=r"another recipe \(\w+: seed was 0, is now 1\).*--restart"):
        run_recipe(other, finished, console())
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and no run"):
        run_recipe(other, tmp_path, console(), restart=True)


def test_a_run_that_failed_before_it_began_does_not_hold_its_folder(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match="no row of part"):
        run_recipe(load_recipe(world / "recipe.yaml", ["data.max_length=3"]), out, console())
    results = run_recipe(
        load_recipe(world / "recipe.yaml", ["stages.sft.max_steps=1"], smoke=True), out, console()
    )
    assert len(results) == 2


def test_a_stage_that_failed_before_its_first_checkpoint_does_not_hold_the_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def fail(*_: object, **__: object) -> None:
        raise InputError("no")

    with monkeypatch.context() as patch:
        patch.setattr("slimepo.pipeline.heldout.score_pairs", fail)
        with pytest.raises(InputError, match="no"):
            run_recipe(load_recipe(world / "recipe.yaml", smoke=True), out, console())
    assert (out / "sft" / "checkpoints").exists()
    assert len(run_recipe(load_recipe(world / "recipe.yaml", ["seed=1"], smoke=True), out, console())) == 2


def test_nothing_is_deleted_that_slimepo_did_not_write(world: Path, finished: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("recipe.yaml", "thesis.txt"):
        (mine / name).write_text("mine")
    recipe = load_recipe(world / "recipe.yaml", ["data.path=absent.jsonl"])
    for restart in (False, True):
        with pytest.raises(InputError):
            run_recipe(recipe, mine, console(), restart=restart)
    assert {p.name for p in mine.iterdir()} == {"recipe.yaml", "thesis.txt"}
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "notes.txt").write_text("mine")
    (copy / "figures").mkdir()
    run_recipe(load_recipe(world / "recipe.yaml", smoke=True), copy, console(), restart=True)
    assert (copy / "notes.txt").exists()
    assert (copy / "figures").exists()


def test_a_run_does_not_go_on_with_changed_data(world: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    shutil.copy(world / "pairs.jsonl", pairs)
    overrides, out = [f"data.path={pairs}"], tmp_path / "run"
    run_recipe(load_recipe(world / "recipe.yaml", overrides, smoke=True), out, console())
    shutil.rmtree(out / "slime")
    lines = pairs.read_text().splitlines(keepends=True)
    pairs.write_text("".join(lines[20:]))
    with pytest.raises(InputError, match=r"pairs.jsonl has changed since .* was begun"):
        run_recipe(load_recipe(world / "recipe.yaml", overrides, smoke=True), out, console())


def test_half_precision_weights_train_score_and_export(world: Path, tmp_path: Path) -> None:
    """What a GPU does by default, on the CPU: a bfloat16 base, float32 adapters and head, a float32 export."""
    sft = tmp_path / "one"
    run_recipe(load_recipe(world / "recipe.yaml", smoke=True), sft, console())
    overrides = [
        f"model={sft / 'sft' / 'model'}",
        "dtype=bfloat16",
        "adapter.r=4",
        "stages.slime.learning_rate=1e-12",
    ]
    recipe = load_recipe(world / "recipe.yaml", [*overrides, "stages.sft.learning_rate=1e-2"])
    sft_result, slime_result = run_recipe(recipe, tmp_path / "half", console())
    assert sft_result["heldout"]["after"]["logps/chosen"] > sft_result["heldout"]["before"]["logps/chosen"]
    still = slime_result["heldout"]
    assert still["after"] == pytest.approx(still["before"], abs=1e-6), (
        "nothing was trained, so nothing may move"
    )
    assert still["chosen_fell"] == 0
    assert {t.dtype for t in weights(tmp_path / "half").values()} == {torch.float32}


OF_DEEPSPEED = [pytest.mark.ranks, pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed")]


@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.ranks),
        *(pytest.param(name, marks=OF_DEEPSPEED) for name in ("zero2", "zero3")),
    ],
)
def test_the_guides_own_command_takes_the_same_steps_on_two_ranks(
    world: Path, finished: Path, tmp_path: Path, engine: str
) -> None:
    out = tmp_path / "ranks"
    command = [
        *CLI,
        "run",
        str(world / "recipe.yaml"),
        "--out",
        str(out),
        "--nproc",
        "2",
        f"parallel={engine}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    for stage in ("sft", "slime"):
        one, two = (json.loads((run / stage / "stage.json").read_text()) for run in (finished, out))
        assert two["steps"] == one["steps"]
        assert two["heldout"]["after"] == pytest.approx(one["heldout"]["after"], abs=1e-4)
        assert two["parameters"] == one["parameters"]
        assert two["trained_parameters"] == one["trained_parameters"]
    # What was exported is the whole model.
    exported = weights(out)
    for name, weight in weights(finished).items():
        torch.testing.assert_close(exported[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(name, marks=OF_DEEPSPEED) for name in ("zero2", "zero3"))]
)
@pytest.mark.ranks
@pytest.mark.timeout(1200)
def test_killed_with_weights_in_parts_the_same_command_ends_in_the_same_weights(
    world: Path, tmp_path: Path, engine: str
) -> None:
    def begin(out: Path, number: int) -> subprocess.Popen[bytes]:
        port = str(20000 + (os.getpid() * 3 + number) % 20000)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", port]
        command = [*launch, "-m", "slimepo.cli", "run", str(world / "recipe.yaml"), "--out", str(out)]
        return subprocess.Popen([*command, f"parallel={engine}"])

    undisturbed, out = tmp_path / "undisturbed", tmp_path / "killed"
    assert begin(undisturbed, 0).wait() == 0
    process, deadline = begin(out, 1), time.time() + 500
    while len(list((out / "slime" / "checkpoints").glob("checkpoint-*/trainer_state.json"))) < 2:
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    # torchrun puts each rank into a session of its own.
    for each in (*psutil.Process(process.pid).children(recursive=True), process):
        each.kill()
    process.wait()
    assert begin(out, 2).wait() == 0
    assert json.loads((out / "slime" / "stage.json").read_text())["resumed_from_step"] > 0
    one, two = weights(undisturbed), weights(out)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-7)


def test_killed_in_each_stage_the_same_command_ends_in_the_same_weights(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    command = ["run", str(world / "recipe.yaml"), "--out", str(out)]
    for stage in ("sft", "slime"):
        process = subprocess.Popen(
            [*CLI, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.time() + 120
        while len(list((out / stage / "checkpoints").glob("checkpoint-*/trainer_state.json"))) < 2:
            assert time.time() < deadline
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / stage / "stage.json").exists(), "the stage ended before it could be killed"
    again = slimepo(*command)
    assert again.returncode == 0, again.stderr
    for name, tensor in weights(finished).items():
        assert torch.equal(weights(out)[name], tensor), name
    for stage in ("sft", "slime"):
        record: dict[str, Any] = json.loads((out / stage / "stage.json").read_text())
        assert record["resumed_from_step"] > 0
        steps = [line["step"] for line in json_lines(out / stage / "metrics.jsonl")]
        assert steps == sorted(steps)
        probes, whole = (
            [line for line in json_lines(run / stage / "monitor.jsonl") if line["kind"] == "probe"]
            for run in (out, finished)
        )
        assert [line["since"] for line in probes] == [0] * len(probes)
        for one, two in zip(probes, whole, strict=True):
            assert (one["step"], one["train"], one["heldout"]) == (two["step"], two["train"], two["heldout"])


def test_a_stage_can_stop_itself_and_leaves_a_model_and_the_reason(world: Path, tmp_path: Path) -> None:
    """The stage behind it goes on from what it left."""
    overrides = [
        "stages.sft.name=first",
        "stages.first.part=sft",
        "stages.first.loss=simpo",
        "stages.first.loss_options={beta: 2.0, gamma: 40.0}",
        "stages.first.learning_rate=1",
        "stages.first.monitor={every: 2, stop_on: [unlearning]}",
        "stages.slime.max_steps=2",
        "stages.slime.monitor=false",
    ]
    shown = make_console(record=True, file=io.StringIO(), width=200)
    results = run_recipe(load_recipe(world / "recipe.yaml", overrides), tmp_path, shown)
    first, second = (json.loads((tmp_path / name / "stage.json").read_text()) for name in ("first", "slime"))
    assert first["steps"] == first["monitor"]["stopped"]["step"] < 20
    assert first["monitor"]["stopped"]["warning"] == "unlearning"
    assert (tmp_path / "first" / "model" / "model.safetensors").exists()
    assert second["monitor"] is None
    assert not (tmp_path / "slime" / "monitor.jsonl").exists()
    assert "unlearning; the run stops here" in shown.export_text(clear=False)
    print_summary(results, tmp_path, shown)
    said = shown.export_text()
    assert "first was stopped at step" in said
    assert f"report: slimepo report {tmp_path}" in said


def test_smoke_shrinks_the_model_and_takes_five_steps_a_stage(world: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        world / "recipe.yaml", ["model.hidden_size=4096", "model.num_hidden_layers=40"], smoke=True
    )
    results = run_recipe(recipe, tmp_path / "smoke", console())
    assert [r["steps"] for r in results] == [5, 5]
    assert results[0]["parameters"] < 500_000


def test_bad_arguments_stop_before_any_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: object, **__: object) -> None:
        pytest.fail("a model was made")

    monkeypatch.setattr("slimepo.pipeline.stage.stage_model", no_model)
    for number, (overrides, words) in enumerate(
        (
            (["stages.slime.args.learning_rte=1"], "no 'learning_rte'"),
            (["stages.slime.args.gradient_accumulation_steps=4"], "another name of a key: give batch_size"),
            (["stages.slime.args.max_length=64"], r"give data\.max_length"),
            (["stages.slime.args.beta=0.2"], r"give loss_options\.beta"),
            (["stages.slime.args.dataset_num_proc=4"], "leave it out"),
            (["stages.slime.args.lr_scheduler_type=warmup_stable_decay"], "lr_scheduler_type"),
            (["stages.slime.args.load_best_model_at_end=true"], "strategy"),
            (
                ["stages.sft.args.eval_strategy=steps", "data.parts={sft: 0.3, preference: 0.7}"],
                "held-out rows",
            ),
            (["stages.slime.args.do_train=false"], "give max_steps"),
            (["stages.slime.args.resume_from_checkpoint=x"], "give --out"),
            (["stages.slime.args.loss=dpo"], "give loss"),
            (["stages.slime.args.seed=7"], "give the recipe's seed"),
            (["stages.slime.args.output_dir=elsewhere"], "give --out"),
            (["stages.slime.args.adapter=merge"], "give the recipe's adapter"),
            (["stages.slime.args.save_only_model=true"], r"leave args\.save_only_model out.*the optimizer"),
            (["stages.slime.args.ignore_data_skip=true"], r"leave args\.ignore_data_skip out.*other rows"),
            (["stages.slime.args.enable_jit_checkpoint=true"], r"leave args\.enable_jit_checkpoint out"),
            (
                ["stages.slime.args.weight_decay=abc"],
                r"args\.weight_decay = 'abc': Input should be a valid number",
            ),
            (["stages.slime.args.gradient_checkpointing=maybe"], r"args\.gradient_checkpointing = 'maybe'"),
            (
                ["stages.slime.args.dataloader_num_workers=-1"],
                "dataloader_num_workers = -1: it must be a number from 0",
            ),
            (["stages.slime.args.train_sampling_strategy=x"], "train_sampling_strategy = 'x' is unknown"),
            (
                ["stages.slime.save_every=5", "stages.slime.args.save_strategy=no"],
                "save_every = 5 is for checkpoints by steps, and args.save_strategy is 'no': leave one",
            ),
            (["stages.slime.args.hub_model_id=me/it"], r"args\.hub_model_id goes with args\.push_to_hub"),
            (
                ["stages.slime.args={lr_scheduler_type: constant, warmup_steps: 50}"],
                "'slime': warmup_steps = 50.* would change nothing",
            ),
            (
                ["stages.slime.loss=bopo"],
                "stage 'bopo': bopo weighs pairs by their costs, and no row of part 'preference'",
            ),
            (["data.path=nowhere.jsonl"], "nowhere.jsonl"),
            (["data.max_length=3"], "no row of part"),
        )
    ):
        with pytest.raises(InputError, match=words):
            run_recipe(load_recipe(world / "recipe.yaml", overrides), tmp_path / str(number), console())


def test_what_a_run_makes_nothing_of_is_said(world: Path) -> None:
    recipe = load_recipe(
        world / "recipe.yaml",
        ["stages.sft.max_steps=3", "tasks={train: t.jsonl, checker: a.b:c}", "pairs={own: {model: sft}}"],
    )
    assert unread(recipe) == [
        "sft: it takes max_steps = 3, whatever epochs = 2 is",
        "pairs 'own': no stage trains on them, so they are not made",
        "tasks.train: nothing answers them, for no stage has rollouts or trains on pairs of samples",
    ]
    assert unread(load_recipe(world / "recipe.yaml", ["stages.slime.max_steps=3"])) == []


def test_a_word_of_yaml_is_no_flag_that_is_on(world: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        world / "recipe.yaml", ["stages.slime.args={bf16: no, weight_decay: '1e-2', use_cpu: yes}"]
    )
    args = stage_arguments(recipe, recipe.stages[1], tmp_path / "slime")
    assert (args.bf16, args.weight_decay, args.use_cpu) == (False, 0.01, True)


def test_a_base_in_four_bits_needs_bitsandbytes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimepo.model.quantize.is_bitsandbytes_available", lambda: False)
    recipe = load_recipe(world / "recipe.yaml", ["quantize=nf4"])
    with pytest.raises(InputError, match=r"need bitsandbytes: pip install 'slimepo\[qlora\]'"):
        run_recipe(recipe, tmp_path / "run", console())
    assert not (tmp_path / "run").exists()


def test_a_repository_that_cannot_be_made_is_one_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("no way to the Hub")

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", no_network)
    with pytest.raises(InputError, match="push_to_hub: no way to the Hub"):
        run_recipe(
            load_recipe(world / "recipe.yaml", ["stages.sft.args.push_to_hub=true"]), tmp_path, console()
        )


def test_a_stage_evaluates_on_held_out_rows_and_keeps_the_best_model(world: Path, tmp_path: Path) -> None:
    args = "{eval_strategy: steps, eval_steps: 1, save_strategy: best, metric_for_best_model: loss, "
    stage = f"{{loss: sft, part: sft, max_steps: 3, learning_rate: 1, args: {args} load_best_model_at_end: true}}}}"
    run_recipe(load_recipe(world / "recipe.yaml", [f"stages=[{stage}]"]), tmp_path, console())
    lines = [json.loads(line) for line in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    heldout = json.loads((tmp_path / "sft/stage.json").read_text())["heldout"]
    assert len(losses) == 3
    assert -heldout["after"]["logps/chosen"] == pytest.approx(min(losses), rel=1e-3)


@pytest.mark.parametrize(("batch", "micro"), [(64, 3), (10, 4), (8, 3), (7, 7)])
def test_a_step_holds_exactly_the_pairs_asked_for(
    world: Path, tmp_path: Path, batch: int, micro: int
) -> None:
    overrides = [f"stages.slime.batch_size={batch}", f"stages.slime.micro_batch_size={micro}"]
    recipe = load_recipe(world / "recipe.yaml", overrides)
    rows = StageRows(random_rows(batch + 3), [])
    tokenizer = build_tokenizer()
    args = stage_arguments(recipe, recipe.stages[1], tmp_path)
    trainer = stage_trainer(recipe, args, recipe.model, rows, tokenizer, tmp_path)
    sizes = [[b["rows"] for b in step["batches"]] for step in trainer.get_train_dataloader()]
    assert [sum(step) for step in sizes] == [batch, 3]
    assert max(sizes[0]) <= micro


OWN_LOSS = """
import torch
from slimepo.types import LossOutput


def tied_hinge(policy, reference, *, room: float = 1.0):
    \"\"\"Reads a reference: its parameter has no default.\"\"\"
    sums = [
        torch.where(getattr(of, f"{side}_mask"), getattr(of, side), 0).sum(-1)
        for side in ("chosen", "rejected")
        for of in (policy, reference)
    ]
    margin = (sums[0] - sums[1]) - (sums[2] - sums[3])
    return LossOutput(torch.relu(room - margin), {"tied_margin": margin.detach()})
"""


@pytest.mark.parametrize("form", ["beside the recipe", "file"])
def test_an_objective_of_ones_own_from_another_folder_with_a_reference(
    world: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is given elsewhere; the file lies beside the recipe, or is named by its path."""
    mine, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    mine.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    module = f"tied_losses_{form.split()[0]}"
    (mine / f"{module}.py").write_text(OWN_LOSS)
    loss = f"{module}:tied_hinge" if form != "file" else f"{mine / module}.py:tied_hinge"
    mapping = f"loss: '{loss}', loss_options: {{room: 2.0}},"
    text = (world / "recipe.yaml").read_text()
    (mine / "recipe.yaml").write_text(text.replace("loss: slime,", mapping))
    shown = make_console(record=True, file=io.StringIO())
    _, stage = run_recipe(
        load_recipe(mine / "recipe.yaml", ["stages.0.max_steps=2"]), tmp_path / "out", shown
    )
    assert "reference adapters-off" in shown.export_text()
    assert (stage["name"], stage["reference"]) == ("tied_hinge", "adapters-off")
    lines = (tmp_path / "out" / "tied_hinge" / "metrics.jsonl").read_text().splitlines()
    assert any(abs(json.loads(line).get("tied_margin", 0)) > 0 for line in lines)


def test_answers_judged_one_by_one_train_with_kto(world: Path, tmp_path: Path) -> None:
    """Rows of one answer each; held-out ones are scored on the side that they have."""
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
        for index, row in enumerate(pairs)
        for good in ([True, False] if index % 2 else [True])
    ]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(
        world / "recipe.yaml",
        [
            f"data.path={tmp_path / 'judged.jsonl'}",
            "stages.1.loss=kto",
            "stages.1.learning_rate=1e-2",
        ],
    )
    _, kto = run_recipe(recipe, tmp_path / "out", console())
    # Only desirable answers are demonstrations.
    assert (kto["loss"], kto["reference"]) == ("kto", "adapters-off")
    data = json.loads((tmp_path / "out" / "sft" / "data.json").read_text())
    assert data["dropped"]["not a pair"] > 0
    assert set(kto["heldout"]["after"]) == {"logps/chosen", "logps/rejected", "rejected_below_floor"}
    line = json.loads((tmp_path / "out" / kto["name"] / "metrics.jsonl").read_text().splitlines()[0])
    assert {"rewards/chosen", "rewards/rejected", "z0"} <= line.keys()
    assert "accuracy" not in line
    assert line["z0"] >= 0


def test_pairs_train_with_kto_as_two_judged_answers_each(world: Path, tmp_path: Path) -> None:
    recipe = load_recipe(world / "recipe.yaml", ["stages.1.loss=kto", "stages.1.max_steps=2"])
    _, kto = run_recipe(recipe, tmp_path / "out", console())
    data = json.loads((tmp_path / "out" / kto["name"] / "data.json").read_text())
    assert kto["rows"] == 2 * data["kept"]
    assert "accuracy" in kto["heldout"]["after"]


def test_objectives_compared_from_one_model(world: Path, finished: Path, tmp_path: Path) -> None:
    """The SFT stage is taken over from another run of the same recipe, to save its time."""
    text = (world / "recipe.yaml").read_text()
    more = "".join(
        f"  - {{loss: {loss}, start: sft, learning_rate: 1e-3, batch_size: 8, max_steps: 2}}\n"
        for loss in ("dpo", "simpo", "slime/without-hard")
    )
    (tmp_path / "recipe.yaml").write_text(text + more)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "recipe.yaml").write_text(dump(recipe))
    results = run_recipe(recipe, tmp_path / "out", console())
    assert [r["name"] for r in results] == ["sft", "slime", "dpo", "simpo", "slime-without-hard"]
    of_sft = str((tmp_path / "out" / "sft" / "model").resolve())
    assert [r["base"] for r in results[2:]] == [of_sft] * 3
    assert [r["reference"] for r in results[2:]] == ["adapters-off", None, None]
    starts = [r["heldout"]["before"]["logps/chosen"] for r in results[1:]]
    assert starts == pytest.approx([starts[0]] * 4, abs=1e-5)


def with_dpo(world: Path, finished: Path, folder: Path, reference: str) -> Recipe:
    """A recipe of SFT, done before, and two stages of DPO: one from SFT's model and one from the other's."""
    text = (world / "recipe.yaml").read_text()
    text = text[: text.index("  - {loss: slime")]
    keys = (
        f"loss: dpo, reference: {reference}, learning_rate: 1e-2, batch_size: 8, args: {{logging_steps: 1}}"
    )
    text += "".join(f"  - {{name: {name}, max_steps: 3, {keys}}}\n" for name in ("first", "second"))
    (folder / "recipe.yaml").write_text(text)
    recipe = load_recipe(folder / "recipe.yaml")
    shutil.copytree(finished, folder / "out")
    shutil.rmtree(folder / "out" / "slime")
    (folder / "out" / "recipe.yaml").write_text(dump(recipe))
    return recipe


def test_a_stage_before_is_the_reference(world: Path, finished: Path, tmp_path: Path) -> None:
    """The stage that starts from SFT's model has moved nothing at its first step; the one after it has."""
    recipe = with_dpo(world, finished, tmp_path, "sft")
    results = run_recipe(recipe, tmp_path / "out", console())
    of_sft = str((tmp_path / "out" / "sft" / "model").resolve())
    assert [r["reference"] for r in results[1:]] == [of_sft] * 2
    starts = [json_lines(tmp_path / "out" / name / "metrics.jsonl")[0] for name in ("first", "second")]
    assert starts[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert abs(starts[1]["rewards/margins"]) > 1e-3


def test_a_reference_that_is_nothing_is_named_before_a_model_is_made(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_dpo(world, finished, tmp_path, "stf")
    monkeypatch.setattr("slimepo.pipeline.stage.stage_model", lambda *_: pytest.fail("a model was made"))
    words = r"stage 'first': reference 'stf' is none of auto, .*, no stage before it \(sft\) \(did you mean 'sft'\?\)"
    with pytest.raises(InputError, match=words):
        run_recipe(recipe, tmp_path / "out", console())


def test_the_reference_is_counted_in_the_runs_own_lines(world: Path, tmp_path: Path) -> None:
    overrides = [f"stages.1.{key}" for key in ("loss=dpo", "max_steps=2", "reference=cache")]
    recipe = load_recipe(world / "recipe.yaml", [*overrides, "stages.sft.max_steps=1"])
    shown = make_console(file=io.StringIO(), width=200)
    run_recipe(recipe, tmp_path, shown)
    assert "dpo: reference log-probs of 16 rows computed in" in shown.file.getvalue()
