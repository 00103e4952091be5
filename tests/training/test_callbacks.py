"""What is shown while a model trains: a panel in a terminal, plain lines elsewhere."""

import io
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from slimepo.terminal import make_console
from slimepo.training.callbacks import TrainingProgress, log_lines, peak_memory

STEP: dict[str, Any] = {
    "loss": 0.612, "loss/chosen": 0.04, "loss/rejected": 0.05, "loss/distance": 0.522, "logps/chosen": -0.41,
    "logps/rejected": -0.69, "margin": 0.28, "tokens_per_second": 12345.6, "padding_share": 0.07,
}  # fmt: skip
PROBE = {
    "monitor/heldout/chosen_change": -0.02,
    "monitor/heldout/chosen_fell": 0.34,
    "monitor/heldout/chosen_pairs": 64,
    "monitor/train/chosen_change": 0.1,
}


def progress(terminal: bool) -> tuple[TrainingProgress, io.StringIO]:
    file = io.StringIO()
    console = make_console(file=file, force_terminal=terminal, width=160, color_system=None)
    return TrainingProgress(console, "slime"), file


def play(shown: TrainingProgress, *logs: dict[str, Any]) -> None:
    """A run of 8 steps with a log line after each of the first ones."""
    args, control = TrainingArguments(output_dir="unused", report_to="none"), TrainerControl()
    state = TrainerState(max_steps=8)
    shown.on_train_begin(args, state, control)
    for line in logs:
        state.global_step += 1
        shown.on_step_end(args, state, control)
        shown.on_log(args, state, control, logs=line)


def test_a_step_in_one_line() -> None:
    (line,) = log_lines(STEP)
    assert line.startswith(
        "loss 0.612 = chosen 0.040 + rejected 0.050 + distance 0.522 · chosen -0.410 · rejected -0.690 · Δ 0.280 · "
        "12,346 tok/s · padding 7%"
    )
    assert line.endswith("GiB at most")


def test_the_monitors_figures_are_a_second_line_and_prefer_held_out_pairs() -> None:
    _, line = log_lines(STEP | PROBE)
    assert line == "since step 0: chosen answers held out -0.020 nats per token, 34% of 64 fell"
    trained = {
        "monitor/train/chosen_change": 0.1,
        "monitor/train/chosen_fell": 0.2,
        "monitor/train/chosen_pairs": 12,
    }
    assert (
        log_lines(STEP | trained)[1]
        == "since step 0: chosen answers trained on +0.100 nats per token, 20% of 12 fell"
    )


def test_an_objective_without_terms_has_none() -> None:
    (line,) = log_lines({"loss": 1.5, "logps/chosen": -0.5})
    assert line.startswith("loss 1.500 · chosen -0.500")


def test_without_a_terminal_each_log_is_one_plain_line() -> None:
    shown, file = progress(terminal=False)
    play(shown, STEP, STEP | PROBE)
    first, second = file.getvalue().splitlines()
    assert first.startswith("slime 1/8 loss 0.612")
    assert "since step 0" in second
    shown.warn("step 2: chosen answers fell")
    assert file.getvalue().splitlines()[-1] == "slime: step 2: chosen answers fell"


def test_in_a_terminal_a_panel_keeps_the_last_figures_and_warnings_stand_above_it() -> None:
    shown, file = progress(terminal=True)
    play(shown, STEP | PROBE, STEP | {"loss": 0.5})
    shown.warn("step 2: chosen answers fell")
    out = io.StringIO()
    make_console(file=out, width=160).print(shown._panel(), soft_wrap=False)
    bar, step, probe = out.getvalue().splitlines()
    assert "slime" in bar
    assert "2/8" in bar
    assert "loss 0.500" in step
    assert "since step 0: chosen answers held out -0.020" in probe
    shown.close()
    assert "slime: step 2: chosen answers fell" in file.getvalue()
    shown.close()  # training that fails closes it twice


def test_a_narrow_terminal_shows_every_figure_too() -> None:
    shown, _ = progress(terminal=True)
    play(shown, STEP | PROBE)
    out = io.StringIO()
    make_console(file=out, width=40).print(shown._panel(), soft_wrap=False)
    shown.close()
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    words = " ".join(" ".join(lines[1:]).split())
    assert words == " ".join(shown.facts)


def test_memory_is_a_plausible_number_of_bytes() -> None:
    most = peak_memory()
    assert most is None or 2**24 < most < 2**44
