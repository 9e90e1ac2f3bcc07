"""What train.py refuses before it begins, as far as the options alone tell."""
import argparse
import logging
import os
from typing import List, Sequence

from timm.models import is_model, parse_model_name
from timm.optim import get_optimizer_info
from timm.task import ClassificationEvaluator

from distill_hooks.checkpoint import nearest_names

from .device import check_backend
from .options import build_parser
from .tracking import check_available

__all__ = ['check_args', 'check_distillation']

_logger = logging.getLogger(__name__)

_CHOICES = {
    'amp_dtype': ('float16', 'bfloat16'),
    'clip_mode': ('norm', 'value', 'agc'),
    'dist_bn': ('', 'reduce', 'broadcast'),
    'eval_metric': ClassificationEvaluator.metric_names,
    'lr_base_scale': ('', 'linear', 'sqrt'),
    'mixup_mode': ('batch', 'pair', 'elem'),
    'model_dtype': (None, 'float32', 'float16', 'bfloat16'),
    'remode': ('const', 'rand', 'pixel'),
    'tta': (0, 1, 2),
    'worker_seeding': ('all', 'part'),
}
_CUDA_GRAPH_MODES = ('reduce-overhead', 'max-autotune')
_AT_LEAST_ONE = ('batch_size', 'epochs', 'grad_accum_steps', 'log_interval', 'val_interval', 'checkpoint_hist')
_FILES = ('resume', 'kd_teacher_checkpoint', 'initial_checkpoint', 'kd_class_map', 'pretrained_path')
# What to give where a folder was given; by default, a file in it
_FOLDERS = {
    'resume': 'last.pth.tar in it, or --resume auto with its --output and --experiment',
    'initial_checkpoint': 'last.pth.tar in it, or take --model local-dir:{} --pretrained',
    'pretrained_path': 'model_best.safetensors in it, or take --model local-dir:{} --pretrained',
    'kd_teacher_checkpoint': 'a checkpoint in it, or take --kd-model-name {} alone',
}
_NOT_NEGATIVE = (
    'seed', 'start_epoch', 'skip_nan_steps', 'recovery_interval', 'workers', 'aug_repeats', 'mixup', 'cutmix')
_RANGES = (
    ('smoothing', 0., 1.), ('drop', 0., 1.), ('drop_path', 0., 1.), ('drop_connect', 0., 1.),
    ('model_ema_decay', 0., 1.), ('layer_decay', 0., float('inf')),
)
_SHARES = (
    'hflip', 'vflip', 'reprob', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'mixup_prob',
    'mixup_switch_prob', 'drop_block', 'bce_target_thresh')
