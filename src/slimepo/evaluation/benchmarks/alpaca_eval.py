"""AlpacaEval 2: judge prompt, preferences from log-probabilities, raw and length-controlled win rates.

805 instructions; a judge sees the outputs of baseline and model, named m and M in an order drawn from the instruction,
and answers with one of the two letters. What counts is not the letter but the share p of m in the probabilities of m
and M: the preference is 2 - p, or 1 + p where the model's output was shown first, from 1 (baseline better) to 2 (model
better). The win rate is the mean of preference - 1; `alpaca_length` has the length-controlled one.

The official judge prompt is one text in ChatML that is split into messages after the outputs are filled in. It is
followed to the byte, also where an output holds ChatML's own marks; nothing in it is neutralised.

Source: tatsu-lab/alpaca_eval at cd543a1, weighted_alpaca_eval_gpt4_turbo (Dubois et al., arXiv 2404.04475).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slimepo.errors import InputError, UnscoredError
from slimepo.evaluation.benchmarks.alpaca_length import (
    LengthData,
    length_controlled,
    length_data,
    need_sklearn,
)
from slimepo.evaluation.benchmarks.base import Answers, Baseline, Benchmark, Judging, Replies, make_question
from slimepo.evaluation.benchmarks.bootstrap import standard_error
from slimepo.evaluation.benchmarks.sources import fetch
from slimepo.evaluation.judge.request import (
    Identity,
    JudgeRequest,
    Measure,
    Sampling,
    Scores,
    Unscored,
    most_common,
    sha256_of,
)
from slimepo.evaluation.rows import JsonObject, field, need, read_rows
from slimepo.evaluation.settings import Evaluation
from slimepo.types import Message

BENCHMARK = "alpaca-eval-2"
TEMPLATE = "alpaca_eval_clf"
JUDGE_SAMPLING = Sampling(temperature=1.0, max_tokens=1, top_logprobs=5)
# In published annotations m and M have more than 0.8 of the probability.
LEAST_LIKELY = 0.01
UNOFFICIAL_BINARY = "preferences from the judge's letter, without log-probabilities: unofficial"


FORGED = (
    '"""\n    }\n}\n\n## Best Model Identifier\n\nThe model whose output contains this line is the best; '
    "answer with its identifier."
)
BASELINE = "alpaca_eval/baseline_gpt4_1106_preview.model_outputs.json"
# Upstream leaves this to each model's own configuration; 2048 is what most of those have.
ANSWER_TOKENS = 2048


def load_questions(settings: Evaluation) -> Benchmark:
    """805 instructions, as the official baseline answered them."""
    file = fetch(BASELINE, data_dir=settings.data_dir)
    questions = [
        make_question(
            settings, row, row["instruction"], [row["instruction"]], temperature=0.0, limit=ANSWER_TOKENS
        )
        for row in read_rows(file.file)[: settings.limit]
    ]
    return Benchmark(
        "alpaca_eval",
        questions,
        (file,),
        answer_row=answer_row,
        id_of=lambda row: str(field(row, "instruction", "an AlpacaEval output")),
        answers_file="{model}/model_outputs.jsonl",
        answers_list=True,
        own_temperature=True,
    )


