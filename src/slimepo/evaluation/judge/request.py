"""What passes between a benchmark, a judge and a score: plain data, no network, no third-party import.

A benchmark (`mt_bench`, `arena_hard`, `alpaca_eval`) turns questions and answers into `JudgeRequest`s. A judge
client turns each request into a `JudgeReply`. The benchmark turns replies into the rows of the upstream file
format, and rows, ours or published ones, into `Scores`. Everything but the judge client is a pure function:

    requests = benchmark.judge_requests(questions, answers, ...)
    replies[request.key] = what the judge said               (one or more replies to a request)
    rows = benchmark.judgment_rows(requests, replies, judge)
    scores = benchmark.score(rows, ...)                      {model name: Scores}
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimepo.errors import InputError, UnscoredError
from slimepo.types import Message

UNSCORED_LIMIT = 0.05
SHOWN_REASONS = 5


@dataclass(frozen=True)
class Sampling:
    """How the judge is asked to answer. `top_logprobs` > 0 asks for the log-probabilities of that many tokens."""

    temperature: float
    max_tokens: int
    top_logprobs: int = 0


@dataclass(frozen=True)
class JudgeRequest:
    """One call of a judge.

    `part` says which of an item's calls it is: "turn-1", "turn-2" (MT-Bench), "game-1", "game-2" (Arena-Hard),
    "" (AlpacaEval). `template` names the official prompt. `attempt` counts follow-up requests of the same item
    from 0. `swapped` is True where the model's answer is shown first and the baseline's second.
    """

    benchmark: str
    model: str
    question_id: str
    part: str
    template: str
    messages: tuple[Message, ...]
    sampling: Sampling
    baseline: str | None = None
    category: str | None = None
    swapped: bool = False
    attempt: int = 0

    @property
    def key(self) -> str:
        """Which item of which benchmark this is, whatever the texts are: unique in a run, stable over reruns."""
        return "/".join((self.benchmark, self.model, self.question_id, self.part))

    @property
    def prompt_sha256(self) -> str:
        """Hash of the messages; with the judge's name and `sampling` it identifies the call."""
        return sha256_of([dict(m) for m in self.messages])


@dataclass(frozen=True)
class JudgeReply:
    """What the judge said to one request.

    `top_logprobs` maps tokens at the first position to their log-probabilities in nats, or is None where the
    judge gives none. `error` is the reason where there is no answer at all; `text` is then empty.
    `choice` is the raw choice of the OpenAI protocol, kept in AlpacaEval's annotations. `thought`: it thought aloud
    first, which `text` is without. `without` names what of the request the judge does not take.
    """

    text: str
    top_logprobs: Mapping[str, float] | None = None
    error: str | None = None
    choice: Mapping[str, Any] | None = None
    thought: bool = False
    without: Sequence[str] = ()


# The next request of an item whose replies so far are given; None where no more is asked.
FollowUp = Callable[[JudgeRequest, Sequence[JudgeReply]], JudgeRequest | None]


@dataclass(frozen=True)
class Unscored:
    """An item without a score, and why; never counted as zero."""

    reason: str
    item: str = ""


@dataclass(frozen=True)
class Measure:
    """A figure over `n` rows, with the ends of its interval where the benchmark defines one.

    `unit` is empty where it is that of the scores.
    """

    value: float
    n: int
    lower: float | None = None
    upper: float | None = None
    standard_error: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Identity:
    """What a score depends on beside the model: scores that differ in any of it do not compare.

    `prompts` is a hash of the judge prompt templates (None where only verdicts were published), `rules` the
    version of the scoring rules ("v0.1", "v2.0"), `settings` whatever else was chosen.
    """

    benchmark: str
    judge: str
    rules: str
    prompts: str | None = None
    baseline: str | None = None
    questions: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """The result of one model on one benchmark.

    `headline` names the entry of `measures` that the benchmark reports; `unit` is "1-10" or "%". `official` is
    False where the figure was not made as published, with the reasons in `notes`. `items` is what a measure is a
    mean of, where the benchmark keeps that: a list of 0 and 1 a question, in the order of the questions.
    """

    model: str
    identity: Identity
    headline: str
    unit: str
    measures: Mapping[str, Measure]
    scored: int
    unscored: tuple[Unscored, ...] = ()
    official: bool = True
    notes: tuple[str, ...] = ()
    items: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)


def scores_of_row(row: Mapping[str, Any]) -> Scores:
    """Scores from the plain data (`dataclasses.asdict`) of a score file.

    Raises:
        InputError: the row is something else.
    """
    try:
        parts = {
            "identity": Identity(**row["identity"]),
            "measures": {name: Measure(**measure) for name, measure in row["measures"].items()},
            "unscored": tuple(Unscored(**item) for item in row["unscored"]),
            "notes": tuple(row["notes"]),
        }
        return Scores(**{**row, **parts})
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"this row holds no benchmark scores ({error})") from None


def sha256_of(value: Any) -> str:
    """Hash of plain data: SHA-256 of its JSON with sorted keys, in UTF-8."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def refuse_unscored(scores: Scores, limit: float = UNSCORED_LIMIT) -> Scores:
    """The scores as they are, where at most `limit` (a share, 0 to 1) of the items has no score.

    Raises:
        UnscoredError: more than that has none, or nothing is scored at all.
    """
    total = scores.scored + len(scores.unscored)
    if total == 0 or scores.scored == 0 or len(scores.unscored) > limit * total:
        reasons = most_common(u.reason for u in scores.unscored)
        raise UnscoredError(
            f"{scores.identity.benchmark}: {len(scores.unscored)} of {total} items of {scores.model} have no score "
            f"(limit {limit:.0%}); most often: {reasons or 'no item was judged'}"
        )
    return scores


def one_column(scores: Sequence[Scores]) -> Sequence[Scores]:
    """The scores as they are, where judge, prompts, baseline, questions, rules and settings are the same.

    Raises:
        InputError: they are not; the line names the first field that differs, both values and both models.
    """
    for other in scores[1:]:
        difference = _difference(scores[0], other)
        if difference:
            raise InputError(
                f"{scores[0].model} and {other.model} were not scored alike: {difference}; "
                "put them in separate columns"
            )
    return scores


def columns(scores: Iterable[Scores]) -> list[list[Scores]]:
    """The scores in as few columns as `one_column` allows, in the order in which they come."""
    found: list[list[Scores]] = []
    for each in scores:
        column = next((column for column in found if not _difference(column[0], each)), None)
        if column is None:
            found.append([each])
        else:
            column.append(each)
    return found


def _difference(one: Scores, other: Scores) -> str:
    """Why two scores do not compare; empty where they do."""
    for name in Identity.__dataclass_fields__:
        first, second = getattr(one.identity, name), getattr(other.identity, name)
        if first != second:
            return f"{name} is {first!r} and {second!r}"
    if one.official != other.official or one.headline != other.headline:
        return "only one of them is official, or their figures are not the same kind"
    return ""


def most_common(reasons: Iterable[str]) -> str:
    """The texts with their counts, the most frequent first, at most five of them; empty where there are none."""
    counts = Counter(reasons).most_common()
    told = [f"{text} ({count})" for text, count in counts[:SHOWN_REASONS]]
    more = len(counts) - len(told)
    return "; ".join([*told, *([f"and {more} other reasons"] if more > 0 else [])])
