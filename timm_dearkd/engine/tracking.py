"""TensorBoard and Weights & Biases, and the measurements for them."""
import importlib
import os
import time
from collections import deque
from typing import Any, Deque, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from distill_hooks.errors import one_line

from ..attention import ConvAttention

_ENTRY_POINTS = {'tensorboard': ('torch.utils.tensorboard', 'SummaryWriter'), 'wandb': ('wandb', 'init')}


def _import(package: str) -> Any:
    module_name, entry_point = _ENTRY_POINTS[package]
    try:
        module = importlib.import_module(module_name)
        getattr(module, entry_point)  # a folder ./wandb, which W&B leaves behind, is importable too
    except (AttributeError, ImportError) as e:
        raise ValueError(f'--log-{package} needs the {package} package: pip install {package}.') from e
    return module


def check_available(tensorboard: bool = False, wandb: bool = False) -> None:
    """Check that the packages of the given trackers are installed.

    Raises:
        ValueError: If a package is missing.
    """
    for package, wanted in (('tensorboard', tensorboard), ('wandb', wandb)):
        if wanted:
            _import(package)


def _start_run(folder: str, settings: Mapping[str, Any]) -> Any:
    wandb = _import('wandb')
    try:
        return wandb.init(**{'dir': folder, **settings})
    except wandb.Error as e:
        reason = one_line(e).rstrip('.')
        raise ValueError(
            f'W&B could not start the run: {reason}. Log in with `wandb login`, check the --wandb-* options, or set'
            ' WANDB_MODE=offline.') from e


class Tracker:
    """Writes scalars to TensorBoard, Weights & Biases, both or neither.

    Only the primary process of a distributed run uses it.

    Args:
        folder: Output folder of the run. TensorBoard writes to its folder `tensorboard`, W&B to its folder `wandb`.
        tensorboard: Whether to write to TensorBoard.
        wandb: Arguments of `wandb.init`; None does not use W&B.
        first_step: First step that this run logs. TensorBoard deletes later steps of an interrupted run in the same
            folder. W&B keeps them, and ignores the new ones.

    Raises:
        ValueError: If a package is not installed, or W&B does not start a run.
    """

    def __init__(
            self,
            folder: str,
            tensorboard: bool = False,
            wandb: Optional[Mapping[str, Any]] = None,
            first_step: int = 0,
    ) -> None:
        check_available(tensorboard, wandb is not None)
        self._run = _start_run(folder, wandb) if wandb is not None else None
        self._writer: Any = None
        if tensorboard:
            self._writer = _import('tensorboard').SummaryWriter(
                os.path.join(folder, 'tensorboard'), purge_step=first_step)

    @property
    def enabled(self) -> bool:
        return self._run is not None or self._writer is not None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log named values. Steps must not decrease. Values of the same step are one row in W&B."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(dict(values), step=step)

    def close(self, failed: bool = False) -> None:
        """Flush and close. W&B marks a failed run."""
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def __enter__(self) -> 'Tracker':
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        self.close(failed=exc_type is not None)


class _HostEvent:
    """A stand-in for `torch.Event` on the CPU, where a call returns when its work is done."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: '_HostEvent') -> float:
        return 1000. * (end.time - self.time)


class TeacherTimer:
    """Time of a task's teacher, measured by events on the device without synchronisation.

    Args:
        task: Any task. Without a `teacher`, the time is 0.
        device: Device of the teacher.
    """

    def __init__(self, task: nn.Module, device: torch.device) -> None:
        self.device = device
        self._running: Deque[Tuple[Any, Any]] = deque()  # start and end of the forwards that are not added up yet
        self._free: List[Any] = []
        self._milliseconds = 0.
        teacher = getattr(task, 'teacher', None)
        if isinstance(teacher, nn.Module):
            # Tasks compile functions inside the teacher's forward, so these hooks stay outside the graph
            teacher.register_forward_pre_hook(self._begin)
            teacher.register_forward_hook(self._end)

    def _record(self) -> Any:
        if self.device.type == 'cpu':
            event: Any = _HostEvent()
            event.record()
            return event
        event = self._free.pop() if self._free else torch.Event(self.device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self.device))
        return event

    def _begin(self, *_) -> None:
        self._add_up()  # frees the events of finished forwards
        self._start = self._record()

    def _end(self, *_) -> None:
        self._running.append((self._start, self._record()))

    def _add_up(self) -> None:
        while self._running and self._running[0][1].query():
            start, end = self._running.popleft()
            self._milliseconds += start.elapsed_time(end)
            self._free += [start, end]

    def seconds(self) -> float:
        """Return the time of the forwards since the last call. Synchronise before: others are counted later."""
        self._add_up()
        seconds, self._milliseconds = self._milliseconds / 1000., 0.
        return seconds


@torch.no_grad()
def mhca_stats(model: nn.Module) -> Dict[str, torch.Tensor]:
    r"""Return where the MHCA blocks of a model look, without synchronisation.

    Args:
        model: A student, wrapped or not.

    Returns:
        Per block, counted from 1, 'alpha/block1' and 'delta/block1': the means over the heads of the sharpness
        :math:`\alpha` and of the length :math:`|\Delta|` (Euclidean, in patches). Empty for a model without MHCA.
    """
    stats = {}
    for number, block in enumerate(getattr(unwrap_model(model), 'blocks', ()), 1):
        attn = getattr(block, 'attn', None)
        if isinstance(attn, ConvAttention):
            stats[f'alpha/block{number}'] = attn.rpe.alpha.float().mean()
            stats[f'delta/block{number}'] = attn.rpe.delta.float().norm(dim=1).mean()
    return stats


def scalars(tensors: Mapping[str, torch.Tensor]) -> Dict[str, float]:
    """Return 0-dim tensors of one device as numbers, in one transfer."""
    return dict(zip(tensors, torch.stack(list(tensors.values())).tolist())) if tensors else {}
