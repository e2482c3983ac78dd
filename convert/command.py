"""How every command of this project ends.

An error that a user can cause (a wrong path, a corrupt file, a full disk, a mistyped option, a diverging training run)
is one line on stderr and exit code 2, without a traceback. Anything else is a bug and keeps its traceback. Ctrl-C ends
with 130, and a reader that goes away, as in `... | head -1`, ends the command quietly.
"""

import os
import sys

import typer

# The base class of usage errors; typer brings its own copy of click or imports it, depending on the version.
_UsageProblem: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def run(app: typer.Typer) -> None:
    """Run `app` with the arguments of the process and exit: 0, 2 for what a user can correct, 130 for Ctrl-C."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more while it shuts down; there must be something to flush into.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except _UsageProblem as error:
        code = _fail(error.format_message())  # type: ignore[attr-defined]
    except (ValueError, OSError, FloatingPointError) as error:
        code = _fail(_describe(error))
    sys.exit(code if isinstance(code, int) else 0)


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    return str(error) or type(error).__name__


def _fail(message: str) -> int:
    if message:  # a command without arguments has printed its help and says no more
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
