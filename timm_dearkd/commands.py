"""Helpers that all commands share: argument types, flags, output files, and errors in one line."""
import argparse
import sys
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

from distill_hooks.errors import one_line

from .files import find_obstacle


def limited(kind: Callable[[str], Any], expected: str, is_valid: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Return a type for argparse that refuses values outside its limits."""
    def convert(text: str) -> Any:
        value = kind(text)
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f'{text}, expected {expected}')
        return value

    convert.__name__ = kind.__name__  # argparse names it in its errors
    return convert


POSITIVE_INT = limited(int, '1 or more', lambda value: value >= 1)
NON_NEGATIVE_INT = limited(int, '0 or more', lambda value: value >= 0)
POSITIVE = limited(float, 'more than 0', lambda value: value > 0)
NON_NEGATIVE = limited(float, '0 or more', lambda value: value >= 0)
SHARE = limited(float, '0 to 1', lambda value: 0 <= value <= 1)
POSITIVE_SHARE = limited(float, 'a share above 0, 1 at the most', lambda value: 0 < value <= 1)
RATE = limited(float, '0 or more, less than 1', lambda value: 0 <= value < 1)


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
