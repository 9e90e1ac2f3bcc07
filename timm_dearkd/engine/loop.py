"""One epoch of training and one of evaluation."""
import contextlib
import logging
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.task import TrainingTask, evaluation_sample_limit
from timm.utils import NativeScaler, dispatch_clip_grad
from torch.utils.data import IterableDataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .process import SINGLE, Precision, Ranks, TrainingError
from .tracking import TeacherTimer

_logger = logging.getLogger(__name__)

_LEAST_LOSS_SCALE = 2. ** -14  # the scaler starts at 65536, and halves it at each step that overflows


class LossMeter:
    """Sample-weighted means of named losses, kept on the device until they are read.

    Batches with losses that are not finite do not count. The first such losses are kept for the message.
    """

    def __init__(self, ranks: Ranks = SINGLE) -> None:
        self.ranks = ranks
        self.names: List[str] = []
        self.sums: Optional[torch.Tensor] = None  # sum of each loss, then the number of samples
        self.first_nonfinite: Optional[torch.Tensor] = None  # its update and losses; zeros if all were finite

    @torch.no_grad()
    def update(self, losses: Dict[str, torch.Tensor], num_samples: int, update: int = 0) -> torch.Tensor:
        """Add the losses of a batch. Return whether all are finite, as a tensor () on the device."""
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        finite = values.isfinite().all()
        row = torch.cat([values * num_samples, values.new_full((1,), num_samples)])
        nonfinite = torch.cat([values.new_full((1,), update), values])
        if self.sums is None or self.first_nonfinite is None or self.names != list(losses):  # another stage
            self.names = list(losses)
            self.sums, self.first_nonfinite = torch.zeros_like(row), torch.zeros_like(nonfinite)
        self.sums = self.sums + torch.where(finite, row, 0.)
        self.first_nonfinite = torch.where(finite | (self.first_nonfinite[0] > 0), self.first_nonfinite, nonfinite)
        return finite

    def means(self) -> Dict[str, float]:
        """Return the means over all processes, with one synchronisation."""
        sums = self._total()
        if sums is None:
            return {}
        *values, count = sums.tolist()
        return {name: value / count if count else float('nan') for name, value in zip(self.names, values)}

    def take_first_nonfinite(self) -> Tuple[int, Dict[str, float]]:
        """Return update and losses of the first batch with a loss that was not finite; update 0 if there is none.

        The next call looks at the batches after this one.
        """
        if self.first_nonfinite is None:
            return 0, {}
        update, *values = self.first_nonfinite.tolist()
        self.first_nonfinite = torch.zeros_like(self.first_nonfinite)
        return int(update), dict(zip(self.names, values))

    def _total(self) -> Optional[torch.Tensor]:
        """Return the sums over all processes."""
        if self.sums is None or not self.ranks.distributed:
            return self.sums
        sums = self.sums.clone()
        dist.all_reduce(sums)
        return sums

    def state_dict(self) -> Dict[str, Any]:
        sums = self._total()
        return dict(names=self.names, sums=None if sums is None else sums.cpu())

    def load_state_dict(self, state: Dict[str, Any], device: torch.device) -> None:
        if state['sums'] is not None:
            self.names, sums = list(state['names']), state['sums'].to(device)
            self.sums = sums if self.ranks.is_primary else torch.zeros_like(sums)  # counted once
            self.first_nonfinite = torch.zeros_like(sums)


