"""The table of docs/reliability.md, from the tests: `python -m tests.reliability.table` writes it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reliability.md"
START, END = "<!-- cases: written by python -m tests.reliability.table -->", "<!-- end of cases -->"


def marked() -> Iterator[tuple[int, str, str]]:
    """Number, words and place of each test with a mark `case(number, words)`."""
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.case":
                    number, words = map(ast.literal_eval, mark.args)
                    yield number, words, f"{file.relative_to(ROOT / 'tests').as_posix()}: {node.name}"


def table() -> str:
    rows = [f"| {number} | {words} | `{place}` |" for number, words, place in sorted(marked())]
    return "\n".join(["| case | what happens | test |", "|---|---|---|", *rows])


def with_table(text: str) -> str:
    """The page's text with the table as the tests have it."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
