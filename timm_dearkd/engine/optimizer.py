"""The optimizer, from the options."""
import logging
from typing import Any, Dict, cast

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs
from timm.task import TrainingTask

from distill_hooks.errors import one_line

from .process import Ranks, images_per_update

_logger = logging.getLogger(__name__)


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
