"""Scripts in processes of their own that need not import torch first: they are forked from one that has."""
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Sequence

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['torch', 'torchvision', 'timm.optim', 'timm_dearkd', 'distill_hooks'])


def _script(args: Sequence[str], environment: Dict[str, str], cwd: Path, folder: Path) -> None:
    """What `python ARGS` does with its file, or with -m."""
    os.setsid()
    for fd, name in ((1, 'out'), (2, 'err')):
        with open(folder / name, 'wb') as f:
            os.dup2(f.fileno(), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # as a new Python has it
    import torch
    torch.set_num_threads(int(environment['OMP_NUM_THREADS']))
    if args[0] == '-m':
        sys.argv[:], sys.path[0] = args[1:], str(cwd)
        runpy.run_module(args[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv[:], sys.path[0] = args, str(Path(args[0]).resolve().parent)
        runpy.run_path(args[0], run_name='__main__')


def run_forked(args: Sequence[str], environment: Dict[str, str], cwd: Path, timeout: float):
    """See `subprocess.run`.

    Raises:
        subprocess.TimeoutExpired: It ran for longer, and was killed, with all that it had started.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=_script, args=(args, environment, cwd, Path(folder)))
        process.start()
        try:
            process.join(timeout)
            if process.is_alive():
                raise subprocess.TimeoutExpired(list(args), timeout)
        finally:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
        out, err = (Path(folder, name).read_text() for name in ('out', 'err'))
    return subprocess.CompletedProcess(list(args), process.exitcode, out, err)
