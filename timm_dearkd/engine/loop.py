"""One epoch of training and one of evaluation."""
import contextlib
import logging
import sys
import time
from typing import Any, Callable, Dict, Iterable, Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from timm.task import TrainingTask
from timm.utils import NativeScaler, dispatch_clip_grad
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .device import Precision

__all__ = ['LossMeter', 'Stepper', 'mean_lr', 'train_one_epoch', 'validate']

_logger = logging.getLogger(__name__)


class LossMeter:
    """Sample-weighted means of named losses, kept on the device until somebody asks."""

    def __init__(self) -> None:
        self.sums: Dict[str, torch.Tensor] = {}
        self.counts: Dict[str, int] = {}

    @torch.no_grad()
    def update(self, losses: Dict[str, torch.Tensor], num_samples: int) -> None:
        for name, loss in losses.items():
            weighted = loss.detach().float() * num_samples
            self.sums[name] = self.sums[name] + weighted if name in self.sums else weighted
            self.counts[name] = self.counts.get(name, 0) + num_samples

    def means(self) -> Dict[str, float]:
        """One synchronisation for all of them."""
        if not self.sums:
            return {}
        values = torch.stack(list(self.sums.values())).tolist()
        return {name: value / self.counts[name] for name, value in zip(self.sums, values)}


class Stepper(NamedTuple):
    """Backward, clipping and the optimiser's step."""
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scaler: Optional[NativeScaler] = None
    clip_grad: Optional[float] = None
    clip_mode: str = 'norm'

    def __call__(self, loss: torch.Tensor, update: bool) -> None:
        """Backward `loss`; update the weights if it is the last of its accumulation."""
        second_order = getattr(self.optimizer, 'is_second_order', False)
        parameters: Iterable[nn.Parameter] = ()
        if update and self.clip_grad is not None:
            parameters = self.task.get_clip_parameters(exclude_head='agc' in self.clip_mode)
        if self.scaler is not None:
            self.scaler(
                loss, self.optimizer, clip_grad=self.clip_grad, clip_mode=self.clip_mode,
                parameters=parameters, create_graph=second_order, need_update=update)
        else:
            loss.backward(create_graph=second_order)
            if update:
                if self.clip_grad is not None:
                    dispatch_clip_grad(parameters, value=self.clip_grad, mode=self.clip_mode)
                self.optimizer.step()
        if update:
            self.optimizer.zero_grad()


@contextlib.contextmanager
def _progress(loader, label: str) -> Iterator[Iterable]:
    """The batches behind a progress bar on a terminal, as they are elsewhere."""
    if not sys.stderr.isatty():
        yield loader
        return
    with logging_redirect_tqdm(), tqdm(loader, desc=label, leave=False, dynamic_ncols=True) as bar:
        yield bar


def _format_losses(losses: Dict[str, float]) -> str:
    return '  '.join(f'{name}: {value:#.4g}' for name, value in losses.items())


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate over the parameter groups."""
    return sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)


def _split_losses(result: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    return {name: value for name, value in result.items() if name != 'output'}


def _accumulation(batch: int, num_batches: int, steps: int) -> Tuple[int, int, bool]:
    """Which update (from 1) a batch (from 0) belongs to, how many batches that adds up, and if this completes it."""
    update = batch // steps + 1
    size = min(steps, num_batches - (update - 1) * steps)
    return update, size, batch + 1 == num_batches or (batch + 1) % steps == 0


def _log_progress(
        head: str,
        losses: Dict[str, float],
        lr: float,
        samples: int,
        seconds: float,
        data_time: float,
) -> None:
    _logger.info(
        f'{head}  {_format_losses(losses)}  LR: {lr:.3e}  {samples / seconds:.1f} img/s  '
        f'Data: {100. * data_time / seconds:.0f}%')


def train_one_epoch(
        epoch: int,
        task: TrainingTask,
        loader,
        step: Stepper,
        precision: Precision,
        lr_scheduler=None,
        grad_accum_steps: int = 1,
        channels_last: bool = False,
        log_interval: int = 50,
        label: str = 'Train',
        on_log: Optional[Callable[[int, torch.Tensor], Any]] = None,
        on_update: Optional[Callable[[int, bool], Any]] = None,
) -> Dict[str, float]:
    """Train for an epoch.

    Args:
        epoch: Counted from 0.
        task: Gives the losses of a batch.
        loader: Batches on the device.
        step: See `Stepper`.
        precision: See `Precision`.
        lr_scheduler: Stepped at every update.
        grad_accum_steps: Batches per update.
        channels_last: Memory format of the images.
        log_interval: Updates between log lines.
        label: Head of the log lines.
        on_log: Called with the number of the update and the images of each log line.
        on_update: Called with the number of every update, counted from 1, and whether it is the epoch's last.

    Returns:
        The mean of every loss by name, over the samples that had it.
    """
    task.train()
    meter, num_batches = LossMeter(), len(loader)
    num_updates = -(-num_batches // grad_accum_steps)
    start = end = time.perf_counter()
    samples, data_time, losses = 0, 0., {}
    step.optimizer.zero_grad()
    with _progress(loader, label) as batches:
        for i, (images, target) in enumerate(batches):
            data_time += time.perf_counter() - end
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with precision.autocast():
                result = task(images, target)
            update, size, is_update = _accumulation(i, num_batches, grad_accum_steps)
            step(result['loss'] / size, is_update)
            meter.update({name: value for name, value in result.items() if name != 'output'}, images.shape[0])
            samples += images.shape[0]
            if is_update:
                done, last = epoch * num_updates + update, update == num_updates
                task.update_ema(step=done)
                if lr_scheduler is not None:
                    lr_scheduler.step_update(num_updates=done, metric=None)
                if on_update is not None:
                    on_update(update, last)
                if last or update % log_interval == 0 or done == 1:
                    losses = meter.means()
                    _log_progress(
                        f'{label} [{update:>4d}/{num_updates} ({100. * update / num_updates:>3.0f}%)]', losses,
                        mean_lr(step.optimizer), samples, time.perf_counter() - start, data_time)
                    if on_log is not None:
                        on_log(update, images)
            end = time.perf_counter()
    if hasattr(step.optimizer, 'sync_lookahead'):
        step.optimizer.sync_lookahead()
    return losses


@torch.no_grad()
def validate(
        model: nn.Module,
        loader,
        evaluator,
        precision: Precision,
        channels_last: bool = False,
        log_interval: int = 50,
        label: str = 'Test',
) -> Dict[str, float]:
    """Evaluate a model.

    Args:
        model: Gives logits; used as it is, in eval mode.
        loader: Batches on the device.
        evaluator: timm's, see `TrainingTask.create_evaluator`.
        precision: See `Precision`.
        channels_last: Memory format of the images.
        log_interval: Batches between log lines.
        label: Head of the log lines.

    Returns:
        The evaluator's metrics: loss, top1, top5.
    """
    was_training = model.training
    model.eval()
    num_batches = len(loader)
    with _progress(loader, label) as batches:
        for i, (images, target) in enumerate(batches):
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with precision.autocast():
                output = model(images)
            evaluator.update(output[0] if isinstance(output, (tuple, list)) else output, target)
            if (i + 1) % log_interval == 0 and i + 1 < num_batches:
                _logger.info(f'{label}: [{i + 1:>4d}/{num_batches}]  {_format_losses(evaluator.summary())}')
    model.train(was_training)
    metrics = evaluator.compute()
    _logger.info(f'{label}: [{num_batches:>4d}/{num_batches}]  {_format_losses(metrics)}')
    return dict(metrics)