class RunningStats:
    """BatchNorm's running statistics, restored after a forward that overflows.

    Args:
        model: The model in training.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [getattr(m, name, None) for m in model.modules() for name in ('running_mean', 'running_var')]
        self.buffers = [b for b in named if isinstance(b, torch.Tensor)]
        self.before: Optional[torch.Tensor] = None

    def keep(self) -> None:
        """Store the present statistics."""
        if self.buffers:
            self.before = torch.cat([b.detach().flatten() for b in self.buffers])

    @torch.no_grad()
    def restore_unless(self, finite: torch.Tensor) -> None:
        """Restore the stored statistics, unless they and the losses are finite. This does not synchronise.

        Args:
            finite: Whether the losses were finite, a tensor () on the device.
        """
        if self.before is not None:
            now = torch.cat([b.flatten() for b in self.buffers])
            kept = torch.where(finite & now.isfinite().all(), now, self.before)
            parts = kept.split([b.numel() for b in self.buffers])
            torch._foreach_copy_(self.buffers, [part.view_as(b) for part, b in zip(parts, self.buffers)])


@dataclass
class Stepper:
    """Runs backward, gradient clipping and the optimizer step; skips the step if a loss is not finite.

    PyTorch's fused optimizers skip it on the device. For other optimizers, the flag is read once per update.

    Args:
        task: The task in training.
        optimizer: Its optimizer.
        scaler: timm's loss scaler for float16.
        clip_grad: Clipping value; None does not clip.
        clip_mode: 'norm', 'value' or 'agc'.
    """
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scaler: Optional[NativeScaler] = None
    clip_grad: Optional[float] = None
    clip_mode: str = 'norm'
    stepped: bool = field(default=False, init=False)

    def __call__(self, loss: torch.Tensor, update: bool, finite: torch.Tensor) -> torch.Tensor:
        """Run backward on `loss`, and update the weights after the last batch of the accumulation.

        Args:
            loss: Loss of a batch.
            update: Whether the batch completes the accumulation.
            finite: Whether the losses of the accumulation are finite, a tensor () on the device.

        Returns:
            Whether the gradients are finite too, so that the update is made. A loss scaler checks that itself.
        """
        # An infinite loss may have finite gradients. NaN gradients reach every process, and the scaler
        loss = loss * torch.where(finite, 1., float('nan'))
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
                grads = [p.grad for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]
                finite = nn.utils.get_total_norm(grads).isfinite()
                if self.clip_grad is not None:
                    dispatch_clip_grad(parameters, value=self.clip_grad, mode=self.clip_mode)
                self._step(finite)
        if update:
            self.optimizer.zero_grad()
        return finite

    def _step(self, finite: torch.Tensor) -> None:
        # A fused SGD that skips its first step leaves its momentum buffer uninitialised
        if self.stepped and getattr(self.optimizer, '_step_supports_amp_scaling', False):
            optimizer: Any = self.optimizer
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif finite:
            self.optimizer.step()
            self.stepped = True


@contextlib.contextmanager
def _progress(batches, label: str, total: int, initial: int = 0, show: bool = True) -> Iterator[Iterable]:
    """Return the batches, with a progress bar on a terminal."""
    if not sys.stderr.isatty() or not show:
        yield batches
        return
    bar = tqdm(batches, desc=label, total=total, initial=initial, leave=False, dynamic_ncols=True)
    with logging_redirect_tqdm(), bar:
        yield bar


def _format_losses(losses: Dict[str, float]) -> str:
    return '  '.join(f'{name}: {value:#.4g}' for name, value in losses.items())


def mean_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the mean learning rate of the parameter groups."""
    return sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)


def _accumulation(batch: int, num_batches: int, steps: int) -> Tuple[int, int, bool]:
    """Return the update of a batch, the number of batches in that update, and whether the batch completes it.

    Updates count from 1, batches from 0.
    """
    update = batch // steps + 1
    size = max(1, min(steps, num_batches - (update - 1) * steps))
    return update, size, batch + 1 == num_batches or (batch + 1) % steps == 0


