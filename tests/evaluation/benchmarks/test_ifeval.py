"""IFEval: the official verdicts, and what is ours around the official checkers."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slimepo.errors import InputError
from slimepo.evaluation.benchmarks import ifeval
from slimepo.evaluation.benchmarks.ifeval import score, verdicts
from slimepo.evaluation.job import Job
from slimepo.evaluation.rows import read_rows
from slimepo.evaluation.run import load_benchmark, run_benchmark
from slimepo.evaluation.settings import Evaluation
from slimepo.report.page import write_report
from tests.evaluation.conftest import one_file, printed
from tests.evaluation.made import ifeval_files

COMMAS, TWO, SIGNS, GERMAN = ifeval_files()["ifeval/input_data.jsonl"]
# All but the last are followed.
SAID = {
    COMMAS["prompt"]: "Frogs sing at night.",
    TWO["prompt"]: "It is green. It sings well.\nTHE BULLFROG",
    SIGNS["prompt"]: "My pond #calm #green",
    GERMAN["prompt"]: "Hello there, my dear little frog, how are you today?",
}
ANSWERS = [{"prompt": prompt, "response": response} for prompt, response in SAID.items()]


def test_the_official_verdicts(official_data: Path) -> None:
    folder = official_data / "eval"
    benchmark = load_benchmark(Evaluation(benchmark="ifeval", data_dir=str(folder)), folder)
    question_of = {question.row["key"]: question.row for question in benchmark.questions}
    assert (len(question_of), sum(len(row["kwargs"]) for row in question_of.values())) == (541, 834)
    with gzip.open(folder / "ifeval" / "gpt4_20231107_half.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    told = {row["key"]: verdicts(question_of[row["key"]], row["response"]) for row in rows}
    assert len(told) == 270
    assert not [row["key"] for row in rows if told[row["key"]] != (row["strict"], row["loose"])]
    # The measures are means of these.
    rows = rows[:50]
    scores = score([question_of[row["key"]] for row in rows], rows)
    strict, loose = [row["strict"] for row in rows], [row["loose"] for row in rows]
    assert [scores.measures[name].value for name in ifeval.FIGURES] == pytest.approx(
        [100 * sum(map(all, each)) / 50 for each in (strict, loose)]
        + [100 * sum(map(sum, each)) / sum(map(len, each)) for each in (strict, loose)]
    )


@pytest.mark.parametrize(
    ("question", "response", "strict", "loose"),
    [
        (COMMAS, "Frogs sing.", [True], [True]),
        (COMMAS, "Well, here it is:\nFrogs sing.", [False], [True]),
        (TWO, "The *FROG* sings. It is late.", [True, True], [True, True]),
        # One sentence for Punkt, which knows the abbreviation.
        (TWO, "Dr. Frog sings", [False, False], [False, False]),
        # The official program would count a letter that it draws at random.
        (SIGNS, "#pond", [False, True], [False, True]),
        (SIGNS, "A pond is calm.", [False, True], [False, True]),
        (GERMAN, "Guten Morgen, lieber Frosch, wie geht es dir heute?", [True], [True]),
        (COMMAS, "", [False], [False]),
        (COMMAS, " \n", [False], [False]),
    ],
)
def test_strict_and_loose(
    question: dict[str, Any], response: str, strict: list[bool], loose: list[bool]
) -> None:
    assert verdicts(question, response) == (strict, loose)


def test_verdicts_repeat_where_the_language_is_a_matter_of_chance() -> None:
    # Drawn anew each time, this is German, Danish or English.
    assert len({verdicts(GERMAN, "frog Frosch").strict[0] for _ in range(30)}) == 1


def test_options_of_other_instructions_may_be_null() -> None:
    question = {**COMMAS, "kwargs": [{"keywords": None, "num_words": None}]}
    assert verdicts(question, "Frogs sing.") == ([True], [True])


def test_an_instruction_without_a_checker_is_refused() -> None:
    question = {**COMMAS, "instruction_id_list": ["punctuation:no_dots"]}
    with pytest.raises(InputError, match="no instruction 'punctuation:no_dots'"):
        verdicts(question, "Yes")


def test_figures_by_hand() -> None:
    scores = score([COMMAS, TWO, SIGNS, GERMAN], ANSWERS, "frog")
    measures = scores.measures
    assert scores.model == "frog"
    # Whole prompts: the first, the second and the third; instructions: five of six.
    assert [measures[name].value for name in ifeval.FIGURES] == [75.0, 75.0, 100 * 5 / 6, 100 * 5 / 6]
    assert (measures["prompt_strict"].n, measures["instruction_strict"].n) == (4, 6)
    assert measures["kind/keywords"].value == 100.0
    assert (measures["kind/language"].value, measures["kind/language"].n) == (0.0, 1)
    # Wilson's interval of 3 in 4; for instructions that of whole prompts.
    assert (measures["prompt_strict"].lower, measures["prompt_strict"].upper) == pytest.approx(
        (30.06, 95.44), abs=0.01
    )
    assert measures["instruction_strict"].lower == pytest.approx(40, abs=20)
    assert measures["instruction_strict"].upper == 100.0
    # A list a prompt, in the prompts' order; the second has two instructions, and so has the third.
    assert scores.items["prompt_strict"] == [[1], [1], [1], [0]]
    assert scores.items["instruction_loose"] == [[1], [1, 1], [1, 1], [0]]
    assert list(scores.items) == list(ifeval.FIGURES)
    with pytest.raises(InputError, match="1 of 4 IFEval prompts have no response"):
        score([COMMAS, TWO, SIGNS, GERMAN], ANSWERS[1:])


def test_a_whole_run_without_a_judge(
    job: Callable[..., Job], loads: list[str], console: Console, tmp_path: Path
) -> None:
    this = job("ifeval", judge=None, key_variable=None)
    (scores,) = run_benchmark(this, console)
    assert (scores.model, scores.scored, scores.identity.judge) == ("tiny-llama", 3, "")
    assert scores.notes[0] == "the first 3 questions only"
    rows = read_rows(this.out / "ifeval" / "input_response_data_tiny-llama.jsonl")
    # By key, whatever the order of the file is.
    assert [row["key"] for row in rows] == [7, 8, 9]
    assert "prompt_strict" in printed(console)
    loads.clear()
    assert run_benchmark(this, console) == [scores]
    assert loads == []
    write_report([this.out], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "IFEval, prompt_strict (%)" in page
    assert "IFEval&#39;s figures, and by kind" in page
    assert "instruction loose" in (tmp_path / "report.md").read_text()


def test_responses_of_others_are_scored_by_their_prompts(job: Callable[..., Job], console: Console) -> None:
    this = job("ifeval", "given", judge=None, key_variable=None, limit=None, max_new_tokens=None)
    file = this.out / "ifeval" / "input_response_data_given.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in ANSWERS))
    (scores,) = run_benchmark(this, console)
    assert (scores.model, scores.measures["prompt_strict"].value, scores.official) == ("given", 75.0, True)
    record = json.loads(one_file(this.out / "scores", "ifeval--given.json").read_text())
    assert record["answers"]["made"] == "elsewhere"


def test_without_the_extra_it_is_refused_before_anything_is_generated(
    job: Callable[..., Job], loads: list[str], console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "langdetect", None)
    this = job("ifeval", judge=None, key_variable=None)
    with pytest.raises(InputError, match=r"pip install 'slimepo\[ifeval\]'"):
        run_benchmark(this, console)
    assert not (this.out / "ifeval").exists()
    # Answers alone need no checker.
    run_benchmark(this, console, ["answer"])
