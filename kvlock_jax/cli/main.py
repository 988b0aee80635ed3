"""The command line: `kvlock edit`, `batch`, `mask`, `app`, `convert` and `info`."""

import argparse
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from kvlock_jax.cli import app, batch, convert, edit, info, mask
from kvlock_jax.cli.terminal import FAILED, INTERRUPTED
from kvlock_jax.errors import Error, InputError
from kvlock_jax.parallel import agreement


def run() -> NoReturn:
    """Runs the program with its arguments and exits with `main`'s status."""
    try:
        status = main(sys.argv[1:])
    except Exception:
        if not agreement.is_joined():
            raise
        traceback.print_exc()  # and no wait for hosts that have ended
        status = FAILED
    if status in (FAILED, INTERRUPTED):  # a thread may still compile or run, and be waited for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name.

    Returns:
      0, 1 if some of many edits failed, 2 for an error that the caller can mend (one line on
      stderr, further ones indented), or 130 after Ctrl-C. Every other exception is a bug, and is
      raised.
    """
    try:
        args, others = _parser().parse_known_args(argv)
        return args.command(args, others) or 0
    except Error as error:
        first, *more = str(error).splitlines()
        print(f"error: {first}", *(f"  {line.strip()}" for line in more), sep="\n", file=sys.stderr)
        agreement.leave(first)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        agreement.leave("interrupted")
        return INTERRUPTED
    except Exception as error:
        agreement.leave(f"{type(error).__name__}: {error}")
        raise


class _Parser(argparse.ArgumentParser):
    """Raises an `InputError` for arguments that are wrong."""

    def error(self, message: str) -> NoReturn:
        """Raises it as one line that names `--help`."""
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "kvlock", description="Training-free video editing: KV-Lock on Wan 2.1 and 2.2."
    )
    version = importlib.metadata.version("kvlock-jax")
    parser.add_argument("--version", action="version", version=f"kvlock {version}")
    commands = parser.add_subparsers(required=True, metavar="edit|batch|mask|app|convert|info")
    for command in (edit, batch, mask, app, convert, info):
        command.add(commands)
    return parser


if __name__ == "__main__":
    run()