class _Clock:
    """Measures images per second, and the shares of the time for data and for the teacher."""

    def __init__(self, teacher: TeacherTimer) -> None:
        self.teacher = teacher
        self.teacher.seconds()  # drop forwards from before, such as an evaluation of the teacher
        self.samples, self.data_time = 0, 0.
        self.start = self.end = time.perf_counter()

    def loaded(self) -> None:
        self.data_time += time.perf_counter() - self.end

    def stepped(self, num_samples: int) -> None:
        self.samples += num_samples
        self.end = time.perf_counter()

    def read(self, world_size: int) -> Dict[str, float]:
        """Return the rates since the last call. Synchronise the device before."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        rates = dict(
            images_per_second=self.samples * world_size / seconds,
            data_share=self.data_time / seconds,
            teacher_share=self.teacher.seconds() / seconds,
        )
        self.samples, self.data_time = 0, 0.
        self.start = self.end = time.perf_counter()
        return rates


@dataclass
class Trainer:
    """Trains a task epoch by epoch.

    Args:
        task: Computes the losses of a batch.
        loader: Batches on the device, see `TrainLoader`; or any list of batches, if all epochs are whole.
        step: See `Stepper`.
        precision: See `Precision`.
        ranks: Processes of the run.
        grad_accum_steps: Batches per update.
        channels_last: Memory format of the images.
        log_interval: Updates between log lines.
        skip_nan_steps: Largest number of updates to skip in the run because a loss is not finite.
        loss_scale: Factor on the loss of a batch by its size; None is 1.
        synchronize: Wait for the device after every update.

    Set before training:
        lr_scheduler: Stepped at every update.
        labels: A `LabelCache` that the task reads.
        on_log: Called at each log line with the epoch, the update, the mean losses, the rates and the images.
        on_update: Called after every update with the epoch, the number of the update, counted from 1, and whether it
            is the epoch's last.
    """
    task: TrainingTask
    loader: Any
    step: Stepper
    precision: Precision
    ranks: Ranks = SINGLE
    grad_accum_steps: int = 1
    channels_last: bool = False
    log_interval: int = 50
    skip_nan_steps: int = 0
    loss_scale: Optional[Callable[[int], float]] = None
    synchronize: bool = False
    lr_scheduler: Any = field(default=None, init=False)
    labels: Any = field(default=None, init=False)
    on_log: Optional[Callable[[int, int, Dict[str, float], Dict[str, float], torch.Tensor], Any]] = field(
        default=None, init=False)
    on_update: Optional[Callable[[int, int, bool], Any]] = field(default=None, init=False)
    meter: LossMeter = field(init=False)
    num_skipped: int = field(default=0, init=False)
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.meter = LossMeter(self.ranks)
        self.num_updates = -(-len(self.loader) // self.grad_accum_steps)
        self._timer = TeacherTimer(self.task, self.precision.device)
        self._skipped = torch.zeros((), device=self.precision.device)  # since the last log line
        self._lrs: Dict[int, float] = {}

    def train_epoch(self, epoch: int, first_update: int = 0, meter_state: Optional[Dict] = None) -> Dict[str, float]:
        """Train for an epoch, or for the rest of it.

        Args:
            epoch: The epoch, counted from 0.
            first_update: Number of updates that a resumed epoch has already.
            meter_state: State of `meter` after these updates.

        Returns:
            The mean of each loss by name, over all samples of the epoch.

        Raises:
            TrainingError: If losses are not finite in more than `skip_nan_steps` updates.
        """
        self.task.train()
        self.epoch = epoch
        self.meter = LossMeter(self.ranks)
        if meter_state is not None:
            self.meter.load_state_dict(meter_state, self.precision.device)
        num_batches, first = len(self.loader), first_update * self.grad_accum_steps
        if hasattr(self.loader, 'set_epoch'):
            self.loader.set_epoch(epoch, first)
        if self.labels is not None:
            self.labels.set_epoch(epoch, first)
        clock, finite = _Clock(self._timer), None
        self.step.optimizer.zero_grad()
        self._running_stats = RunningStats(cast(nn.Module, self.task.get_trainable_module()))
        label = f'Train: {epoch}'
        with _progress(self.loader, label, num_batches, first, self.ranks.is_primary) as batches:
            for i, (images, target) in enumerate(batches, first):
                clock.loaded()
                update, size, is_update = _accumulation(i, num_batches, self.grad_accum_steps)
                finite = self._batch(images, target, update, size, is_update, finite)
                clock.stepped(images.shape[0])
                if is_update:
                    finite = None
                    self._finish_update(epoch, update, clock, images)
        if hasattr(self.step.optimizer, 'sync_lookahead'):
            self.step.optimizer.sync_lookahead()
        return self.meter.means()

    def _batch(self, images, target, update: int, size: int, is_update: bool, finite) -> torch.Tensor:
        """Run forward and backward, and the update after the last batch of an accumulation.

        Returns:
            Whether all losses of the accumulation so far are finite.
        """
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if finite is None:
            self._running_stats.keep()
        with contextlib.nullcontext() if is_update else self.task.no_sync():
            with self.precision.autocast():
                result = self.task(images, target)
            losses = {name: value for name, value in result.items() if name != 'output'}
            now_finite = self.meter.update(losses, images.shape[0], update)
            finite = now_finite if finite is None else finite & now_finite
            scale = self.loss_scale(images.shape[0]) if self.loss_scale is not None else 1.
            stepped = self.step(result['loss'] * (scale / size), is_update, finite)
            if is_update:
                self._running_stats.restore_unless(stepped)
                self._skipped = self._skipped + ~stepped
                self._lrs[update] = mean_lr(self.step.optimizer)
        return finite

    def _finish_update(self, epoch: int, update: int, clock: _Clock, images: torch.Tensor) -> None:
        done, last = epoch * self.num_updates + update, update == self.num_updates
        self.task.update_ema(step=done)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step_update(num_updates=done, metric=None)
        if self.synchronize and self.precision.device.type != 'cpu':
            torch.accelerator.synchronize()
        if last or update % self.log_interval == 0 or done == 1:
            losses = self.meter.means()
            self.check_finite(epoch)
            if self.labels is not None:
                self.labels.save()
            rates = clock.read(self.ranks.world_size)
            if self.ranks.is_primary:
                self._log(epoch, update, losses, rates)
                if self.on_log is not None:
                    self.on_log(epoch, update, losses, rates, images)
        if self.on_update is not None:
            self.on_update(epoch, update, last)

    def _log(self, epoch: int, update: int, losses: Dict[str, float], rates: Dict[str, float]) -> None:
        weights = getattr(self.task, 'weights', None)  # of a DearKD task
        stage = f'  Stage: {weights.stage}' if weights is not None else ''
        teacher = f'  Teacher: {100 * rates["teacher_share"]:.0f}%' if rates['teacher_share'] else ''
        _logger.info(
            f'Train: {epoch}{stage} [{update:>4d}/{self.num_updates} ({100. * update / self.num_updates:>3.0f}%)]'
            f'  {_format_losses(losses)}  LR: {mean_lr(self.step.optimizer):.3e}'
            f'  {rates["images_per_second"]:.1f} img/s  Data: {100 * rates["data_share"]:.0f}%{teacher}')

    def check_finite(self, epoch: int) -> None:
        """Warn of updates that were skipped since the last call, or stop the run if there are too many.

        Raises:
            TrainingError: If more than `skip_nan_steps` updates were skipped, or the loss scale is too small.
        """
        if self.ranks.distributed:
            dist.all_reduce(self._skipped, dist.ReduceOp.MAX)
        skipped, lrs = int(self._skipped), self._lrs
        update, losses = self.meter.take_first_nonfinite()
        self._skipped, self._lrs = torch.zeros_like(self._skipped), {}
        self.num_skipped += skipped
        if skipped:
            self._warn_of_skipped(epoch, update, losses, lrs)
        loss_scale = self.step.scaler.state_dict().get('scale', 1.) if self.step.scaler is not None else 1.
        if loss_scale < _LEAST_LOSS_SCALE * 2. ** -self.num_skipped:  # each skipped update halved it too
            raise TrainingError(
                f'The gradients are not finite at epoch {epoch} with any loss scale: it fell to {loss_scale:.1g}. Lower'
                ' --lr, clip with --clip-grad 1, or use --amp-dtype bfloat16.')

    def _warn_of_skipped(self, epoch: int, update: int, losses: Dict[str, float], lrs: Dict[int, float]) -> None:
        where = (
            f'The loss is not finite at epoch {epoch}, step {update} of {self.num_updates}'
            f' ({_format_losses(losses)}; learning rate {lrs.get(update, 0.):.3e}). The step was skipped.'
        ) if update else (
            f'The gradients are not finite at epoch {epoch}, or the loss of another process. The step was skipped.')
        if self.num_skipped > self.skip_nan_steps:
            raise TrainingError(
                f'{where} Lower --lr, clip with --clip-grad 1, remove --amp or use --amp-dtype bfloat16,'
                f' or skip such steps with --skip-nan-steps {self.num_skipped + 9}.')
        _logger.warning(f'{where} Skipped so far: {self.num_skipped} of {self.skip_nan_steps}.')


@dataclass
class Validator:
    """Evaluates a model.

    Args:
        task: Creates the evaluator of the logits, see `TrainingTask.create_evaluator`.
        loader: Batches on the device.
        precision: See `Precision`.
        ranks: Processes that share the images.
        channels_last: Memory format of the images.
        tta: 2 averages the logits of each image and its mirror image.
        log_interval: Batches between log lines.
        on_batch: Called after every batch.
    """
    task: TrainingTask
    loader: Any
    precision: Precision
    ranks: Ranks = SINGLE
    channels_last: bool = False
    tta: int = 0
    log_interval: int = 50
    on_batch: Optional[Callable[[], Any]] = None

    @property
    def in_step(self) -> bool:
        """Whether all processes have the same number of batches. Those of a stream may not."""
        return not (self.ranks.distributed and isinstance(getattr(self.loader, 'dataset', None), IterableDataset))

    @torch.no_grad()
    def __call__(
            self,
            model: nn.Module,
            label: str = 'Test',
            on_logits: Optional[Callable[[torch.Tensor, torch.Tensor], Any]] = None,
    ) -> Dict[str, float]:
        """Return the metrics of a model in eval mode: loss, top1, top5.

        Args:
            model: The model.
            label: Start of the log lines.
            on_logits: Called with the logits (B, classes) and the labels (B,) of every batch.
        """
        evaluator = self.task.create_evaluator(max_samples=evaluation_sample_limit(self.loader))
        was_training = model.training
        model.eval()
        num_batches, is_primary = len(self.loader), self.ranks.is_primary
        with _progress(self.loader, label, num_batches, show=is_primary) as batches:
            for i, (images, target) in enumerate(batches):
                views = [images, images.flip(-1)] if self.tta > 1 else [images]
                # each is divided at once, because the next call of a CUDA graph overwrites its output
                logits = cast(torch.Tensor, sum(self._forward(model, view) / len(views) for view in views))
                evaluator.update(logits, target)
                if on_logits is not None:
                    on_logits(logits, target)
                if is_primary and (i + 1) % self.log_interval == 0 and i + 1 < num_batches:
                    _logger.info(f'{label}: [{i + 1:>4d}/{num_batches}]  {_format_losses(evaluator.summary())}')
                if self.on_batch is not None:
                    self.on_batch()
        model.train(was_training)
        metrics = evaluator.compute(distributed=self.ranks.distributed)
        if is_primary:
            _logger.info(f'{label}: [{num_batches:>4d}/{num_batches}]  {_format_losses(metrics)}')
        return dict(metrics)

    def _forward(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self.precision.autocast():
            output = model(images)
        return output[0] if isinstance(output, (tuple, list)) else output
