"""Made-up files of the benchmarks in the official layout: few, short questions, every field that is read."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimepo.evaluation.benchmarks import mt_bench
from slimepo.evaluation.benchmarks.sources import SOURCES, Source

JUDGE = (
    "Please act as an impartial judge and rate how good the answer is that an assistant gave to the question of a "
    "user below. Look at whether it is right, helpful, relevant, deep and creative, and at nothing else: neither the "
    "order of answers, nor their length, nor the names of those who gave them may change your mind. "
)
# Three questions of the first category, so that the first three are alike, and one of each other.
CATEGORIES = ["writing", "writing", *mt_bench.CATEGORIES]
SINGLE = (
    "[Question]\n{question}\n\n[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
)
DOUBLE = (
    "### User:\n{question_1}\n\n### Assistant:\n{answer_1}\n\n"
    "### User:\n{question_2}\n\n### Assistant:\n{answer_2}"
)
GAME = (
    "<|User Prompt|>\\n{QUESTION}\\n\\n<|The Start of Assistant A's Answer|>\\n{ANSWER_A}\\n<|The End of Assistant A's "
    "Answer|>\\n\\n<|The Start of Assistant B's Answer|>\\n{ANSWER_B}\\n<|The End of Assistant B's Answer|>"
)
ALPACA = (
    "<|im_start|>system\n"
    + JUDGE
    + "\n<|im_end|>\n<|im_start|>user\n"
    + JUDGE
    + "\n## Instruction\n{instruction}\n"
    "## Outputs\nm: {output_1}\nM: {output_2}\nAnswer with the model identifier, m or M.\n<|im_end|>\n"
)


def answer(question: Mapping[str, Any], model: str, at: int) -> dict[str, Any]:
    """An answer to an Arena-Hard question; length and markdown differ from answer to answer."""
    lists = "\n- so" * (at % 3)
    return {
        "uid": question["uid"],
        "ans_id": f"{model}-{at}",
        "model": model,
        "messages": [
            {"role": "user", "content": question["prompt"]},
            {"role": "assistant", "content": {"answer": f"It is {at}.{lists}"}},
        ],
        "tstamp": 0.0,
        "metadata": {
            "token_len": 5 + 3 * at,
            "header_count": {"h1": at % 2, "h2": 0, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
            "list_count": {"ordered": 0, "unordered": at % 3},
            "bold_count": {"**": at % 5, "__": 0},
        },
    }


def mt_bench_files() -> dict[str, Any]:
    questions = [
        {"question_id": 81 + at, "category": category, "turns": [f"Tell me a story of {at}.", "And then?"]}
        for at, category in enumerate(CATEGORIES)
    ]
    prompts = []
    for math in (False, True):
        name = "single-math-v1" if math else "single-v1"
        one, two = ("", "")
        if math:
            one, two = "[Reference]\n{ref_answer_1}\n", "[Reference]\n{ref_answer_1}\n{ref_answer_2}\n"
        texts = {name: f"[Instruction]\n{JUDGE}\n{one}{SINGLE}", f"{name}-multi-turn": two + DOUBLE}
        prompts += [
            {
                "name": key,
                "type": "single",
                "system_prompt": JUDGE + "End in a rating from 1 to 10: [[rating]].",
                "prompt_template": text,
                "output_format": "[[rating]]",
            }
            for key, text in texts.items()
        ]
    references = {
        f"mt_bench/reference_answer/{judge}.jsonl": [
            {
                "question_id": question["question_id"],
                "model_id": judge,
                "choices": [{"index": 0, "turns": [f"As {judge} knows, yes.", "Then no."]}],
            }
            for question in questions
            if question["category"] in mt_bench.WITH_REFERENCE
        ]
        for judge in ("gpt-4", "gpt-4-1106-preview")
    }
    return {"mt_bench/question.jsonl": questions, "mt_bench/judge_prompts.jsonl": prompts} | references


def arena_hard_files() -> dict[str, Any]:
    """v0.1 and v2.0; of v2.0 the answers of the second category's baseline are missing."""
    old = [
        {"uid": f"old{at}", "category": "arena-hard-v0.1", "cluster": "c", "prompt": f"How old is {at}?"}
        for at in range(4)
    ]
    categories = [("hard_prompt", "coding"), ("hard_prompt", "math")] * 6 + [("creative_writing",) * 2] * 4
    new = [
        {"uid": f"new{at}", "category": category, "subcategory": sub, "prompt": f"What is {at} + 1?"}
        for at, (category, sub) in enumerate(categories)
    ]
    baselines = {
        "hard_prompt": "o3-mini-2025-01-31",
        "creative_writing": "gemini-2.0-flash-001",
        "arena-hard-v0.1": "gpt-4-0314",
    }
    hard = [question for question in new if question["category"] == "hard_prompt"]
    return {
        "arena_hard/v0.1/question.jsonl": old,
        "arena_hard/v0.1/answer.gpt-4-0314.jsonl": [answer(q, "gpt-4-0314", at) for at, q in enumerate(old)],
        "arena_hard/v2.0/question.jsonl": new,
        "arena_hard/v2.0/answer.o3-mini-2025-01-31.jsonl": [
            answer(q, "o3-mini-2025-01-31", at) for at, q in enumerate(hard)
        ],
        # Longer than the context of a small model, as the official ones are.
        "arena_hard/config/judge_settings.json": {
            category: {"baseline": baseline, "system_prompt": 8 * JUDGE + "End in [[A>B]]."}
            for category, baseline in baselines.items()
        },
        "arena_hard/config/arena-hard-v0.1.yaml": f'prompt_template: "{GAME}"\n',
        "arena_hard/config/arena-hard-v2.0.yaml": f'prompt_template: "{GAME}"\n',
    }


