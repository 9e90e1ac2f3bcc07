"""The output folder of a run: created exclusively, and locked while a process writes into it."""
import contextlib
import logging
import os
import shutil
import socket
from itertools import count
from pathlib import Path
from typing import Any, Callable, List, Optional

import torch.distributed as dist
from filelock import FileLock, Timeout

from .device import Ranks
from .output import find_checkpoint, refuse_to_overwrite

__all__ = ['LOCK_NAME', 'RunFolder', 'on_primary']

_logger = logging.getLogger(__name__)

LOCK_NAME = '.lock'
WAIT_SECONDS = 10.  # data-loader processes can hold the lock for 5 s after their main process was killed


class RunFolder:
    """Output folder of a run, which one process at a time writes into.

    The lock belongs to the open file (flock), so the kernel drops it when the process ends, however it ends. The lock
    file stays. While the lock is held, the file names the process.

    Args:
        parent: Folder of the run folders.
        name: Name of the run folder; '' creates a new one, named in `create`.
    """

    def __init__(self, parent: str, name: str = '') -> None:
        self.parent = parent
        self.path = os.path.join(parent, name) if name else ''
        self._lock: Optional[FileLock] = None
        self._is_new = False

    def __enter__(self) -> 'RunFolder':
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.release()

    def find_start(self, resume: str) -> str:
        """Lock the folder if it exists, and return the checkpoint to resume from.

        Args:
            resume: A checkpoint, 'auto' for the newest one in the folder, or '' for a new run.

        Raises:
            ValueError: If another process writes into the folder, or if it holds a run that would be overwritten.
        """
        if self.path and os.path.isdir(self.path):
            self._acquire()
        if resume == 'auto':
            resume = find_checkpoint(self.path)
        if self.path:
            refuse_to_overwrite(self.path, resume)
        return resume

    def create(self, default_name: str, resume: str) -> str:
        """Create the folder if it does not exist, lock it, and return its path.

        Args:
            default_name: Name of the folder if none was given. If it is taken, '-2', '-3', ... is appended.
            resume: Checkpoint that `find_start` returned.

        Raises:
            ValueError: If the folder cannot be created, or see `find_start`: another process may have come first.
        """
        try:
            os.makedirs(os.path.dirname(self.path) or self.parent, exist_ok=True)
            if self.path:
                self._is_new = _make_folder(self.path)
            else:
                names = (f'{default_name}-{number}' if number > 1 else default_name for number in count(1))
                self.path = next(path for name in names if _make_folder(path := os.path.join(self.parent, name)))
                self._is_new = True
        except OSError as e:
            path = self.path or self.parent
            raise ValueError(f'Could not make the folder {path!r} ({e.strerror}). Set another --output.') from e
        if self._is_new or self._lock is None:
            self._acquire()
            refuse_to_overwrite(self.path, resume)
        return self.path

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            if self._lock.is_locked:
                _write_owner(self._lock.lock_file, '')
            self._lock.release()
            self._lock = None

    def discard(self) -> None:
        """Unlock the folder, and remove it if this process created it."""
        is_own = self._is_new and self._lock is not None and self._lock.is_locked  # else another process may use it
        if is_own:
            shutil.rmtree(self.path, ignore_errors=True)
        lock_is_left = is_own and os.path.exists(os.path.join(self.path, LOCK_NAME))
        self.release()
        if lock_is_left:  # Windows does not remove an open file
            with contextlib.suppress(OSError):  # if another process has locked the folder by now
                Path(self.path, LOCK_NAME).unlink(missing_ok=True)
                os.rmdir(self.path)

    def _acquire(self) -> None:
        # a soft lock, filelock's substitute for flock, would outlive a process that was killed
        lock = FileLock(os.path.join(self.path, LOCK_NAME), fallback_to_soft=False)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _logger.info(f'{self.path} is locked by {_owner(lock.lock_file)}. Waiting up to {WAIT_SECONDS:g} s.')
                lock.acquire(timeout=WAIT_SECONDS, poll_interval=0.1)
        except Timeout:
            raise ValueError(
                f'Folder {self.path!r} is in use: {_owner(lock.lock_file)} is writing into it. Wait for that process to'
                ' end, or name another --experiment.') from None
        except (NotImplementedError, OSError) as e:
            _logger.warning(
                f'{self.path} cannot be locked ({e}). Do not start a second run with the same --experiment.')
        else:
            _write_owner(lock.lock_file, f'PID {os.getpid()} on {socket.gethostname()}')
        self._lock = lock


def _make_folder(path: str) -> bool:
    """Create a folder; False if it exists."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
        return False
    return True


def _write_owner(lock_file: str, text: str) -> None:
    with contextlib.suppress(OSError):  # Windows refuses to write to a locked file; the text is for messages only
        Path(lock_file).write_text(text)


def _owner(lock_file: str) -> str:
    """The process that holds a lock, in words."""
    try:
        owner = Path(lock_file).read_text()
    except OSError:
        owner = ''
    return f'another process ({owner})' if owner else 'another process'


def on_primary(ranks: Ranks, function: Callable[[], Any]) -> Any:
    """Call a function in the primary process, and return its result in all processes.

    Raises:
        ValueError: In all processes, if the function raised an `OSError` or `ValueError`.
    """
    outcome: List[Any] = [None, None]  # result, error
    if ranks.is_primary:
        try:
            outcome[0] = function()
        except (OSError, ValueError) as e:
            outcome[1] = str(e)
    if ranks.distributed:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        if ranks.distributed:
            dist.barrier()  # the primary must not leave before the others have the message
        raise ValueError(outcome[1])
    return outcome[0]