# What each kind of distillation takes, and without a teacher nothing does
_WEIGHTS = ('distill_loss_weight', 'task_loss_weight')
_TAUGHT = {
    'dearkd': (
        'dearkd_stage1_epochs', 'dearkd_stage2', 'dearkd_alpha', 'dearkd_beta', 'dearkd_hooks',
        'dearkd_normalize_features', 'kd_teacher_img_size', 'kd_class_map'),
    'logit': ('kd_loss_type', 'kd_temperature', 'kd_teacher_img_size', 'kd_class_map', *_WEIGHTS),
    'feature': ('kd_student_feature_dim', 'kd_teacher_feature_dim', 'kd_teacher_img_size', *_WEIGHTS),
    'token': ('kd_token_distill_type', 'kd_temperature', 'kd_teacher_img_size', 'kd_class_map', *_WEIGHTS),
}


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can't work, as far as the options alone tell.

    Raises:
        ValueError: A value out of its range, or options that do not go together.
        FileNotFoundError: A checkpoint that is not there.
    """
    _check_model(args)
    _check_values(args)
    _check_combinations(args)
    _check_size_schedule(args)
    check_available(tensorboard=args.log_tensorboard, wandb=args.log_wandb)


def _given(args: argparse.Namespace, keys: Sequence[str]) -> List[str]:
    """Those options that do not have their defaults."""
    parser = build_parser()
    return [key for key in keys if getattr(args, key) != parser.get_default(key)]


def _flag(name: str) -> str:
    return f'--{name.replace("_", "-")}'


def _check_model(args: argparse.Namespace) -> None:
    source, name = parse_model_name(args.model)
    if source is None and not is_model(name.split('.')[0]):
        raise ValueError(f'Unknown --model {args.model!r}. The nearest names: {nearest_names(name)}.')
    for key in _given(args, [key for key in vars(args) if key.startswith('naflex_')]):
        raise ValueError(
            f'{_flag(key)} is not supported: NaFlex feeds sequences of patches, and the tokens of a DearKD student'
            ' are a grid, which its relative positions and its aligner need. Leave it out;'
            ' --train-img-sizes trains at several sizes.')


def _check_values(args: argparse.Namespace) -> None:
    for key, choices in _CHOICES.items():
        if getattr(args, key) not in choices:
            expected = ', '.join(str(choice) for choice in choices if choice not in ('', None))
            raise ValueError(f'{_flag(key)} is {getattr(args, key)!r}, expected one of {expected}.')
    for keys, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for key in keys:
            if getattr(args, key) is not None and getattr(args, key) < least:
                raise ValueError(f'{_flag(key)} is {getattr(args, key)}, expected {least} or more.')
    for key in _FILES:
        path = getattr(args, key)
        if path and path != 'auto' and os.path.isdir(path):
            remedy = _FOLDERS.get(key, 'a file in it').format(path)
            raise ValueError(f'{_flag(key)}: {path!r} is a folder. Name {remedy}.')
        if path and path != 'auto' and not os.path.isfile(path):
            raise FileNotFoundError(f'{_flag(key)}: no file {path!r}.')
    if not 0. < args.train_fraction <= 1.:
        raise ValueError(f'--train-fraction is {args.train_fraction}, expected a share above 0, 1 at the most.')
    for key, low, high in _RANGES:
        value = getattr(args, key)
        if value is not None and not low <= value < high:
            raise ValueError(f'{_flag(key)} is {value}, expected {low:g} or more, less than {high:g}.')
    for key in _SHARES:
        value = getattr(args, key)
        if value is not None and not 0. <= value <= 1.:
            raise ValueError(f'{_flag(key)} is {value}, expected 0 to 1.')
    for key in ('scale', 'ratio', 'cutmix_minmax'):
        values = getattr(args, key) or (1., 1.)
        if len(values) != 2:
            raise ValueError(f'{_flag(key)} has {len(values)} values, expected the least and the greatest.')
        if not 0. <= values[0] <= values[1]:
            raise ValueError(f'{_flag(key)} is {values[0]} {values[1]}, expected the least and the greatest.')
    if args.crop_pct is not None and not args.crop_pct > 0.:
        raise ValueError(f'--crop-pct is {args.crop_pct}, expected more than 0, 1 for the whole image.')
    if args.clip_grad is not None and args.clip_grad <= 0:
        raise ValueError(f'--clip-grad is {args.clip_grad}, expected more than 0.')
    if 0 < args.aug_repeats < 1:
        raise ValueError(f'--aug-repeats is {args.aug_repeats}, expected 1 or more; 0 switches them off.')
    if args.opt_betas:
        num_betas = get_optimizer_info(args.opt.lower().split('_')[-1]).num_betas  # without lookahead_, as timm does
        if len(args.opt_betas) != num_betas:
            raise ValueError(f'--opt-betas has {len(args.opt_betas)} values, {args.opt} takes {num_betas}.')
    check_backend(args.torchcompile, args.torchcompile_mode)
    if args.torchcompile_mode in _CUDA_GRAPH_MODES and (args.kd_model_name or args.grad_accum_steps > 1):
        what = 'a teacher' if args.kd_model_name else '--grad-accum-steps'
        raise ValueError(
            f'--torchcompile-mode {args.torchcompile_mode} records CUDA graphs, which do not work with {what}: they'
            ' overwrite their outputs. Set --torchcompile-mode max-autotune-no-cudagraphs.')


def _check_combinations(args: argparse.Namespace) -> None:
    if args.resume == 'auto' and not args.experiment:
        raise ValueError('--resume auto goes on in the folder of the run, so it needs --experiment NAME.')
    if args.layer_decay is not None and args.sched == 'none':
        raise ValueError(
            '--layer-decay is applied by the schedule, and --sched none is without one. Set --sched constant.')
    if args.sched == 'plateau' and args.sched_on_updates:
        raise ValueError('--sched plateau looks at epochs, so it does not go with --sched-on-updates. Leave that out.')
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise ValueError('--amp keeps the weights in float32. Leave out --model-dtype, or --amp.')
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax
    if mixes and any(size % 2 for size in (args.batch_size, *(args.train_batch_sizes or ()))):
        raise ValueError(f'--batch-size is {args.batch_size}, but Mixup and CutMix pair the images up. Make it even.')
    if mixes and args.aug_splits:
        raise ValueError('--aug-splits does not go with --mixup or --cutmix. Leave one of them out.')
    if args.aug_splits == 1 or ((args.jsd_loss or args.split_bn) and not args.aug_splits):
        raise ValueError(
            '--aug-splits has to be 2 or more, and --jsd-loss and --split-bn need it. Set --aug-splits 3, say.')
    if args.torchscript and (args.torchcompile or args.sync_bn):
        raise ValueError('--torchscript does not go with --torchcompile or --sync-bn. Leave one of them out.')
    if args.torchscript and args.eval_only:
        raise ValueError(
            '--torchscript is for training. Leave it out with --eval-only, in a file by torchscript: false.')
    for key in ('kd_teacher_checkpoint', 'kd_class_map'):
        if getattr(args, key) and not args.kd_model_name:
            raise ValueError(f'{_flag(key)} needs the architecture of the teacher: add --kd-model-name NAME.')
    taught = [key for keys in _TAUGHT.values() for key in keys]
    for key in _given(args, taught) if args.kd_model_name is None else ():
        raise ValueError(
            f'{_flag(key)} needs a teacher: add --kd-model-name NAME. An empty one ("") says that there is to be none.')


def check_distillation(args: argparse.Namespace, distill_type: str) -> None:
    """Refuse options of another kind of distillation than the student gets.

    If the command names the kind, as it may over a recipe, such options only give a warning, a class map excepted.

    Raises:
        ValueError: If there is such an option, or the kind does not go with TorchScript.
    """
    if args.torchscript and distill_type == 'token':
        raise ValueError(
            '--torchscript does not go with --kd-distill-type token, which trains two heads that TorchScript merges.'
            ' Use --torchcompile.')
    others = dict.fromkeys(key for keys in _TAUGHT.values() for key in keys if key not in _TAUGHT[distill_type])
    for key in _given(args, list(others)):
        kinds = ' or '.join(kind for kind, keys in _TAUGHT.items() if key in keys)
        message = f'{_flag(key)} goes with --kd-distill-type {kinds}, this run has {distill_type}'
        if args.kd_distill_type is None or key == 'kd_class_map':
            raise ValueError(f'{message}. Leave it out, or choose the kind with --kd-distill-type.')
        _logger.warning(f'{message}: it does nothing.')


def _check_size_schedule(args: argparse.Namespace) -> None:
    sizes = args.train_img_sizes
    for key in ('train_batch_sizes', 'train_size_probs'):
        given = getattr(args, key)
        if given and len(given) != len(sizes or ()):
            raise ValueError(
                f'{_flag(key)} has {len(given)} values for the {len(sizes or ())} of --train-img-sizes. Give as many.')
    if args.train_size_schedule == 'progressive' and len(sizes or ()) < 2:
        raise ValueError('--train-size-schedule progressive needs two or more --train-img-sizes.')
    if args.train_batches_per_epoch is not None and args.train_batches_per_epoch < 1:
        raise ValueError(f'--train-batches-per-epoch is {args.train_batches_per_epoch}, expected 1 or more.')
    if sizes and args.aug_splits:
        raise ValueError('--train-img-sizes does not go with --aug-splits. Leave one of them out.')
