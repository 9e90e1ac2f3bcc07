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
from typing import Dict, Optional, Sequence, Tuple

TESTS = Path(__file__).resolve().parent
# Not the project's own modules, so that scripts have to import them. A name that is not there is passed over.
PRELOAD = ['torch', 'torch.distributed', 'torchvision', 'timm.optim', 'scipy.optimize']


def _script(args: Sequence[str], environment: Dict[str, str], cwd: Path, folder: Path, fresh: Sequence[str]) -> None:
    """Be `python ARGS`, a file, -m or -c; but no exit handler runs in the end, and all hash strings alike."""
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
    for name in list(sys.modules):
        if name.partition('.')[0] in fresh:
            del sys.modules[name]
    if args[0] == '-c':
        sys.argv[:] = ['-c', *args[2:]]
        exec(compile(args[1], '<string>', 'exec'), vars(sys.modules['__main__']))
    elif args[0] == '-m':
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


class ForkedProcess:
    """The part of `subprocess.Popen` that tests use, for a script that leaves no process behind.

    Args:
        args: Arguments of Python.
        environment: Its variables.
        cwd: Its working directory.
        fresh: Packages to import again, because they read variables when they are imported.
    """

    def __init__(self, args: Sequence[str], environment: Dict[str, str], cwd: Path, fresh: Sequence[str] = ()) -> None:
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(PRELOAD)
        self.args = [sys.executable, *args]
        self._folder = tempfile.TemporaryDirectory()
        self._process = context.Process(
            target=_script, args=(args, environment, cwd, Path(self._folder.name), fresh))
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> Optional[int]:
        """Return the exit status; None while the script runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> Optional[int]:
        """See `poll`."""
        return self._process.exitcode

    def communicate(self, timeout: float = 500) -> Tuple[str, str]:
        """Wait for the end of the script, and return its standard output and standard error.

        Raises:
            subprocess.TimeoutExpired: If the script, or a process that it started, runs for longer. It is killed.
        """
        try:
            self._process.join(timeout)
            ended = time.monotonic()
            while self.poll() is not None and _has_processes(self.pid) and time.monotonic() < ended + 10:
                time.sleep(0.05)
        finally:
            is_over = self.poll() is not None and not _has_processes(self.pid)
            if not is_over:
                self._process.kill()
                self._process.join()
                if _has_processes(self.pid):
                    os.killpg(self.pid, signal.SIGKILL)
        out, err = (path.read_text() if path.exists() else '' for path in (
            Path(self._folder.name, name) for name in ('out', 'err')))
        self._folder.cleanup()
        if not is_over:
            raise subprocess.TimeoutExpired(self.args, timeout, out, err)
        return out, err
