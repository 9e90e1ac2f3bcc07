"""Stopping a run from outside, between two steps."""
import multiprocessing
import os
import signal
import threading
from typing import Any, Callable, Dict, Optional

import torch
import torch.distributed as dist

from .device import SINGLE, Ranks

__all__ = ['Interrupted', 'StopRequest', 'TrainingError', 'init_worker']


class TrainingError(RuntimeError):
    """A run that can not go on, in one line for its user."""


class Interrupted(Exception):
    """A run that was stopped by a signal, at a checkpoint.

    Args:
        signum: The signal.
        checkpoint: The file; '' in processes that write none.
    """

    def __init__(self, signum: int, checkpoint: str = '') -> None:
        way_on = f' Go on with --resume {checkpoint}, or --resume auto.' if checkpoint else ''
        super().__init__(f'Interrupted by {signal.Signals(signum).name}.{way_on}')
        self.signum = signum


class StopRequest:
    """SIGTERM and SIGINT, kept until the training asks for them. A second SIGINT interrupts at once.

    Several processes agree on the step to stop after, by a reduction that runs beside the next step.

    Args:
        ranks: The processes of the run.
    """

    def __init__(self, ranks: Ranks = SINGLE) -> None:
        self.signum = 0
        self._group: Any = dist.new_group(backend='gloo') if ranks.distributed else None
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None
        self._handlers: Dict[int, Any] = {}

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc_info) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame) -> None:
        if self.signum == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self.signum = signum

    def __bool__(self) -> bool:
        """Whether to stop now. All processes have to ask alike, and get the same answer."""
        if self._group is None:
            return self.signum > 0
        if self._work is not None:
            self._work.wait()
        agreed = int(self._flag)
        self.signum = max(self.signum, agreed)
        if not agreed:
            self._flag[0] = self.signum
            self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed > 0


def init_worker(worker_init_fn: Optional[Callable], worker_id: int) -> None:
    """Start of a loader's process. Signals to the whole group are the main process's affair, who wants its batches.

    Args:
        worker_init_fn: What to call after that.
        worker_id: Its argument.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()  # not what forked it, which may be the fork server
    if parent is not None and hasattr(signal, 'sigtimedwait'):  # not on every system
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    if worker_init_fn is not None:
        worker_init_fn(worker_id)


def _exit_with(parent: Any) -> None:
    """End when that process asks for it, or is no more."""
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 5)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)