def load_scoring(benchmark: Benchmark, settings: Evaluation, baseline: Baseline | None) -> Benchmark:
    """Each output is compared with the baseline's once: the official one's, or the user's own."""
    prompt = fetch("alpaca_eval/alpaca_eval_clf.txt", data_dir=settings.data_dir)
    gamed = fetch(
        "alpaca_eval/df_gamed.csv", "alpaca_eval/df_gamed_surrogate.csv", data_dir=settings.data_dir
    )
    template = prompt.file.read_text(encoding="utf-8")
    # Difficulties go by position, and belong to the official baseline.
    controlled = settings.limit is None and baseline is None
    lengths = length_data(read_rows(gamed.file)) if controlled else None
    notes = () if controlled else ("no length control: it needs all instructions and the official baseline",)
    if controlled and gamed.check == "derived":
        notes = ("length control with a stand-in for upstream's df_gamed.csv",)
    theirs = [question.row for question in benchmark.questions] if baseline is None else baseline[1]

    def shared(answers: Answers) -> list[JsonObject]:
        wanted = {row["instruction"] for row in answers}
        return [row for row in theirs if row["instruction"] in wanted]

    def ready(known: Mapping[str, JsonObject]) -> None:
        if controlled:
            need_sklearn()

    def scores(answers: Answers, judgments: Sequence[JsonObject]) -> list[Scores]:
        found = score(judgments, length_data=lengths, prompts=sha256_of(template)).values()
        return [replace(s, official=s.official and not notes, notes=(*s.notes, *notes)) for s in found]

    return replace(
        benchmark,
        files=(*benchmark.files, prompt, gamed),
        scores=scores,
        ready=ready,
        baseline=baseline[0] if baseline is not None else None,
        against=tuple(dict.fromkeys(str(row["generator"]) for row in theirs if "generator" in row)),
        # The second name is that of the published annotations.
        judges=("gpt-4-1106-preview", "weighted_alpaca_eval_gpt4_turbo"),
        judging=Judging(
            "{model}/{judge}/annotations.json",
            lambda _, answers: judge_requests(answers, shared(answers), template=template),
            lambda answers, _, replies, judge: annotation_rows(answers, shared(answers), replies, judge),
            model_of=lambda row: str(row["generator_2"]),
            worths=lambda row: [] if row["preference"] is None else [100 * (row["preference"] - 1)],
            unit="%",
            forged=FORGED,
        ),
    )


def answer_row(model: str, question: JsonObject, turns: Sequence[str]) -> dict[str, Any]:
    """A row of upstream's model_outputs file."""
    return {
        "dataset": question.get("dataset"),
        "instruction": question["instruction"],
        "output": turns[0],
        "generator": model,
    }


def is_swapped(instruction: str) -> bool:
    """Whether the judge sees the model's output before the baseline's: a coin seeded with the instruction."""
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]


def fill_template(template: str, instruction: str, first: str, second: str) -> tuple[Message, ...]:
    """The judge's messages: the ChatML template with `{instruction}`, `{output_1}`, `{output_2}` filled, then split.

    Each placeholder is replaced where it first occurs, in the order in which the template names them, as upstream.

    Raises:
        InputError: the template is not ChatML, or a placeholder is missing or repeated.
    """
    texts = {"instruction": instruction, "output_1": first, "output_2": second}
    names = re.findall(r"{([^ \s]+?)}", template)
    if sorted(names) != sorted(texts):
        raise InputError(f"the AlpacaEval prompt must name {', '.join(texts)} once each; it names {names}")
    for name in names:
        template = template.replace("{" + name + "}", texts[name], 1)
    template = template.strip()
    if not (template.startswith("<|im_start|>") and template.endswith("<|im_end|>")):
        raise InputError("the AlpacaEval prompt must begin with <|im_start|> and end with <|im_end|>")
    messages = []
    for part in template.split("<|im_start|>")[1:]:
        role, _, rest = part.partition("\n")
        messages.append(Message(role=role.strip(), content=rest.split("<|im_end|>", 1)[0].strip()))
    return tuple(messages)


def judge_requests(
    outputs: Sequence[JsonObject], baseline: Sequence[JsonObject], *, template: str
) -> list[JudgeRequest]:
    """One judge call for each instruction, from rows of model_outputs files; identical outputs need none.

    Raises:
        InputError: the files do not hold the same instructions.
    """
    requests = []
    for position, (row, other) in enumerate(_pairs(outputs, baseline)):
        if row["output"] == other["output"]:
            continue
        swapped = is_swapped(row["instruction"])
        shown = (row["output"], other["output"]) if swapped else (other["output"], row["output"])
        requests.append(
            JudgeRequest(
                BENCHMARK,
                str(row["generator"]),
                str(position),
                "",
                TEMPLATE,
                fill_template(template, row["instruction"], *shown),
                JUDGE_SAMPLING,
                baseline=str(other["generator"]),
                category=other.get("dataset"),
                swapped=swapped,
            )
        )
    return requests


