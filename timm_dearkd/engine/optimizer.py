"""The optimizer and the learning-rate schedule, from the options."""
import argparse
import logging
import math
from typing import Any, Dict, cast

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import TrainingTask

from distill_hooks.errors import one_line

from .checkpoints import Position
from .loader import images_per_update
from .process import Ranks

__all__ = ['build_optimizer', 'build_scheduler', 'choose_epochs', 'epochs_for', 'warn_of_short_run']

_logger = logging.getLogger(__name__)

MIN_UPDATES = 1000  # of a run without a warning, and with --auto-epochs; our choice


def build_optimizer(args, task: TrainingTask, device: torch.device, ranks: Ranks) -> torch.optim.Optimizer:
    """Build timm's optimizer of all that the task trains, with the given or the scaled learning rate."""
    kwargs = optimizer_kwargs(cfg=args)
    if args.lr is None:
        ratio = images_per_update(args, ranks) / args.lr_base_size
        scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
        kwargs['lr'] = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
        _logger.info(f'Learning rate {kwargs["lr"]:.4g}, from lr-base {args.lr_base:g} ({scale} in the batch size).')
    if device.type == 'cuda' and _takes_fused(args) and not any(
            args.opt_kwargs.get(other) for other in ('foreach', 'differentiable')):
        kwargs['fused'] = True  # skips a step on the device, and is faster
    try:
        optimizer = create_optimizer_v2(cast(nn.Module, task.get_trainable_module()), **{**kwargs, **args.opt_kwargs})
    except (AssertionError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f'Could not create --opt {args.opt}: {one_line(e)}') from e
    base: Any = getattr(optimizer, '_base_optimizer', optimizer)  # Lookahead loads its state through this
    if 'fused' in base.defaults and hasattr(base, 'register_load_state_dict_pre_hook'):
        base.register_load_state_dict_pre_hook(_keep_fused)
    return optimizer


def _keep_fused(optimizer: torch.optim.Optimizer, state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """Keep this optimizer's kind of step, fused or not, when it loads the state of a checkpoint."""
    groups = [{**group, 'fused': optimizer.defaults['fused']} for group in state_dict['param_groups']]
    return {**state_dict, 'param_groups': groups}


def _takes_fused(args) -> bool:
    """Return whether the optimizer has a fused step on CUDA that is safe to use."""
    try:
        optimizer_class: Any = get_optimizer_class(args.opt, bind_defaults=False)
    except ValueError:
        return False
    if optimizer_class is torch.optim.SGD:
        # A loss scale that overflows in the first step leaves the momentum of PyTorch's fused SGD uninitialised
        return not (args.momentum and args.amp and args.amp_dtype == 'float16')
    return optimizer_class in (torch.optim.Adam, torch.optim.AdamW)  # Adagrad's is only for CPUs in older versions


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
        raise ValueError(f'Could not create --sched {args.sched}: {one_line(e)}') from e
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
