"""Helpers that all commands share: argument types, flags, output files, and errors in one line."""
import argparse
import sys
from pathlib import Path
from typing import Callable, Optional, Sequence

from distill_hooks.errors import one_line

from .files import find_obstacle


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f'{text!r}, expected a whole number of {least} or more')
    return int(text)


def natural_int(text: str) -> int:
    """Parse a whole number of 0 or more (an argparse type)."""
    return _whole_number(text, 0)


def positive_int(text: str) -> int:
    """Parse a whole number of 1 or more (an argparse type)."""
    return _whole_number(text, 1)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, see `timm_dearkd.engine.process.find_device`."""
    parser.add_argument('--device', help='cuda, cpu, cuda:1, ... (default: the accelerator, else the CPU)')


def check_overwrite(files: Sequence[Path], overwrite: bool) -> None:
    """Check that files can be written, before any work.

    Raises:
        ValueError: If a file exists and `overwrite` is false, or its folder is not writable.
    """
    for file in files:
        if file.exists() and not overwrite:
            raise ValueError(f'{str(file)!r} exists. Add --overwrite to replace it, or set another --output.')
        parent = find_obstacle(file.absolute().parent)
        if parent:
            raise ValueError(f'{str(file)!r} cannot be written: no write access to {str(parent)!r}. Set --output.')


def run_command(
        name: str,
        main: Callable[[Optional[Sequence[str]]], None],
        argv: Optional[Sequence[str]] = None,
        hint: str = '',
) -> None:
    """Call a command's `main`; report an error in one line and exit with status 2.

    Args:
        name: Name of the command.
        main: The command. Its `OSError` and `ValueError` are reported on standard error.
        argv: Arguments; None takes those of the process.
        hint: Sentence to add when Ctrl-C interrupts the command (status 130).
    """
    try:
        main(argv)
    except (OSError, ValueError) as e:
        sys.stderr.write(f'{name}: error: {one_line(e, limit=None)}\n')
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f'{name}: Interrupted. {hint}'.rstrip() + '\n')
        sys.exit(130)
