"""The command line in this process: as a shell would see it, without the seconds that a new process takes to start."""

import io
import os
import sys
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest.mock import patch

from slimepo import cli


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def slimepo(*arguments: object, stdin: str = "", encoding: str = "utf-8") -> Done:
    """What `slimepo ARGUMENTS` prints in a terminal of this encoding, and its exit code."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
    with (
        patch.object(sys, "argv", ["slimepo", *map(str, arguments)]),
        patch.object(sys, "stdin", io.StringIO(stdin)),
        # Both are set for the process that a command has to itself.
        patch.dict(os.environ),
        warnings.catch_warnings(),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as done:
            code = done.code
        except Exception:
            traceback.print_exc()
            code = 1
    assert isinstance(code, int)
    return Done(code, *(stream.buffer.getvalue().decode(encoding) for stream in (out, err)))
