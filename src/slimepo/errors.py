"""The errors that slimepo raises on purpose."""


class InputError(ValueError):
    """Something the user gave is wrong.

    The message names the thing, the place and the way out in one line; the command line prints it
    and exits with code 2.
    """


class CertificateError(InputError):
    """A run's loss or gradients are not those of the plain computation, and nothing was trained (exit code 4)."""


class NonFiniteLossError(RuntimeError):
    """The loss of a step is NaN or infinite; the message gives the step and the row ids."""


class UnscoredError(RuntimeError):
    """Too many items of a benchmark have no score for the rest to stand for the whole (exit code 6)."""
