"""The `persample` command."""

from __future__ import annotations

import sys
from typing import NoReturn

from persample.errors import OptionError, PersampleError, UnknownBackendError


def main() -> None:
    """Run the command line; errors of the package are printed as one message, without a traceback.

    The exit code is 0 if all went well, 2 if the command line asks for something that does not exist, else 1.
    """
    try:
        from persample.experiments.app import app
    except ModuleNotFoundError as error:
        _leave(f'{error}; the command needs more packages: pip install "persample[experiments]"', 1)
    try:
        app(prog_name="persample")
    except (OptionError, UnknownBackendError) as error:
        _leave(error, 2)
    except PersampleError as error:
        _leave(error, 1)


def _leave(message: object, code: int) -> NoReturn:
    print(f"persample: {message}", file=sys.stderr)
    sys.exit(code)
