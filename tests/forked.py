"""Scripts in processes of their own that need not import torch first: they are forked from one that has."""
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, Sequence

TESTS = Path(__file__).resolve().parent
# Not the project's own modules, so that scripts have to import them. A name that is not there is passed over.
PRELOAD = ['torch', 'torch.distributed', 'torchvision', 'timm.optim']


def _script(args: Sequence[str], environment: Dict[str, str], cwd: Path, folder: Path) -> None:
    """Be `python ARGS`, a file or with -m; but no exit handler runs in the end, and all hash strings alike."""
    os.setsid()
    for fd, name in ((1, 'out'), (2, 'err')):
        with open(folder / name, 'wb') as f:
            os.dup2(f.fileno(), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # to the default; here it is forkserver
    import numpy as np
    import torch
    np.random.seed()
    torch.set_num_threads(int(environment['OMP_NUM_THREADS']))
    sys.path[:] = [path for path in sys.path if not Path(path).resolve().is_relative_to(TESTS)]
    if args[0] == '-m':
        sys.path.insert(0, str(cwd))
        sys.argv[:] = args[1:]
        runpy.run_module(args[1], run_name='__main__', alter_sys=True)
    else:
        sys.path.insert(0, str(Path(args[0]).resolve().parent))
        sys.argv[:] = args
        runpy.run_path(args[0], run_name='__main__')


def _has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def run_forked(
        args: Sequence[str],
        environment: Dict[str, str],
        cwd: Path,
        timeout: float,
) -> subprocess.CompletedProcess:
    """See `subprocess.run`. The script is to leave no process behind.

    Raises:
        subprocess.TimeoutExpired: It, or what it has started, ran for longer, and was killed.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    command = [sys.executable, *args]
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_script, args=(args, environment, cwd, Path(folder)))
        process.start()
        try:
            process.join(timeout)
            ended = time.monotonic()
            while process.exitcode is not None and _has_processes(process.pid) and time.monotonic() < ended + 10:
                time.sleep(0.05)
        finally:
            is_over = process.exitcode is not None and not _has_processes(process.pid)
            if not is_over:
                process.kill()
                process.join()
                if _has_processes(process.pid):
                    os.killpg(process.pid, signal.SIGKILL)
        out, err = (Path(folder, name).read_text() for name in ('out', 'err'))
    if not is_over:
        raise subprocess.TimeoutExpired(command, timeout, out, err)
    return subprocess.CompletedProcess(command, process.exitcode, out, err)