def alpaca_eval_files() -> dict[str, Any]:
    instructions = [f"Who is {name}?" for name in ("Lily", "Ben", "Tom", "Mia", "Sam", "Ann")]
    gamed = "preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline,model\n"
    for at in range(2 * len(instructions)):
        index, concise = divmod(at, 2)
        length = (1.5 if concise else -1.5) + index / 7
        gamed += f"{0.3 + at / 40},{index},{length},{index / 3 - 1},False,gpt4_1106_preview_{concise}\n"
    return {
        "alpaca_eval/baseline_gpt4_1106_preview.model_outputs.json": [
            {
                "dataset": "made",
                "instruction": text,
                "output": f"It is {'so ' * at}long.",
                "generator": "gpt4_1106_preview",
            }
            for at, text in enumerate(instructions)
        ],
        "alpaca_eval/alpaca_eval_clf.txt": ALPACA,
        "alpaca_eval/df_gamed_surrogate.csv": gamed,
    }


def ifeval_files() -> dict[str, Any]:
    """Prompts of our own, out of order, with instructions of five kinds."""
    asked: list[tuple[str, dict[str, Any]]] = [
        ("Tell me of frogs. Use no commas at all.", {"punctuation:no_comma": {}}),
        (
            "Name a frog in capital letters, and write of it in two sentences or more.",
            {
                "change_case:capital_word_frequency": {
                    "capital_relation": "at least",
                    "capital_frequency": 1,
                },
                "length_constraints:number_sentences": {"relation": "at least", "num_sentences": 2},
            },
        ),
        (
            "Praise ponds, with two signs # and the word pond.",
            {
                "keywords:letter_frequency": {"letter": "#", "let_relation": "at least", "let_frequency": 2},
                "keywords:existence": {"keywords": ["pond"]},
            },
        ),
        ("Greet a frog in German.", {"language:response_language": {"language": "de"}}),
    ]
    rows = [
        {"key": 10 - at, "prompt": prompt, "instruction_id_list": list(told), "kwargs": list(told.values())}
        for at, (prompt, told) in enumerate(asked)
    ]
    return {"ifeval/input_data.jsonl": rows}


def write_files(folder: Path) -> Path:
    files = ifeval_files() | mt_bench_files() | arena_hard_files() | alpaca_eval_files()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else dumped(content, path.suffix))
    return folder


def dumped(content: Mapping[str, Any] | Sequence[Any], suffix: str) -> str:
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in content)
    return json.dumps(content, indent=1)


def pins(folder: Path) -> dict[str, Source]:
    """The sources whose files are in `folder`, pinned to what these hold."""
    return {
        name: replace(source, digest=hashlib.sha256((folder / name).read_bytes()).hexdigest())
        for name, source in SOURCES.items()
        if (folder / name).is_file()
    }
