"""Bad input of many kinds, made from a seed, through the real command line: what may come of it is the contract.

A case is a command, in a folder of its own with sound files of every kind beside it, one of which, or one value of
which, is wrong. `python -m tests.reliability.fuzz 1000` runs a thousand (`make fuzz`) and lists what broke the
contract: a traceback, an exit code that is none of it, words of more than one line, or a case of more than a minute.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import typer
from ruamel.yaml import YAML

from slimepo.data.render import limited
from tests.command import Done, slimepo

CONTRACT = (0, 2, 3, 4, 5, 6, 75)
SECONDS = 60

# Texts that stand for a value somewhere: of the wrong kind, out of range, or more than anybody meant.
ODD = (
    "", " ", "0", "-1", "-0.5", "1", "3.7", "1e9", "1e400", "1000000000000", "9" * 30, "9" * 5000, "nan",
    ".inf", "-.inf", "null", "~", "true", "false", "yes", "text", "é日本🙂", "a b", "[]", "{}", "[1, 2]", "{a: 1}",
    "[[[1]]]", "[" * 2000 + "]" * 2000, "{a: " * 500 + "1" + "}" * 500, "&a [*a]", "*nowhere",
    "!!python/object/apply:os.system [x]", "2024-13-45", "x" * 300, "../../x", "/", ".", "[/x]", "[bold]",
    "%s{}%(x)s", "{seed}", "'", '"', "a: b: c", "- -", "0x10", "\t", "\x07", "\u202e", "none", "auto",
    "absent.jsonl", "no/where", "file.py:function", "os:system", "http://127.0.0.1:9",
)  # fmt: skip
# Keys of a recipe, of which those of a list are found by name.
KEYS = (
    "model", "tokenizer", "chat_template", "template_options", "adapter", "adapter.r", "adapter.alpha",
    "adapter.dropout", "adapter.target_modules", "dtype", "export_dtype", "parallel", "seed", "seeds", "smoke",
    "rounds", "evaluate", "tasks", "tasks.train", "tasks.heldout", "tasks.checker", "pairs", "data",
    "data.path", "data.split", "data.format", "data.columns", "data.limit", "data.heldout", "data.parts",
    "data.parts.preference", "data.max_length", "data.max_prompt_length", "data.cut_long_responses", "stages",
    "stages.slime", "stages.slime.name", "stages.slime.loss", "stages.slime.loss_options",
    "stages.slime.loss_options.hard_margin", "stages.slime.part", "stages.slime.start",
    "stages.slime.reference", "stages.slime.learning_rate", "stages.slime.epochs", "stages.slime.batch_size",
    "stages.slime.micro_batch_size", "stages.slime.activation_checkpointing", "stages.slime.save_every",
    "stages.slime.answer_every", "stages.slime.rollouts", "stages.slime.reward", "stages.slime.monitor",
    "stages.slime.monitor.every", "stages.slime.args", "unknown", "stages.5.x", "a.b.c",
)  # fmt: skip
SIZES = (
    "architecture", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
    "initializer_range", "hidden_act", "rope_parameters", "attention_dropout", "tie_word_embeddings",
    "pad_token_id", "bos_token_id", "eos_token_id", "attention_bias", "pretraining_tp", "use_cache", "dtype",
    "layer_types",
)  # fmt: skip
TEMPLATES = (
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ ''.__class__.__mro__ }}", "{{ messages[0].content }}",
    "{% for i in range(10**9) %}x{% endfor %}", "{{ messages[99] }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}",
    "{% for", "", "constant", "{{ messages }}", "{{ x.y.z }}", "{% include 'etc/passwd' %}", "{{ messages | tojson }}",
    "{{ 'x' * 10**11 }}", "\x00",
)  # fmt: skip


class Case(NamedTuple):
    """A command in `folder`, and what it is about."""

    kind: str
    arguments: list[str]
    stdin: str = ""


def sound_files(folder: Path) -> None:
    """Everything a command may be given: a model, pairs, a recipe, a sweep, prompts, a run."""
    from tests.tiny import letter_tokenizer, tiny_model

    tiny_model(tied=True, max_position_embeddings=256).save_pretrained(folder / "model")
    letter_tokenizer().save_pretrained(folder / "model")
    pairs = [
        {"prompt": f"add {n}", "chosen": "ab" * (n % 5 + 1), "rejected": "c" * (n % 7 + 1)} for n in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "prompts.txt").write_text("hello\nworld\n")
    recipe = {
        "model": "model",
        "adapter": {"r": 2},
        "data": {"path": "pairs.jsonl", "parts": {"preference": 0.8, "heldout": 0.2}},
        "stages": [{"loss": "slime", "batch_size": 4, "max_steps": 1}],
    }
    write_yaml(folder / "recipe.yaml", recipe)
    write_yaml(folder / "sweep.yaml", {"recipe": "recipe.yaml", "arms": ["slime"], "seeds": [0]})
    done = slimepo("run", folder / "recipe.yaml", "--out", folder / "run", f"model={folder / 'model'}",
                   f"data.path={folder / 'pairs.jsonl'}")  # fmt: skip
    assert done.returncode == 0, done.stderr


def write_yaml(path: Path, value: Any) -> None:
    with path.open("w") as file:
        YAML().dump(value, file)


# --- kinds of cases: each changes files in the folder that it stands in, or gives an odd argument ---------


def of_a_recipe_key(pick: random.Random) -> Case:
    return Case(
        "recipe key", ["run", "recipe.yaml", "--out", "out", f"{pick.choice(KEYS)}={pick.choice(ODD)}"]
    )


def of_an_argument(pick: random.Random) -> Case:
    from slimepo.training.config import PreferenceConfig

    # Writing to a tracker or the Hub is no matter of input.
    names = [
        name for name in PreferenceConfig.__dataclass_fields__ if not name.startswith(("hub_", "trackio_"))
    ]
    key = f"stages.slime.args.{pick.choice(names)}"
    return Case("argument", ["run", "recipe.yaml", "--out", "out", f"{key}={pick.choice(ODD)}"])


def of_a_size(pick: random.Random) -> Case:
    model = {"init": "random", "architecture": pick.choice(("llama", "qwen3", "gemma3")), "hidden_size": 16,
             "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
             "head_dim": 8}  # fmt: skip
    write_yaml(
        Path("recipe.yaml"),
        {**read_yaml("recipe.yaml"), "model": model, "tokenizer": "model", "adapter": None},
    )
    command = pick.choice((["run", "recipe.yaml", "--out", "out"], ["plan", "recipe.yaml"]))
    return Case("size", [*command, f"model.{pick.choice(SIZES)}={pick.choice((*ODD, '3', '7', '100000'))}"])


def of_recipe_text(pick: random.Random) -> Case:
    text = Path("recipe.yaml").read_text()
    at = pick.randrange(len(text))
    aliases = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for one, other in itertools.pairwise("abcdefghij"):
        aliases += f"{other}: &{other} [{', '.join([f'*{one}'] * 9)}]\n"
    odd = pick.choice(ODD)
    cut = (text[:at] + odd + text[at:], text[:at], text[at:])
    made = pick.choice((*cut, odd, f"a: &a {odd}\nb: *a\n{text}", aliases + text))
    Path("recipe.yaml").write_text(made, errors="replace")
    return Case("recipe text", [pick.choice(("run", "plan", "certify", "pairs")), "recipe.yaml"])


def of_data(pick: random.Random) -> Case:
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    row = rows[pick.randrange(3)]
    row[pick.choice((*row, "messages", "label", "weight", "tools", "chat_template_kwargs", "extra"))] = (
        odd_value(pick)
    )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    at = pick.randrange(len(text))
    odd, deep = pick.choice(ODD), '{"prompt": ' * 99 + "1" + "}" * 99
    broken = (
        text, text, text, text[:at], text[:at] + odd + text[at:], "[" * 5000, '{"prompt": ' + "9" * 5000 + "}\n",
        deep + "\n", text.replace("\n", "\r\n"), "\x00" * 50,
    )  # fmt: skip
    name = pick.choice(
        ("pairs.jsonl",) * 4 + ("rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz", "rows.xyz")
    )
    Path(name).write_bytes(pick.choice(broken).encode("utf-8", pick.choice(("replace", "surrogatepass"))))
    command = [
        "data",
        "check",
        name,
        "--model",
        "model",
        *(["--skip-bad-rows"] if pick.random() < 0.3 else []),
    ]
    train = [
        "train",
        "--model",
        "model",
        "--data",
        name,
        "--out",
        "out",
        "batch_size=4",
        "max_steps=1",
        "adapter.r=2",
    ]
    return Case("data", train if pick.random() < 0.2 else command)


def odd_value(pick: random.Random) -> Any:
    deep: Any = "x"
    for _ in range(pick.choice((3, 90, 300))):
        deep = [deep] if pick.random() < 0.5 else {"a": deep}
    call = {"function": {"name": "f", "arguments": "[" * 3000}}
    return pick.choice((
        None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**400, "", " ", "x" * 10_000, "\ud800", "\x00", [], {},
        [[]], [{}], deep, [1, 2], '[{"role": "user"', "<end>", "<bos>", {"role": "user", "content": 5},
        [{"role": "user"}], [{"role": "nobody", "content": "x"}], [{"role": "assistant", "content": "x"}] * 2,
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "assistant", "content": "", "tool_calls": [call]}],
    ))  # fmt: skip


def of_a_template(pick: random.Random) -> Case:
    Path("t.jinja").write_text(pick.choice(TEMPLATES))
    check = ["data", "check", "pairs.jsonl", "--model", "model", "--chat-template", "t.jinja"]
    return Case(
        "template", pick.choice((check, ["run", "recipe.yaml", "--out", "out", "chat_template=t.jinja"]))
    )


def of_a_model_folder(pick: random.Random) -> Case:
    damage(Path("model"), pick)
    return Case("model folder", pick.choice((
        ["run", "recipe.yaml", "--out", "out"], ["generate", "hello", "--model", "model", "--max-new-tokens", "2"],
        ["data", "check", "pairs.jsonl", "--model", "model"], ["plan", "recipe.yaml"], ["export", "model", "out"],
        ["eval", "basics", "--model", "model", "--data", "pairs.jsonl", "--samples", "1", "--max-new-tokens", "2"],
    )))  # fmt: skip


def of_a_run_folder(pick: random.Random) -> Case:
    damage(Path("run"), pick)
    sound = Path("..", "sound").resolve()
    run = [
        "run",
        "recipe.yaml",
        "--out",
        "run",
        f"model={sound / 'model'}",
        f"data.path={sound / 'pairs.jsonl'}",
    ]
    return Case("run folder", pick.choice((
        run, [*run, "--restart"], ["report", "run"], ["export", "run/slime", "out"],
        ["generate", "hello", "--model", "run/slime", "--max-new-tokens", "2"],
    )))  # fmt: skip


def of_generate(pick: random.Random) -> Case:
    options = ("max-new-tokens", "temperature", "top-p", "samples", "seed", "batch-rows", "system", "prompts")
    given = f"--{pick.choice(options)}={pick.choice((*ODD, '1e-300', 'prompts.txt', 'pairs.jsonl', 'model'))}"
    # Behind `--` nothing is an option.
    texts = pick.choice(([], ["--", "hello"], ["--", pick.choice(ODD)]))
    stdin = pick.choice(("", "a\nb\n", "\x00\n", "\ud800\n"))
    return Case("generate", ["generate", "--model", "model", "--max-new-tokens", "2", given, *texts], stdin)


def of_a_command_line(pick: random.Random) -> Case:
    """Any command but those that fetch or train for minutes, with options and values at random."""
    path, command = pick.choice([(p, c) for p, c in commands() if p[0] not in ("fetch", "quickstart")])
    files = ("recipe.yaml", "sweep.yaml", "pairs.jsonl", "model", "run", "prompts.txt", "out")
    given: list[str] = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            given += [pick.choice((*files, *ODD)) for _ in range(pick.randrange(3))]
        elif parameter.required or pick.random() < 0.2:
            value = pick.choice(ODD) if pick.random() < 0.5 else pick.choice(files)
            given += [parameter.opts[0], *([] if getattr(parameter, "is_flag", False) else [value])]
    if pick.random() < 0.1:
        given.append(pick.choice(("--unknown", "-x", "--", "--out")))
    return Case("command line", [*path, *given])


def commands() -> Iterator[tuple[list[str], Any]]:
    """Every command, by the words that name it."""
    from slimepo import cli, cli_eval

    def walk(words: list[str], command: Any) -> Iterator[tuple[list[str], Any]]:
        if not hasattr(command, "commands"):
            yield words, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk([*words, name], inner)

    yield from (each for each in walk([], typer.main.get_command(cli.app)) if each[0] != ["eval"])
    yield from walk(["eval"], typer.main.get_command(cli_eval.app))


def of_a_stage_name(pick: random.Random) -> Case:
    names = (
        "recipe.yaml",
        "eval",
        "..",
        "con",
        "a\\b",
        "a\x00b",
        "é" * 200,
        "x" * 300,
        "status.json",
        "base",
        "a.",
        "-x",
    )
    recipe = read_yaml("recipe.yaml")
    recipe["stages"][0]["name"] = pick.choice((*names, *ODD))
    write_yaml(Path("recipe.yaml"), recipe)
    return Case(
        "stage name",
        [pick.choice(("run", "plan")), "recipe.yaml"],
    )


def damage(folder: Path, pick: random.Random) -> None:
    """Damage one file: cut, emptied, gone, a folder in its place, other bytes, another JSON value."""
    file = pick.choice(
        sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".slimepo-run")
    )
    content = file.read_bytes()
    if file.suffix == ".json" and pick.random() < 0.6:
        value = json.loads(content)
        if isinstance(value, dict) and value and pick.random() < 0.8:
            key = pick.choice(sorted(value))
            value[key] = odd_value(pick)
            if pick.random() < 0.3:
                del value[key]
        else:
            value = odd_value(pick)
        file.write_text(json.dumps(value))
        return
    at = pick.randrange(len(content) or 1)
    file.unlink()
    match pick.randrange(6):
        case 0:
            file.write_bytes(content[:at])
        case 1:
            file.write_bytes(b"")
        case 2:
            file.mkdir()
        case 3:
            file.write_bytes(content[:at] + bytes([pick.randrange(256)]) * 8 + content[at + 8 :])
        case 4:
            file.write_bytes(pick.choice(ODD).encode())


def read_yaml(path: str) -> Any:
    return YAML(typ="safe").load(Path(path).read_text())


KINDS: tuple[Callable[[random.Random], Case], ...] = (
    of_a_recipe_key, of_an_argument, of_a_size, of_recipe_text, of_data, of_a_template, of_a_model_folder,
    of_a_run_folder, of_generate, of_a_command_line, of_a_stage_name,
)  # fmt: skip


# --- running them --------------------------------------------------------------------------------------


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_case(number: int, sound: Path, seed: int = 0) -> tuple[Case, Done, str]:
    """The case of this number, what it printed, and how it broke the contract: nothing where it did not."""
    pick = random.Random(f"{seed}/{number}")
    made = KINDS[number % len(KINDS)]
    with tempfile.TemporaryDirectory(dir=sound.parent) as name:
        shutil.copytree(sound, name, dirs_exist_ok=True)
        started = time.process_time()
        with inside(Path(name)):
            case = made(pick)
            try:
                # A machine may have other things to do: what counts is this process's own time, and a longer limit.
                with limited(10 * SECONDS):
                    done = slimepo(*case.arguments, stdin=case.stdin)
            except TimeoutError:
                done = Done(-1, "", "a hang")
        took = time.process_time() - started
    return case, done, f"took {took:.0f} s" if took > SECONDS else broken(done)


def broken(done: Done) -> str:
    """How an end of a command breaks the contract; nothing where it does not."""
    lines = done.stderr.splitlines()
    if "Traceback" in done.stderr + done.stdout:
        return "a traceback"
    if done.returncode not in CONTRACT:
        return f"exit code {done.returncode}"
    if done.returncode and sum(line.startswith("error: ") for line in lines) != 1:
        return f"{sum(line.startswith('error: ') for line in lines)} lines of error"
    if done.returncode and not lines[-1].startswith("error: "):
        return "words after the error"
    return ""


def main(count: int, first: int = 0) -> int:
    codes: Counter[tuple[str, int]] = Counter()
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder, "sound")
        sound.mkdir()
        sound_files(sound)
        for number in range(first, first + count):
            case, done, how = run_case(number, sound)
            codes[case.kind, done.returncode] += 1
            if how:
                failed.append(number)
                told = " ".join(argument[:60] for argument in case.arguments)
                print(f"{number} {case.kind}: {how}: {told!r}\n    {done.stderr[-600:]!r}", flush=True)
    for kind in sorted({kind for kind, _ in codes}):
        print(f"{kind}: " + ", ".join(f"{n} x {code}" for (k, code), n in sorted(codes.items()) if k == kind))
    print(f"{count} cases, {len(failed)} of them broke the contract: {failed}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
