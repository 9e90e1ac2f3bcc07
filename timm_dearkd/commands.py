"""What the commands have in common."""
import sys
from typing import Callable, Optional, Sequence

__all__ = ['run_command']


def run_command(
        name: str,
        main: Callable[[Optional[Sequence[str]]], None],
        argv: Optional[Sequence[str]] = None,
        hint: str = '',
) -> None:
    """Call a command's `main`; what it refuses becomes one line on standard error, and status 2.

    Args:
        name: Of the command.
        main: Raises `OSError` or `ValueError` where it can't go on.
        argv: Its arguments; None are those of the process.
        hint: What to say of an interruption by Ctrl-C, whose status is 130.
    """
    try:
        main(argv)
    except (OSError, ValueError) as e:
        sys.stderr.write(f'{name}: error: {" ".join(str(e).split())}\n')
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f'{name}: Interrupted. {hint}'.rstrip() + '\n')
        sys.exit(130)
