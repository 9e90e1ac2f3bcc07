"""The process: its device, precision and ranks, and the signals that end it."""
import contextlib
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from timm.utils import NativeScaler
from timm.utils.distributed import init_distributed_device_so, is_distributed_env, world_info_from_env

from distill_hooks.errors import one_line

_logger = logging.getLogger(__name__)

TIMM_WORKERS = 4  # timm's default


class Ranks(NamedTuple):
    """Rank of this process, and the number of processes."""
    rank: int = 0
    world_size: int = 1

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    @property
    def is_primary(self) -> bool:
        return self.rank == 0


SINGLE = Ranks()


def check_backend(name: Optional[str], mode: Optional[str] = None) -> None:
    """Refuse a --torchcompile backend, or a mode, that PyTorch does not know.

    Raises:
        ValueError: If PyTorch does not know it.
    """
    if mode and mode not in (modes := torch._inductor.list_mode_options()):
        raise ValueError(f'--torchcompile-mode is {mode!r}, expected one of {", ".join(modes)}.')
    if name and name not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(f'--torchcompile is {name!r}, expected one of {", ".join(torch.compiler.list_backends())}.')


class CompileError(ValueError):
    """An error of `torch.compile` in one line."""


@contextlib.contextmanager
def compile_errors() -> Iterator[None]:
    """Convert the errors of TorchDynamo.

    Raises:
        CompileError: If a model cannot be compiled.
    """
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as e:
        reason = one_line(e)
        raise CompileError(
            f'--torchcompile: the model could not be compiled: {reason} Remove the flag.') from e


def find_device(name: Optional[str]) -> torch.device:
    """Return the device with this name, by default the accelerator or else the CPU, and set its backend options.

    Raises:
        ValueError: If the device is not available.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        device = torch.device(name) if name else accelerator or torch.device('cpu')
    except RuntimeError:
        raise ValueError(f'--device is {name!r}, expected cpu, cuda, cuda:1 or the like.') from None
    count = torch.accelerator.device_count() if accelerator else 0
    local_rank = world_info_from_env()[0] if is_distributed_env() else 0
    if device.type != 'cpu' and accelerator and max(device.index or 0, local_rank) >= count:
        what = f'Process {local_rank} of this machine' if local_rank else f'--device {name}'
        raise ValueError(f'{what} finds no device. Available: {count}, counted from 0. Start fewer processes.')
    if device.type not in ('cpu', accelerator.type if accelerator else 'cpu'):
        raise ValueError(
            f'--device {name} is not available here'
            f' ({accelerator.type if accelerator else "no accelerator"}).'
            f' Use --device {accelerator.type if accelerator else "cpu"}, or remove the flag.')
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    elif device.type == 'cpu':
        # far patches get denormal attention, which slows CPUs many times
        torch.set_flush_denormal(True)
    return device


def default_workers() -> int:
    """Return the number of data-loading processes: timm's 4, or this process's share of the CPU cores if less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(TIMM_WORKERS, max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def use_deterministic_kernels() -> None:
    """Make PyTorch use deterministic kernels. It raises a RuntimeError if an operation has none."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def select_device(name: Optional[str]) -> Tuple[torch.device, Ranks]:
    """Find the device, see `find_device`, and join the other processes under torchrun or Slurm.

    Raises:
        ValueError: If the device is not available.
    """
    device = find_device(name)
    result = init_distributed_device_so(device.type if is_distributed_env() else str(device))
    ranks = Ranks(result['global_rank'], result['world_size'])
    of = f', {ranks.world_size} processes' if ranks.distributed else ''
    if ranks.is_primary:
        _logger.info(f'Running on {result["device"]}{of}.')
    return torch.device(result['device']), ranks


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


def images_per_update(args, ranks: Ranks) -> int:
    """Return the images of all processes per optimizer step."""
    return args.batch_size * args.grad_accum_steps * ranks.world_size


def command_line(argv: Optional[Sequence[str]], ranks: Ranks) -> str:
    """Return the command that started this run, as far as the process knows it."""
    local = os.environ.get('LOCAL_WORLD_SIZE')
    nodes = ranks.world_size // int(local) if local else 1
    launcher = ['python']
    if local and ranks.distributed:
        launcher = ['torchrun', *(['--nnodes', str(nodes)] if nodes > 1 else []), '--nproc_per_node', local]
    if argv is not None and launcher == ['python']:
        return shlex.join(['timm-dearkd', 'train', *argv])
    is_module = argv is not None or sys.modules['__main__'].__spec__ is not None
    script = ['-m', 'timm_dearkd.train'] if is_module else ['train.py']
    return shlex.join([*launcher, *script, *(sys.argv[1:] if argv is None else argv)])


class Precision:
    """Autocast and loss scaling of a run.

    Args:
        device: Device of the run.
        amp_dtype: Type of autocast; None trains in the type of the model.
    """

    def __init__(self, device: torch.device, amp_dtype: Optional[torch.dtype] = None) -> None:
        self.device = device
        self.amp_dtype = amp_dtype
        self.scaler = NativeScaler(device.type) if amp_dtype == torch.float16 and device.type != 'cpu' else None

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)


def model_dtype(args) -> torch.dtype:
    """Return the type of the weights and images, --model-dtype."""
    return getattr(torch, args.model_dtype or 'float32')


class TrainingError(RuntimeError):
    """An error that ends a run, in one line for its user.

    Args:
        problem: What went wrong, in sentences.
        remedy: How to resume, a sentence. '' if the run cannot be resumed as it is.
    """

    def __init__(self, problem: str, remedy: str = '') -> None:
        super().__init__(f'{problem} {remedy}'.rstrip())
        self.problem = problem
        self.remedy = remedy


class Interrupted(Exception):
    """The end of a run by a signal, at a checkpoint.

    Args:
        signum: Number of the signal.
        remedy: How to resume, a sentence.
    """

    def __init__(self, signum: int, remedy: str = '') -> None:
        super().__init__(f'Interrupted by {signal.Signals(signum).name}. {remedy}'.rstrip())
        self.signum = signum


class StopRequest:
    """A SIGTERM or SIGINT that waits until the training asks for it. A second SIGINT interrupts at once.

    Several processes agree on the step to stop after. The reduction runs beside the next step.

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
        """Return whether to stop now. All processes must ask together, and get the same answer."""
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
    """Start a data loading process, which ignores signals to its group: the main process still needs its batches.

    Args:
        worker_init_fn: Function to call next, with `worker_id`.
        worker_id: Number of the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()  # os.getppid() may be the fork server
    if parent is not None and hasattr(signal, 'sigtimedwait'):  # not on every system
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    if worker_init_fn is not None:
        worker_init_fn(worker_id)


def _exit_with(parent: Any) -> None:
    """End this process when its parent sends SIGTERM or has ended."""
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 5)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)
