"""Run a script with DearKD's models: python -m timm_dearkd SCRIPT [ARGUMENT ...]

It is for scripts in a clone of timm, such as validate.py. timm's train.py does not need it: it imports the models with
`--device-modules timm_dearkd`.
"""
import os
import runpy
import sys
from typing import Optional, Sequence

import timm_dearkd  # noqa: F401  registers the architectures


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the script; None takes the arguments of the process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (['-h'], ['--help']):
        print(__doc__)
        return
    if not arguments or not os.path.isfile(arguments[0]):
        what = f'no file {arguments[0]!r}' if arguments else 'no script given'
        command = 'python -m timm_dearkd'
        sys.stderr.write(f'{command}: error: {what}. Expected: {command} SCRIPT [ARGUMENT ...]\n')
        sys.exit(2)
    sys.argv = arguments
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))  # as `python SCRIPT` does
    runpy.run_path(arguments[0], run_name='__main__')


if __name__ == '__main__':
    main()