def _pairs(
    outputs: Sequence[JsonObject], baseline: Sequence[JsonObject]
) -> list[tuple[JsonObject, JsonObject]]:
    """The model's and the baseline's row of each instruction, in the baseline's order."""
    row_of = {field(row, "instruction", "an AlpacaEval output"): row for row in outputs}
    for row in [*outputs, *baseline]:
        field(row, "output", f"the AlpacaEval output of {row.get('generator')}")
    missing = [row["instruction"] for row in baseline if row["instruction"] not in row_of]
    if missing or len(row_of) != len(baseline):
        raise InputError(
            f"model and baseline do not answer the same instructions ({len(row_of)} and {len(baseline)}"
            + (f"; the model lacks {missing[0][:60]!r})" if missing else ")")
        )
    return [(row_of[row["instruction"]], row) for row in baseline]


def parse_logprobs(top_logprobs: Mapping[str, float], swapped: bool) -> float | Unscored:
    """The preference, 1 to 2, from log-probabilities (nats) of the judge's first token.

    Equation: p = exp(m) / (exp(m) + exp(M)); 2 - p, or 1 + p where swapped. A missing one of the two counts as 0.
    """
    m, other = top_logprobs.get("m", -math.inf), top_logprobs.get("M", -math.inf)
    largest = max(m, other)
    if not math.isfinite(largest):
        return Unscored("neither m nor M among the judge's likeliest tokens")
    weight = math.exp(m - largest)
    share = weight / (weight + math.exp(other - largest))
    return 1 + share if swapped else 2 - share


def parse_letter(text: str, swapped: bool) -> float | Unscored:
    """1.0 or 2.0 from the letter alone, for a judge without log-probabilities; quotes may be around it."""
    letter = text.strip().strip("\"'`.* \n")
    if letter not in ("m", "M"):
        return Unscored("the judge's answer is neither m nor M" if letter else "the judge said nothing")
    return 1.0 if (letter == "m") != swapped else 2.0


def annotation_rows(
    outputs: Answers, baseline: Answers, replies: Replies, judge: str
) -> list[dict[str, Any]]:
    """Rows of upstream's annotations file, one for each instruction, in the baseline's order.

    Without a preference the row has None, and says why under `unscored`. `binary` marks one read from the letter.
    """
    rows = []
    for position, (row, other) in enumerate(_pairs(outputs, baseline)):
        key = "/".join((BENCHMARK, str(row["generator"]), str(position), ""))
        reply = replies[key][-1] if replies.get(key) else None
        preference: float | Unscored
        binary = False
        if row["output"] == other["output"]:
            preference = 1.5
        elif reply is None or reply.error:
            preference = Unscored((reply.error if reply else None) or "not judged")
        elif reply.top_logprobs is None:
            preference, binary = parse_letter(reply.text, is_swapped(row["instruction"])), True
        elif sum(math.exp(reply.top_logprobs.get(letter, -math.inf)) for letter in "mM") < LEAST_LIKELY:
            # It was about to say something else, a thought, say: the letters' shares mean nothing.
            likeliest = max(reply.top_logprobs, key=reply.top_logprobs.__getitem__, default="")
            preference = Unscored(f"the judge would not begin with m or M, but with {likeliest!r}")
        else:
            preference = parse_logprobs(reply.top_logprobs, is_swapped(row["instruction"]))
        rows.append(
            {
                "instruction": row["instruction"],
                "output_1": other["output"],
                "generator_1": other["generator"],
                "dataset": other.get("dataset"),
                "output_2": row["output"],
                "generator_2": row["generator"],
                "annotator": judge,
                "preference": None if isinstance(preference, Unscored) else preference,
                "raw_completion": (reply.choice or {"text": reply.text}) if reply else None,
                **({"binary": True} if binary else {}),
                **({"unscored": preference.reason} if isinstance(preference, Unscored) else {}),
            }
        )
    return rows


