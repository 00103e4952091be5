"""Folders to records: what is there is read, what is not is not made up, and a wrong folder is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from slimepo.errors import InputError
from slimepo.report.folders import read_source, read_sources
from slimepo.report.groups import by_rate, compare_settings, group_records
from slimepo.settings import flat, read_mapping
from tests.report.conftest import SIX, scores_row, write_comparison, write_json, write_run

MakeRun = Callable[..., Path]


def test_a_run_gives_its_preference_stage(make_run: MakeRun) -> None:
    source = read_source(make_run("first", watched=True))
    (record,) = source.records
    assert (record.name, record.loss, record.seed, record.state) == ("first", "slime", 0, "finished")
    assert record.before["logps/chosen"] == -0.51
    assert record.after["logps/chosen"] == -0.66
    assert record.chosen_fell == 0.615
    assert (record.steps, record.seconds, record.kept, record.heldout) == (60, 75.4, 777, 200)
    assert record.dropped == {"row too long": 21, "empty response": 2}
    assert [line["step"] for line in record.curve] == [10, 20, 30, 40, 50, 60]
    assert record.distributions["margin"].after == [3, 4, 1]
    assert record.settings["learning_rate"] == 5e-7
    assert record.settings["sft.learning_rate"] == 2e-4
    assert record.settings["data.max_length"] == 2048
    assert "seed" not in record.settings


def test_what_the_monitor_wrote(make_run: MakeRun) -> None:
    (record,) = read_source(make_run("watched", watched=True)).records
    assert [(w.step, w.stopped, w.gone) for w in record.warnings] == [(40, True, 60)]
    assert "0.8 nats less likely" in record.warnings[0].text
    changes = [
        (line["step"], line["heldout/chosen_change"]) for line in record.monitor if "heldout/pairs" in line
    ]
    assert changes == [(0, 0.0), (40, -0.8)]
    assert record.monitor[-1]["generation/length"] == 5.0
    (sample,) = record.samples
    assert [(a.run, a.text) for a in sample.answers] == [
        ("before", "It was so."),
        ("after", "It is is is is."),
    ]


def test_margins_passed_and_entangled_gradients_are_curves(make_run: MakeRun) -> None:
    folder = make_run("entangled")
    probe = {
        "kind": "probe", "step": 4, "heldout": {"past_soft_margin": 0.5, "past_hard_margin": 0.25},
        "entanglement": {"ratio": [0.5, 1.5], "above": 0.5},
    }  # fmt: skip
    (folder / "slime" / "monitor.jsonl").write_text(json.dumps(probe) + "\n")
    (record,) = read_source(folder).records
    figures = {"heldout/past_soft_margin": 0.5, "heldout/past_hard_margin": 0.25, "entanglement": 1.0}
    assert record.monitor == [{"step": 4} | figures]


def test_what_a_killed_run_answered_before_it_learned_is_not_its_own_answer(make_run: MakeRun) -> None:
    folder = make_run("early", state="killed", watched=True)
    file = folder / "slime" / "monitor.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    (record,) = read_source(folder).records
    (sample,) = record.samples
    assert [a.run for a in sample.answers] == ["before"]


def test_a_run_that_its_monitor_stopped_is_not_a_whole_one(make_run: MakeRun) -> None:
    folder = make_run("stopped")
    file = folder / "slime" / "stage.json"
    done = json.loads(file.read_text())
    file.write_text(json.dumps(done | {"monitor": {"stopped": {"step": 60, "message": "unlearning"}}}))
    (folder / "slime" / "monitor.jsonl").write_text('{"kind": "start", "step": 0, "steps": 90}\n')
    (record,) = read_source(folder).records
    assert (record.state, record.note) == ("stopped", "step 60 of 90")
    assert record.after["logps/chosen"] == -0.66


def test_a_run_killed_half_way_says_how_far_it_came(make_run: MakeRun) -> None:
    (record,) = read_source(make_run("killed", state="killed", watched=True)).records
    assert record.state == "unfinished"
    assert "step 60, 0.60 of 1 epochs" in record.note
    assert len(record.curve) == 6
    assert record.after == {}
    # It was not scored at its end; the monitor's own sample was. Bins that nothing fell into are left out.
    assert record.distributions["rejected_tokens"].after == [1, 2, 11]
    assert record.distributions["rejected_tokens"].edges == [-3, -2, -1, 0]


def test_the_planned_steps_come_from_the_last_checkpoint(make_run: MakeRun) -> None:
    folder = make_run("stopped", state="killed")
    checkpoint = folder / "slime" / "checkpoints" / "checkpoint-50"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 50, "max_steps": 188}))
    assert "step 60 of 188" in read_source(folder).records[0].note


def test_a_run_that_broke_says_why(make_run: MakeRun) -> None:
    (record,) = read_source(make_run("broken", state="failed")).records
    assert (record.state, record.note) == ("failed", "the loss is not finite at step 61")


def test_a_run_that_ended_between_two_stages_is_not_a_whole_one(make_run: MakeRun) -> None:
    folder = make_run("young", state="new")
    first, waiting = read_source(folder).records
    assert (first.loss, first.state, first.steps) == ("sft", "finished", 50)
    assert (waiting.name, waiting.state) == ("young/slime", "unfinished")
    assert waiting.note == "nothing is logged yet; no end is recorded: still running, or killed"
    write_json(folder / "status.json", {"status": "failed", "error": "the checker failed"})
    waiting = read_source(folder).records[-1]
    assert (waiting.state, waiting.note) == ("failed", "the checker failed")
    # It was given other stages later: what it was to do then, it did.
    write_json(folder / "status.json", {"status": "done"})
    assert [record.loss for record in read_source(folder).records] == ["sft"]


def test_a_run_that_was_stopped_or_never_began_waits_for_nothing(make_run: MakeRun) -> None:
    folder = make_run("stopped", state="new")
    write_json(folder / "status.json", {"status": "stopped"})
    assert [record.loss for record in read_source(folder).records] == ["sft"]
    shutil.rmtree(folder / "sft")
    for status in ("done", "running"):
        write_json(folder / "status.json", {"status": status})
        (record,) = read_source(folder).records
        assert (record.stage, record.state) == ("sft", "unfinished")


def test_of_several_stages_that_never_began_the_first_stands_for_all(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "run", SIX[:2])
    recipe = read_mapping(folder / "recipe.yaml", "recipe")
    recipe["stages"] += [recipe["stages"][1] | {"name": name} for name in ("later", "last")]
    write_json(folder / "recipe.yaml", recipe)
    *done, waiting = read_source(folder).records
    assert {record.state for record in done} == {"finished"}
    assert waiting.stage == "later"
    assert waiting.note.endswith("; 1 more stage behind it")


def test_several_preference_stages_are_records_of_their_own(make_run: MakeRun) -> None:
    folder = make_run("two")
    (folder / "recipe.yaml").write_text(
        "stages:\n- {loss: sft, name: sft, learning_rate: 1e-3, epochs: 1}\n"
        "- {loss: slime, name: slime, learning_rate: 1e-6, epochs: 1}\n"
        "- {loss: dpo, name: later, start: sft, learning_rate: 1e-6, epochs: 1}\n"
    )
    (folder / "later").mkdir()
    (folder / "later" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    first, later = read_source(folder).records
    assert (first.name, later.name) == ("two/slime", "two/later")
    # What both started from is a setting of both, the other one's is not.
    assert first.settings["sft.learning_rate"] == later.settings["sft.learning_rate"] == 1e-3
    assert "slime.learning_rate" not in later.settings


def test_stages_compared_from_one_model_are_records_of_their_own(tmp_path: Path) -> None:
    """The control is supervised training too, and no other starts from it."""
    (source,) = read_sources([write_comparison(tmp_path / "run")])
    assert [record.name for record in source.records] == [stage["name"] for stage in SIX]
    assert {record.start for record in source.records} == {"sft"}
    assert [record.loss for record in source.records[-2:]] == ["sft", "simpo"]
    assert source.records[-1].state == "failed"
    first = source.records[0]
    assert (first.settings["epochs"], first.settings["pairs.samples.per_prompt"]) == (2, 6)
    assert (first.after["exact_match"], first.prompts, first.heldout) == (0.56, 1100, 400)
    assert [(a.run, a.text, a.correct) for a in first.samples[0].answers] == [
        ("before", "13", False),
        ("after", "12", True),
    ]
    assert source.pairs["samples"]["train"]["pairs"] == 2800
    assert source.seconds == {"sft": 95.0, "samples (pairs)": 6.1}


def test_a_folder_of_seeds_stands_for_its_runs(tmp_path: Path) -> None:
    for seed in (10, 2):
        write_comparison(tmp_path / "study" / f"seed-{seed}", SIX[:2], seed=seed)
    sources = read_sources([tmp_path / "study"])
    assert [source.path.name for source in sources] == ["seed-2", "seed-10"]
    groups = group_records([record for source in sources for record in source.records])
    assert [group.label for group in groups] == ["slime-1e-4 (2 seeds)", "slime-1e-3 (2 seeds)"]


def test_scores_are_found_in_a_run_too(make_run: MakeRun, evaluation: Path) -> None:
    folder = make_run("scored")
    evaluation.rename(folder / "evaluation")
    found = [score.model for file in read_source(folder).scores for score in file.scores]
    assert found == ["base", "slime", "slime"] * 2


@pytest.mark.parametrize(
    "content", [{"scores": [{"model": "m"}]}, {"scores": [scores_row("m", 1.0)], "canaries": {"c": 3}}]
)
def test_a_score_file_of_something_else_is_named(tmp_path: Path, content: object) -> None:
    write_json(tmp_path / "scores" / "x.json", content)
    with pytest.raises(InputError, match=r"x\.json: no score file of slimepo eval"):
        read_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", "no such folder"),
        ("file", "a file; give its folder"),
        ("empty", "not a run folder"),
        ("run/slime", "a part of the run .*run; give .*run"),
        ("claimed", "nothing in it yet"),
    ],
)
def test_a_wrong_folder_is_named(make_run: MakeRun, tmp_path: Path, name: str, words: str) -> None:
    make_run("run")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    claimed = make_run("claimed", state="new")
    (claimed / "sft" / "stage.json").unlink()
    with pytest.raises(InputError, match=words):
        read_sources([tmp_path / name])


def test_a_run_that_only_began_stands_beside_others(make_run: MakeRun) -> None:
    young = make_run("young", state="new")
    (young / "sft" / "stage.json").unlink()
    sources = read_sources([make_run("run"), young])
    assert sources[1].records[0].note.startswith("nothing is logged yet")


def test_runs_that_differ_only_in_the_seed_are_one_group(make_run: MakeRun) -> None:
    folders = [make_run(f"slime-s{seed}", seed=seed, shift=seed / 10) for seed in (0, 1, 2)]
    folders.append(make_run("other", rate=1e-6))
    groups = group_records([record for source in read_sources(folders) for record in source.records])
    assert [(group.label, len(group.records)) for group in groups] == [("slime (3 seeds)", 3), ("other", 1)]
    fell = groups[0].spread(lambda record: record.after.get("logps/chosen"))
    assert fell is not None
    assert (round(fell.median, 6), round(fell.low, 6), round(fell.high, 6), fell.n) == (
        -0.76,
        -0.86,
        -0.66,
        3,
    )


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / place / "run", rate=rate) for place, rate in (("a", 1e-6), ("b", 1e-7))]
    assert [record.name for source in read_sources(folders) for record in source.records] == [
        "a/run",
        "b/run",
    ]


def test_the_same_seed_twice_is_not_averaged(make_run: MakeRun) -> None:
    sources = read_sources([make_run("once"), make_run("again")])
    assert len(group_records([record for source in sources for record in source.records])) == 2


def test_only_runs_that_differ_in_nothing_else_are_a_line_over_the_learning_rate(make_run: MakeRun) -> None:
    folders = [
        make_run("a", rate=1e-6),
        make_run("b", rate=1e-7),
        make_run("c", options={"hard_margin": 2.0}),
    ]
    folders.append(make_run("d", "dpo"))
    groups = group_records([record for source in read_sources(folders) for record in source.records])
    labels = {name: [group.label for group in together] for name, together in by_rate(groups).items()}
    assert labels == {
        # Without options of its own; one alone has its own name.
        "SLIME": ["b", "a"],
        "c": ["c"],
        "DPO": ["d"],
    }


def test_settings_that_differ_and_the_value_that_stands_out(make_run: MakeRun) -> None:
    folders = [make_run("a"), make_run("b", options={"hard_margin": 2.0}), make_run("c", rate=1e-6)]
    groups = group_records([record for source in read_sources(folders) for record in source.records])
    differing, same = compare_settings(groups)
    assert {s.key: (s.values, s.rare) for s in differing} == {
        "loss_options.hard_margin": (("–", "2", "–"), (False, True, False)),
        "learning_rate": (("5e-7", "5e-7", "1e-6"), (False, False, True)),
    }
    assert ("data.path", "pairs.jsonl") in same


def test_nested_settings_are_flat() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "e": [1]}


def test_scores_may_be_given_by_their_own_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "eval" / "scores" / "a.json", {"scores": [scores_row("ours", 10.0)]})
    write_json(tmp_path / "scores" / "scores" / "b.json", {"scores": [scores_row("theirs", 10.0)]})
    given = [tmp_path / "eval", tmp_path / "eval" / "scores", tmp_path / "scores"]
    assert [[s.model for file in read_source(path).scores for s in file.scores] for path in given] == [
        ["ours"],
        ["ours"],
        ["theirs"],
    ]


def test_a_folder_of_runs_is_not_taken_for_its_scores(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a")
    write_json(run / "eval" / "scores" / "a.json", {"scores": [scores_row("ours", 10.0)]})
    with pytest.raises(InputError, match=f"a folder of runs; name them, such as {run}, or {run.parent}/"):
        read_source(run.parent)
