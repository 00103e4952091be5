"""What a benchmark run can be told, on the command line and in a recipe's `evaluate:` list."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from slimepo.settings import Settings

Benchmark = Literal["mt-bench", "arena-hard", "alpaca-eval"]

# Options that one benchmark has and the others do not.
_ONLY = {
    "references": ("mt-bench",),
    "rules": ("arena-hard",),
    "category": ("arena-hard",),
    "style_control": ("arena-hard",),
    "baseline": ("arena-hard", "alpaca-eval"),
}
_OPTION_NAMES = {"style_control": "style-control"}


class Evaluation(Settings):
    """One benchmark of one model.

    judge: `NAME` (OpenAI's API), `NAME@URL`, `URL`, `hf:PATH`; without one only answers are written.
    baseline: an answers file, or a model whose answers are in the same folder; the official one without it.
    rules: Arena-Hard's v0.1 (500 questions) or v2.0 (750); `category` takes one of v2.0's. references: MT-Bench's.
    temperature, max_new_tokens, limit (the first questions only): as published without them; figures made with
    another value are marked unofficial. max_unscored is a share, 0 to 1.
    key_variable: the environment variable with the judge's key, model_key_variable the one of a model behind an
    endpoint; without them OpenAI's own API gets OPENAI_API_KEY and no other server any key.
    price_prompt, price_completion: US dollars per million tokens of the judge.
    stages: in a recipe, the stages after which this runs (the last one without it).
    """

    benchmark: Benchmark
    judge: str | None = None
    key_variable: str | None = None
    model_key_variable: str | None = None
    baseline: str | None = None
    rules: Literal["v0.1", "v2.0"] = "v2.0"
    category: str | None = None
    style_control: Literal["none", "published", "converged"] = "none"
    references: Literal["gpt-4", "gpt-4-1106-preview"] = "gpt-4"
    data_dir: str | None = None
    limit: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    max_new_tokens: int | None = Field(None, ge=1)
    system: str | None = None
    seed: int = Field(0, ge=0)
    backend: Literal["auto", "hf", "vllm"] = "auto"
    batch_rows: int = Field(32, ge=1)
    concurrency: int = Field(8, ge=1)
    attempts: int = Field(8, ge=1)
    timeout: float = Field(180, gt=0)
    price_prompt: float | None = Field(None, ge=0)
    price_completion: float | None = Field(None, ge=0)
    canaries: bool = False
    max_unscored: float = Field(0.05, ge=0, le=1)
    stages: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits_the_benchmark(self) -> Evaluation:
        for name, benchmarks in _ONLY.items():
            default: Any = type(self).model_fields[name].default
            if self.benchmark not in benchmarks and getattr(self, name) != default:
                option = _OPTION_NAMES.get(name, name)
                raise ValueError(f"{option} is an option of {' and '.join(benchmarks)} only")
        if self.rules == "v0.1" and (self.category or self.style_control != "none"):
            raise ValueError("category and style-control belong to rules v2.0")
        return self
