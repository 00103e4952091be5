"""IFEval: 541 prompts with instructions that code verifies, scored strictly and loosely, with no judge.

A prompt counts where every one of its instructions is followed, an instruction by itself. Strictly the response is read
as it is; loosely it also counts without its first line, its last or both, each with and without asterisks. The checkers
are those of the official code as the library if-verifiable packs them; two things are fixed here that it leaves to
chance: language detection has a seed, and a character that is no letter is counted itself (`_follows`).

Source: google-research/instruction_following_eval (Zhou et al., arXiv 2311.07911).
"""

from __future__ import annotations

import functools
import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from slimepo.errors import InputError
from slimepo.evaluation.benchmarks.base import Answers, Baseline, Benchmark, make_question
from slimepo.evaluation.benchmarks.bootstrap import bootstrap_mean, wilson
from slimepo.evaluation.benchmarks.sources import fetch
from slimepo.evaluation.judge.request import Identity, Measure, Scores, sha256_of
from slimepo.evaluation.rows import JsonObject, need, read_rows
from slimepo.evaluation.settings import Evaluation
from slimepo.files import write_text

BENCHMARK = "ifeval"
FIGURES = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
LIBRARY = "if-verifiable"
# Upstream leaves this to each model's owner; lm-eval and the leaderboard that used it take so many.
ANSWER_TOKENS = 1280
_LETTERS = "keywords:letter_frequency"


class Verdicts(NamedTuple):
    """Whether a response follows each of its prompt's instructions."""

    strict: list[bool]
    loose: list[bool]


def load_questions(settings: Evaluation) -> Benchmark:
    """541 prompts of one turn, by key."""
    file = fetch("ifeval/input_data.jsonl", data_dir=settings.data_dir)
    rows = sorted(read_rows(file.file), key=lambda row: int(row["key"]))[: settings.limit]
    questions = [
        make_question(settings, row, str(row["key"]), [row["prompt"]], temperature=0, limit=ANSWER_TOKENS)
        for row in rows
    ]
    key_of = {row["prompt"]: str(row["key"]) for row in rows}
    return Benchmark(
        "ifeval",
        questions,
        (file,),
        answer_row=lambda _, row, turns: {
            "key": row["key"],
            "prompt": row["prompt"],
            "response": turns[0],
        },
        # Responses that others have published are known by their prompt alone.
        id_of=lambda row: key_of.get(row["prompt"], str(row["prompt"])),
        answers_file="input_response_data_{model}.jsonl",
        own_temperature=True,
    )


def load_scoring(benchmark: Benchmark, settings: Evaluation, baseline: Baseline | None) -> Benchmark:
    """Code reads the responses: there is no judge and no baseline."""
    questions = [question.row for question in benchmark.questions]

    def ready(known: Mapping[str, JsonObject]) -> None:
        checkers()

    return replace(benchmark, scores=lambda answers, _: [score(questions, answers)], ready=ready)


def score(questions: Sequence[JsonObject], answers: Answers, model: str = "") -> Scores:
    """The scores of one model's responses, rows with `prompt` and `response`, to all of these prompts.

    Measures, in percent: `FIGURES`, and "kind/NAME", the share of a kind of instructions that are followed strictly.
    The 95 % intervals are ours: Wilson's for prompts; for instructions a bootstrap over prompts, since those of one
    prompt hang together.

    Raises:
        InputError: the checkers are not installed, or a prompt has no response.
    """
    need(answers, ("prompt", "response"), "IFEval response")
    response_of = {row["prompt"]: row["response"] for row in answers}
    lacking = sum(question["prompt"] not in response_of for question in questions)
    if lacking:
        raise InputError(f"{lacking} of {len(questions)} IFEval prompts have no response")
    told = [verdicts(question, response_of[question["prompt"]]) for question in questions]
    by_kind: dict[str, list[list[bool]]] = {}
    for question, found in zip(questions, told, strict=True):
        of_prompt: dict[str, list[bool]] = {}
        for name, followed in zip(question["instruction_id_list"], found.strict, strict=True):
            of_prompt.setdefault(name.partition(":")[0], []).append(followed)
        for kind, flags in of_prompt.items():
            by_kind.setdefault(kind, []).append(flags)
    strict, loose = ([[*map(int, flags)] for flags in each] for each in zip(*told, strict=True))
    items = {
        "prompt_strict": [[min(flags)] for flags in strict],
        "prompt_loose": [[min(flags)] for flags in loose],
        "instruction_strict": strict,
        "instruction_loose": loose,
    }
    measures = {
        **{name: _of_prompts(items[name]) for name in FIGURES[:2]},
        **{name: _of_instructions(items[name]) for name in FIGURES[2:]},
        **{f"kind/{kind}": _of_instructions(by_kind[kind]) for kind in sorted(by_kind)},
    }
    return Scores(
        model,
        Identity(
            BENCHMARK,
            judge="",
            rules=f"{LIBRARY} {importlib.metadata.version(LIBRARY)}",
            questions=sha256_of([dict(question) for question in questions]),
        ),
        headline=FIGURES[0],
        unit="%",
        measures=measures,
        scored=len(questions),
        items=items,
    )


