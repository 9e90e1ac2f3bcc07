"""Length of a run, its learning-rate schedule and its stages, from the options."""
import argparse
import logging
import math
from typing import List, Tuple

import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from distill_hooks import DearKDTask
from distill_hooks.errors import one_line

from .checkpoints import Position, resume_run
from .distillation import build_schedule, log_changed_stages
from .loop import Trainer
from .process import Ranks, images_per_update

_logger = logging.getLogger(__name__)

MIN_UPDATES = 1000  # of a run without a warning, and with --auto-epochs; our choice
# Options of a parameter group; other entries are the optimizer's own
_GROUP_OPTIONS = {'lr', 'lr_scale', 'weight_decay', 'betas', 'eps', 'momentum'}


def epochs_for(num_images: int, num_updates: int) -> int:
    """Return the number of epochs for a number of training images: 700 / num_images^(1/4).

    Fewer images get more epochs, but fewer updates: at least 10 epochs and 1,000 updates. The rule is ours, see
    docs/training.md.

    Args:
        num_images: Images per epoch.
        num_updates: Updates per epoch.
    """
    return max(10, round(700 / max(1, num_images) ** 0.25), math.ceil(MIN_UPDATES / max(1, num_updates)))


def choose_epochs(args: argparse.Namespace, num_batches: int, ranks: Ranks) -> argparse.Namespace:
    """Return the options with the --epochs that --auto-epochs chooses, for a number of batches per epoch."""
    if not args.auto_epochs:
        return args
    num_updates = math.ceil(num_batches / args.grad_accum_steps)
    num_images = num_updates * images_per_update(args, ranks)
    epochs = epochs_for(num_images, num_updates)
    _logger.info(f'--auto-epochs: {epochs} epochs for {num_images} images per epoch.')
    return argparse.Namespace(**{**vars(args), 'epochs': epochs})


def build_scheduler(args, optimizer: torch.optim.Optimizer, num_updates: int, start: Position):
    """Build timm's learning-rate schedule, and set it to the start of the run.

    Args:
        args: The options.
        optimizer: The optimizer.
        num_updates: Updates per epoch.
        start: Position at which the run starts.

    Returns:
        The schedule, and the number of epochs of the run.

    Raises:
        ValueError: If timm refuses the options.
    """
    rates = [group['lr'] for group in optimizer.param_groups]
    try:
        lr_scheduler, num_epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=num_updates)
    except (AssertionError, ValueError) as e:
        raise ValueError(
            f'Could not create --sched {args.sched}: {one_line(e)} Check --decay-epochs and --warmup-epochs.') from e
    if lr_scheduler is not None and start.epoch + start.update > 0:
        if args.sched_on_updates:
            lr_scheduler.step_update(start.epoch * num_updates + start.update)
        else:
            lr_scheduler.step(start.epoch)
    if start.scheduler is not None and hasattr(lr_scheduler, 'lr_scheduler'):
        lr_scheduler.lr_scheduler.load_state_dict(start.scheduler)
        for group, rate in zip(optimizer.param_groups, rates):  # no function of the epoch
            group['lr'] = rate
    return lr_scheduler, num_epochs


def warn_of_short_run(args, num_epochs: int, num_updates: int, num_images: int, is_dearkd: bool) -> None:
    """Warn of defaults for long runs that spoil a short one.

    Args:
        args: The options.
        num_epochs: Epochs of the run.
        num_updates: Updates per epoch.
        num_images: Training images per epoch.
        is_dearkd: Whether a ViT learns from a CNN.
    """
    total = num_epochs * num_updates
    if is_dearkd and args.opt == 'sgd':
        _logger.warning(
            '--opt sgd, the default, hardly trains a ViT. Try -c small_folder (with --lr 5e-4 for a larger model than'
            ' nano).')
    elif is_dearkd and total < MIN_UPDATES:
        _logger.warning(
            f'The run has {total} updates, too few for a ViT. Set more --epochs: -c small_folder takes'
            f' {epochs_for(num_images, num_updates)}.')
    if args.sched != 'none' and args.warmup_epochs >= num_epochs:
        _logger.warning(
            f'All of the {num_epochs} epochs are warm-up, from a learning rate of {args.warmup_lr:g}. Set fewer'
            ' --warmup-epochs.')
    left = args.model_ema_decay ** total
    if args.model_ema and not args.model_ema_warmup and left > 0.05:
        _logger.warning(
            f'{100 * left:.0f} % of the average of weights will still be the initial weights. Set --model-ema-warmup,'
            ' or a lower --model-ema-decay.')


def schedule_run(args, trainer: Trainer, checkpoint: str) -> Tuple[Position, range]:
    """Resume the run, set up its schedules, and return where it starts and its epochs."""
    task, optimizer = trainer.task, trainer.step.optimizer
    given = [{key: group[key] for key in _GROUP_OPTIONS & group.keys()} for group in optimizer.param_groups]
    start = Position()
    if checkpoint:
        start = resume_run(
            checkpoint, task, dict(vars(args)), None if args.no_resume_opt else optimizer, trainer.precision,
            images_per_update(args, trainer.ranks))
    for group, options in zip(optimizer.param_groups, given):  # this run's options replace the checkpoint's
        rate = options.pop('lr')
        group.update(options)
        if args.sched != 'plateau':  # its rate depends on earlier metrics, so the checkpoint's stays
            group['lr'] = group['initial_lr'] = rate
    resumed = start
    if args.start_epoch is not None:
        start = Position(args.start_epoch)
    trainer.num_skipped = start.num_skipped
    num_images = trainer.num_updates * images_per_update(args, trainer.ranks)
    trainer.lr_scheduler, num_epochs = build_scheduler(args, optimizer, trainer.num_updates, start)
    if isinstance(task, DearKDTask):
        task.schedule = build_schedule(args, num_epochs)
        log_changed_stages(args, task.schedule.stage1_epochs, resumed, start.epoch)
    warn_of_short_run(args, num_epochs, trainer.num_updates, num_images, isinstance(task, DearKDTask))
    stop_epoch = num_epochs if args.stop_epoch is None else args.stop_epoch
    for name, epoch in (('stop-epoch', stop_epoch), *(('save-epochs', epoch) for epoch in args.save_epochs)):
        if not 1 <= epoch <= num_epochs:
            raise ValueError(f'--{name} is {epoch}, expected 1 to {num_epochs}, the epochs of the run.')
    return start, range(start.epoch, stop_epoch)


def evaluated_epochs(args, epochs: range) -> List[int]:
    """Return the epochs after which the student is evaluated."""
    always = (epochs.stop, *args.save_epochs)
    return [epoch for epoch in epochs if (epoch + 1) % args.val_interval == 0 or epoch + 1 in always]