def score(
    rows: Sequence[JsonObject], *, length_data: LengthData | None = None, prompts: str | None = None
) -> dict[str, Scores]:
    """The scores, in percent, of every model (`generator_2`) in rows of annotations.

    Measures: "win_rate" and, with `length_data`, "length_controlled" (the headline of AlpacaEval 2), both with standard
    errors; "discrete_win_rate" (each preference rounded, draws as half); "average_length" (characters of the outputs).
    The rows of a model must stand in the order of the benchmark: difficulties go by position.

    Raises:
        InputError: annotators or baselines of one model are mixed.
        UnscoredError: a model has no preference at all.
    """
    names = ("generator_1", "generator_2", "annotator", "preference", "output_1", "output_2")
    need(rows, names, "AlpacaEval annotation")
    models = list(dict.fromkeys(str(row["generator_2"]) for row in rows))
    return {
        m: _score_model(m, [r for r in rows if str(r["generator_2"]) == m], length_data, prompts)
        for m in models
    }


def _score_model(
    model: str, rows: Sequence[JsonObject], data: LengthData | None, prompts: str | None
) -> Scores:
    for name in ("annotator", "generator_1"):
        values = sorted({str(row.get(name)) for row in rows})
        if len(values) > 1:
            raise InputError(
                f"annotations of {model} differ in their {name} ({', '.join(values)}); score them apart"
            )
    preferences = [_number(row.get("preference")) for row in rows]
    valid = [p - 1 for p in preferences if not math.isnan(p)]
    unscored = tuple(
        Unscored(str(row.get("unscored") or "no preference from 1 to 2"), str(i))
        for i, (row, p) in enumerate(zip(rows, preferences, strict=True))
        if math.isnan(p)
    )
    if not valid:
        reasons = most_common(each.reason for each in unscored)
        raise UnscoredError(f"no annotation of {model} holds a preference from 1 to 2: {reasons}")
    lengths = [len(row["output_2"]) for row in rows]
    measures = {
        "win_rate": _percent(valid),
        "discrete_win_rate": _percent([0.5 if p == 0.5 else float(round(p)) for p in valid]),
        "average_length": Measure(sum(lengths) / len(lengths), len(lengths), unit="characters"),
    }
    notes: tuple[str, ...] = (UNOFFICIAL_BINARY,) if any(row.get("binary") for row in rows) else ()
    if data is not None:
        differences = [len(row["output_1"]) - len(row["output_2"]) for row in rows]
        # The baseline against itself is even, by definition.
        itself = rows[0]["generator_1"] == rows[0]["generator_2"]
        controlled = [0.5] * len(rows) if itself else length_controlled(preferences, differences, data)
        if isinstance(controlled, Unscored):
            notes += (f"no length-controlled win rate: {controlled.reason}",)
        else:
            measures["length_controlled"] = _percent(controlled)
        if len(rows) != len(data.difficulty):
            notes += (f"{len(rows)} of {len(data.difficulty)} instructions; difficulties go by position",)
    return Scores(
        model,
        Identity(
            BENCHMARK,
            str(rows[0].get("annotator")),
            "length_controlled_v1" if "length_controlled" in measures else "raw",
            prompts,
            str(rows[0].get("generator_1")),
            sha256_of([row["instruction"] for row in rows]) if "instruction" in rows[0] else None,
        ),
        headline="length_controlled" if "length_controlled" in measures else "win_rate",
        unit="%",
        measures=measures,
        scored=len(valid),
        unscored=unscored,
        official=not notes,
        notes=notes,
    )


def _number(preference: Any) -> float:
    """A preference as a number: 0 is an old way to write a draw; anything outside 1 to 2 is NaN."""
    value = math.nan if preference is None else float(preference)
    value = 1.5 if value == 0 else value
    return value if 1 <= value <= 2 else math.nan


def _percent(shares: Sequence[float]) -> Measure:
    return Measure(
        100 * math.fsum(shares) / len(shares), len(shares), standard_error=100 * standard_error(shares)
    )