def _of_prompts(flags: Sequence[Sequence[int]]) -> Measure:
    whole, n = sum(map(all, flags)), len(flags)
    lower, upper = wilson(whole, n)
    return Measure(100 * whole / n, n, 100 * lower, 100 * upper)


def _of_instructions(flags: Sequence[Sequence[int]]) -> Measure:
    every = [flag for of_prompt in flags for flag in of_prompt]
    lower, upper = bootstrap_mean(flags, low=2.5, high=97.5, seed=0)
    return Measure(100 * sum(every) / len(every), len(every), 100 * lower, 100 * upper)


def verdicts(question: JsonObject, response: str) -> Verdicts:
    """Which of a prompt's instructions a response follows; an empty one follows none.

    Raises:
        InputError: the checkers are not installed, or have no such instruction.
    """
    from if_verifiable.common import get_loose_transformations

    found = Verdicts([], [])
    for name, options in zip(question["instruction_id_list"], question["kwargs"], strict=True):
        follows = _checker(name, options, question["prompt"])
        found.strict.append(bool(response.strip()) and follows(response))
        variants = get_loose_transformations(response)
        found.loose.append(any(text.strip() and follows(text) for text in variants))
    return found


def _checker(name: str, options: JsonObject, prompt: str) -> Callable[[str], bool]:
    """Whether a text follows an instruction."""
    table = checkers()
    if name not in table:
        raise InputError(f"IFEval has no instruction {name!r}")
    letter = str(options.get("letter") or "")
    if name == _LETTERS and letter and not (letter.isascii() and letter.isalpha()):
        # Two prompts ask for "#" and "!". The official program draws a letter at random there and counts that.
        least, wanted = options["let_relation"] == "at least", options["let_frequency"]
        return lambda text: (text.count(letter) >= wanted) == least
    instruction = table[name](name)
    # The copy on the Hub has every option in every row, null where it is another instruction's.
    instruction.build_description(**{key: value for key, value in options.items() if value is not None})
    if "prompt" in (instruction.get_instruction_args() or ()):
        instruction.build_description(prompt=prompt)
    return lambda text: bool(instruction.check_following(text))


def checkers() -> Mapping[str, Any]:
    """The official checkers by instruction, without a download or chance in them.

    Raises:
        InputError: the extra `ifeval` is not installed.
    """
    try:
        import langdetect
        import punkt  # noqa: F401
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise InputError(
            f"IFEval's checkers are not installed ({error.name}): pip install 'slimepo[ifeval]'"
        ) from error
    langdetect.DetectorFactory.seed = 0
    _hand_sentences_over()
    return INSTRUCTION_DICT  # type: ignore[no-any-return]


@functools.cache
def _hand_sentences_over() -> None:
    """Give nltk, which would download it, the model that it splits sentences by; it keeps what it has once read."""
    import nltk
    import punkt
    from if_verifiable.ifeval import instructions_util

    model = punkt.load_model("english")
    files = {
        "abbrev_types.txt": model.abbrev_types,
        "sent_starters.txt": model.sent_starters,
        "collocations.tab": map("\t".join, model.collocations),
        "ortho_context.tab": (f"{word}\t{flags}" for word, flags in model.ortho_context.items()),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, lines in files.items():
            write_text(Path(folder, "tokenizers", "punkt_tab", "english", name), "\n".join(lines))
        nltk.data.path.insert(0, folder)
        instructions_util.count_sentences("One.")
        nltk.word_tokenize("One.")
        nltk.data.path.remove(folder)
