"""The `persample` command."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from typing import NoReturn

from persample.errors import OptionError, PersampleError, UnknownBackendError

#: What stands for characters of the tables where standard output cannot write them; for others, a question mark.
_ASCII = {"×": "x", "–": "-", "−": "-", "→": "->", "≤": "<=", "±": "+-", "…": "..."}


def main() -> None:
    """Run the command line; errors of the package are printed as one message, without a traceback.

    The exit code is 0 if all went well, 2 if the command line asks for something that does not exist, else 1.
    """
    codecs.register_error("persample.ascii", _in_ascii)
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may be None, or somebody's own
        sys.stdout.reconfigure(errors="persample.ascii")
    try:
        from persample.experiments.app import app
    except ModuleNotFoundError as error:
        _leave(f'{error}; the command needs more packages: pip install "persample[experiments]"', 1)
    try:
        try:
            app(prog_name="persample")
        except SystemExit:
            _flush()
            raise
    except (OptionError, UnknownBackendError) as error:
        _leave(error, 2)
    except PersampleError as error:
        _leave(error, 1)
    except BrokenPipeError:  # the reader has seen enough, as in `persample … | head`
        sys.exit(1)
    except OSError as error:
        _leave(f"{error.filename or 'standard output'}: {error.strerror or error}", 1)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """The error handler of `codecs`, which Python calls for the characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(character, "?") for character in error.object[error.start : error.end]), error.end


def _flush() -> None:
    """Flush standard output; if that fails, keep Python from trying again at exit.

    Raises:
        OSError: The disk is full, or the reader has gone.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _leave(message: object, code: int) -> NoReturn:
    print(f"persample: {message}", file=sys.stderr)
    with contextlib.suppress(OSError):
        _flush()
    sys.exit(code)
