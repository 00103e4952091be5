"""What a benchmark run can be told, on the command line and in a recipe's `evaluate:` list."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from slimepo.settings import Settings
from slimepo.words import nearest


class Known(NamedTuple):
    """A benchmark that can be run: its name in print, what it is, and its options among those that not all have."""

    title: str
    summary: str
    options: tuple[str, ...] = ()


_OF_A_JUDGE = ("judge", "key_variable", "price_prompt", "price_completion", "canaries")

# Each is the module of its name in `slimepo.evaluation.benchmarks`, with the two functions that `base` describes.
BENCHMARKS: dict[str, Known] = {
    "ifeval": Known("IFEval", "541 prompts with instructions that code verifies; no judge, no key."),
    "mt-bench": Known("MT-Bench", "80 questions of two turns, graded 1 to 10.", (*_OF_A_JUDGE, "references")),
    "arena-hard": Known(
        "Arena-Hard",
        "answers compared with a baseline's in both orders (--rules v2.0, or v0.1).",
        (*_OF_A_JUDGE, "rules", "category", "style_control", "baseline"),
    ),
    "alpaca-eval": Known(
        "AlpacaEval 2",
        "win rate against gpt-4-1106-preview, raw and length-controlled.",
        (*_OF_A_JUDGE, "baseline"),
    ),
}

STEPS = ("answer", "judge", "score")

# Beside answers and scores: what judges have replied, what models behind endpoints have said so far, and the locks of
# processes at work.
JUDGE_CALLS = "judge_calls"
ANSWER_CALLS = "answer_calls"
LOCKS = ".locks"


def has_option(benchmark: str, name: str) -> bool:
    """Whether a setting means anything to a benchmark."""
    special = {option for known in BENCHMARKS.values() for option in known.options}
    return name not in special or name in BENCHMARKS[benchmark].options


class Evaluation(Settings):
    """One benchmark of one model. Each description is the help of the command line's option of that name too.

    Figures made with another temperature, max_new_tokens or limit than published are marked unofficial.
    """

    benchmark: str
    judge: str | None = Field(
        None,
        min_length=1,
        description="NAME (OpenAI's API), NAME@URL, the URL of a server of one model, or hf:PATH.",
    )
    key_variable: str | None = Field(
        None, description="The environment variable with the judge's key (OpenAI's API: OPENAI_API_KEY)."
    )
    model_key_variable: str | None = Field(None, description="The same for a model behind an endpoint.")
    baseline: str | None = Field(
        None, description="An answers file, or the name of a model that has answered in --out."
    )
    rules: Literal["v0.1", "v2.0"] = Field("v2.0", description="v0.1 has 500 questions, v2.0 750.")
    category: str | None = Field(None, description="With rules v2.0: hard_prompt or creative_writing.")
    style_control: bool = Field(False, description="Score at equal length and markdown (rules v2.0 only).")
    references: Literal["gpt-4", "gpt-4-1106-preview"] = Field(
        "gpt-4", description="Who wrote the reference answers."
    )
    data_dir: str | None = Field(
        None, description="A folder with the benchmarks' files, to work without a network."
    )
    limit: int | None = Field(
        None, ge=1, description="Only this many questions, from the first on (unofficial)."
    )
    temperature: float | None = Field(None, ge=0, description="Instead of the benchmark's own.")
    max_new_tokens: int | None = Field(None, ge=1, description="Instead of the benchmark's own.")
    system: str | None = Field(None, description="A system message for the model.")
    seed: int = Field(0, ge=0, description="Seed of sampled answers.")
    backend: Literal["auto", "hf", "vllm"] = Field("auto", description="What runs a local model.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="What a local model computes in; auto: bfloat16 where a GPU does."
    )
    batch_rows: int = Field(
        32, ge=1, description="Number of answers written side by side; vLLM gets eight times as many."
    )
    concurrency: int = Field(8, ge=1, description="Number of calls under way at once.")
    attempts: int = Field(8, ge=1, description="Attempts before a call is given up.")
    timeout: float = Field(180, gt=0, description="Seconds for one attempt.")
    price_prompt: float | None = Field(
        None, ge=0, description="The judge's price, US dollars per million tokens."
    )
    price_completion: float | None = Field(None, ge=0, description="The same for what it writes.")
    max_unscored: float = Field(
        0.05, ge=0, le=1, description="The largest acceptable share of items without a score."
    )
    canaries: bool = Field(
        False, description="Also judge answers that deserve nothing, and report what they got."
    )
    # In a recipe only: the stages after which this runs (the last one without it).
    stages: list[str] = Field(default_factory=list)

    @field_validator("benchmark")
    @classmethod
    def _known(cls, benchmark: str) -> str:
        if benchmark not in BENCHMARKS:
            raise ValueError(
                f"{benchmark!r} is none of {', '.join(BENCHMARKS)}{nearest(benchmark, BENCHMARKS)}"
            )
        return benchmark

    @model_validator(mode="after")
    def _fits_the_benchmark(self) -> Evaluation:
        for name, field in type(self).model_fields.items():
            default: Any = field.default
            if not has_option(self.benchmark, name) and getattr(self, name) != default:
                having = [each for each, known in BENCHMARKS.items() if name in known.options]
                raise ValueError(f"{name.replace('_', '-')} is an option of {' and '.join(having)} only")
        # The name of a key that nobody asks for changes nothing.
        for name in ("price_prompt", "price_completion", "canaries"):
            if getattr(self, name) == type(self).model_fields[name].default:
                continue
            if self.judge is None:
                raise ValueError(f"{name.replace('_', '-')} needs a judge: give judge")
            if self.judge.startswith("hf:") and name != "canaries":
                raise ValueError(
                    f"{name.replace('_', '-')} is of a judge behind an endpoint: {self.judge} is none"
                )
        if self.rules == "v0.1" and (self.category or self.style_control):
            raise ValueError("category and style-control belong to rules v2.0")
        return self
