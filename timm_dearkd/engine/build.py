"""From options to the model, the task and the optimizer. The build modules and the script are what reads `args`."""
import contextlib
import logging
import os
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn
from timm.data.model_config import resolve_input_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import get_model_input_config, parse_model_name, resolve_model_input_args, safe_model_name
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, TrainingTask
from timm.utils import set_jit_fuser

from distill_hooks import (
    DearKDTask,
    FeatureTask,
    LogitTask,
    Teacher,
    TokenTask,
    TwoStageSchedule,
    create_teacher,
    has_content_tokens,
    load_class_map,
)
from distill_hooks.checkpoint import training_args

from ..attention import ConvAttention
from .build_data import dataset_kwargs, images_per_update, model_dtype, open_validation_set
from .data import (
    check_img_size,
    check_label_gaps,
    check_labels,
    class_indices,
    count_classes,
    open_dataset,
    open_eval_dataset,
)
from .device import Ranks
from .image_folder import class_order, normal_name
from .options import check_distillation, replace_args
from .output import EXPORT_NAME, Position, read_classes, why_no_config
from .teacher_check import label_names

__all__ = [
    'build_evaluation', 'build_optimizer', 'build_schedule', 'build_scheduler', 'build_student', 'build_task',
]

_logger = logging.getLogger(__name__)


def build_student(
        args,
        dataset,
        device: torch.device,
        create_model: Callable[..., Any],
) -> Tuple[Any, Dict[str, Any]]:
    """The model to train or to evaluate, and timm's data configuration for it.

    Args:
        args: The options.
        dataset: Whose class count the model gets where none is given.
        device: Where it goes.
        create_model: timm's, or one of the user's own.

    Raises:
        ValueError: Options that no such model can be made with.
    """
    num_classes = args.num_classes
    if num_classes is None and not args.eval_only:
        check_label_gaps(dataset, args.class_map)
        num_classes = count_classes(dataset)
    if num_classes != args.num_classes:
        _logger.info(f'--num-classes not given: {num_classes}, as the data set has.')
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else {}
    overlay.update(args.pretrained_cfg_overlay)
    overrides = dict(
        num_classes=num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path if args.drop_path is not None else args.drop_connect,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        rpe_drop_rate=args.dearkd_rpe_drop,
        rpe_drop_mode=args.dearkd_rpe_drop_mode,
        pretrained_cfg_overlay=overlay or None,
    )
    try:
        kwargs = resolve_model_input_args(args.model, vars(args), **{**overrides, **args.model_kwargs})
        for flag in ('rpe_drop', 'rpe_drop_mode'):
            if getattr(args, f'dearkd_{flag}') is not None and 'dearkd' not in kwargs['model_name']:
                raise ValueError(f'--dearkd-{flag.replace("_", "-")} needs MHCA blocks. Use a dearkd_* model.')
        model: Any = create_model(
            kwargs.pop('model_name'),
            pretrained=args.pretrained or bool(args.pretrained_path),
            checkpoint_path=args.initial_checkpoint,
            **kwargs,
        )
        _adapt_student(args, model)
    except (AssertionError, FileNotFoundError, KeyError, RuntimeError, TypeError, ValueError) as e:
        remedy = ''
        if args.initial_checkpoint and 'size mismatch' in str(e):
            remedy = (
                ' The file is of other classes than the images, or of another --img-size.' if args.eval_only else
                ' Weights of other classes or another image size go in by --pretrained-path, with a new head.')
        raise ValueError(f'Could not create --model {args.model}: {_reason(e)}{remedy}') from e
    _complete_attributes(model, num_classes)
    if num_classes is None and not args.eval_only:
        _logger.warning(
            f'The data set does not tell its classes, so the model has {model.num_classes}. Set --num-classes.')
    has_weights = parse_model_name(args.model)[0] is not None  # local-dir:, hf-hub:
    if not ((has_weights and args.pretrained) or 'license' in overlay):
        # the licence of a registered architecture is for its code or its published weights, not for this run's
        model.pretrained_cfg = {**model.pretrained_cfg, 'license': None}
    if has_weights and not (args.eval_only or args.pretrained or overlay or args.initial_checkpoint or args.resume):
        _logger.warning(
            f'{args.model} gives only the architecture. The weights are new. To load its weights, add --pretrained.')
    if not args.eval_only:  # where the labels are yet to be those of the model
        check_labels(dataset, model.num_classes)
        reason = why_no_config(model)
        if reason:
            _logger.warning(
                f'timm cannot create this {type(model).__name__} by name: {reason}. So the run writes no config.json:'
                f' {EXPORT_NAME} has the weights alone.')
    check_img_size(model, args.train_img_sizes or ())
    model.to(device=device, dtype=model_dtype(args))
    data_config = resolve_input_data_config(model, args=vars(args), verbose=True)
    num_params = sum(p.numel() for p in model.parameters())
    _logger.info(f'Model {safe_model_name(args.model)}: {num_params:,} parameters, {model.num_classes} classes')
    return model, data_config


def build_evaluation(args, device: torch.device, create_model: Callable[..., Any]):
    """A model to evaluate, its data configuration, and the validation set with the labels it was trained with."""
    if not args.val_split:
        raise ValueError('--eval-only looks at validation images. Set --val-split.')
    eval_set = open_validation_set(args)
    trained = {} if args.class_map else read_classes(args.initial_checkpoint).indices
    if args.initial_checkpoint:
        args = _take_trained_input(args)
        if not trained:
            eval_set = _label_as_training(args, eval_set)
        num_classes = max(trained.values()) + 1 if trained else count_classes(eval_set)
        args = replace_args(args, num_classes=args.num_classes or num_classes)
    model, data_config = build_student(args, eval_set, device, create_model)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    own = cfg.get('num_classes')
    if not args.initial_checkpoint and own is not None and args.num_classes not in (None, own):
        raise ValueError(f'--num-classes is {args.num_classes}, but {args.model} knows {own} classes. Leave it out.')
    names = () if args.class_map else cfg.get('label_names') or ()
    known = trained or {name: index for index, name in enumerate(names)}
    known = {normal_name(str(name)): index for name, index in known.items()}
    found = {key: normal_name(str(key)) for key in class_indices(eval_set)}
    unknown = class_order(set(found.values()) - set(known))
    if known and found and not unknown:
        eval_set = open_validation_set(args, {key: known[name] for key, name in found.items()})
    elif known and found and (trained or not args.initial_checkpoint):
        raise ValueError(
            f'Split {args.val_split!r} has classes that the model does not know: {", ".join(unknown[:5])}.'
            ' Move them away, or give --class-map.')
    elif not args.initial_checkpoint:
        with contextlib.suppress(ValueError):  # the weights may be of other images, with other classes
            eval_set = _label_as_training(args, eval_set)
    check_labels(eval_set, model.num_classes, 'Move away those that it does not know, or give --class-map.')
    return model, data_config, eval_set


def _take_trained_input(args):
    """Return the options, with those of the checkpoint where none are given."""
    saved = training_args(args.initial_checkpoint)
    changes: Dict[str, Any] = {}
    keys = ['mean', 'std', 'crop_pct', 'interpolation', 'bn_eps', 'gp', 'num_classes']
    if not args.input_size and saved.get('input_size'):
        if not args.img_size:
            changes['input_size'] = [args.in_chans or saved['input_size'][0], *saved['input_size'][1:]]
        else:
            changes['in_chans'] = args.in_chans or saved['input_size'][0]
    elif not args.input_size:
        keys += ['img_size', 'in_chans']
    changes.update({key: saved[key] for key in keys if not getattr(args, key) and saved.get(key)})
    for key in ('model_kwargs', 'pretrained_cfg_overlay'):
        changes[key] = {**(saved.get(key) or {}), **getattr(args, key)}
    return replace_args(args, **changes)


def _label_as_training(args, eval_set):
    """The validation set with the labels of the training set, if that is here: a class may have no validation images.

    Raises:
        ValueError: It has a class that training does not know.
    """
    root, kwargs = args.data_dir or args.data, dict(dataset_kwargs(args), is_training=False)
    try:
        train_set = open_dataset(args.dataset, root, args.train_split, **kwargs)
    except (OSError, ValueError):
        return eval_set
    return open_eval_dataset(
        train_set, args.dataset, root, args.val_split, num_samples=args.val_num_samples, **kwargs)


def _complete_attributes(model: Any, num_classes: Optional[int]) -> None:
    """Give a model that is none of timm's the attributes that timm's functions look for."""
    if not hasattr(model, 'num_classes'):
        if num_classes is None:
            raise ValueError(f'{type(model).__name__} has no num_classes. Set --num-classes.')
        model.num_classes = num_classes
    if not hasattr(model, 'pretrained_cfg'):
        model.pretrained_cfg = {}


def _adapt_student(args, model: Any) -> None:
    given = args.head_init_scale is not None or args.head_init_bias is not None
    heads = model.get_classifier() if given and not args.eval_only else ()
    for head in heads if isinstance(heads, tuple) else (heads,):  # one, or two of a distilled ViT
        if not all(isinstance(getattr(head, key, None), torch.Tensor) for key in ('weight', 'bias')):
            raise ValueError('--head-init-scale and --head-init-bias need a head with a weight and a bias.')
        with torch.no_grad():
            if args.head_init_scale is not None:
                head.weight.mul_(args.head_init_scale)
                head.bias.mul_(args.head_init_scale)
            if args.head_init_bias is not None:
                nn.init.constant_(head.bias, args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)


def _reason(error: Exception) -> str:
    return ' '.join(str(error).split())[:400] or type(error).__name__


def build_schedule(args, num_epochs: int) -> TwoStageSchedule:
    """DearKD's stages over a run of `num_epochs`; what the learning-rate schedule appends belongs to stage II."""
    epochs = min(args.epochs, num_epochs)
    return TwoStageSchedule(
        epochs,
        args.dearkd_stage1_epochs,
        stage2=args.dearkd_stage2,
        alpha=args.dearkd_alpha,
        beta=args.dearkd_beta,
        cooldown_epochs=num_epochs - epochs,
    )


def build_task(
        args,
        model: nn.Module,
        data_config: Dict[str, Any],
        device: torch.device,
        soft_targets: bool,
        label_names: Optional[Sequence[str]] = None,
) -> TrainingTask:
    """timm's classification or distillation task, or DearKD's, with the average of weights that is asked for.

    Args:
        args: The options.
        model: The student.
        data_config: timm's preprocessing configuration.
        device: Where it trains.
        soft_targets: The loader gives soft labels.
        label_names: What the classes are called, by which those of a teacher are found.

    Raises:
        ValueError: Options that no such task can be made with.
    """
    bce = dict(
        bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight)
    common: Dict[str, Any] = dict(
        criterion_kwargs=dict(
            loss_type='jsd' if args.jsd_loss else 'bce' if args.bce_loss else 'ce',
            smoothing=args.smoothing,
            soft_targets=soft_targets,
            jsd_splits=args.aug_splits,
            **(bce if args.bce_loss else {}),
        ),
        device=device,
        dtype=model_dtype(args),
    )
    distill_type = args.kd_distill_type or ('dearkd' if has_content_tokens(model) else 'logit')
    is_dearkd = bool(args.kd_model_name) and distill_type == 'dearkd'
    if args.kd_model_name:
        check_distillation(args, distill_type)
    model = _convert_norms(args, model, is_dearkd)
    task: Any
    if not args.kd_model_name:
        task = ClassificationTask(model, **common)
    else:
        task = _build_distillation(args, distill_type, model, data_config, label_names, common)
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )
    return task


def _convert_norms(args, model: nn.Module, is_dearkd: bool) -> nn.Module:
    """The model with the BatchNorm, or in the TorchScript, that is asked for."""
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    if args.sync_bn and torch.distributed.is_initialized():
        model = convert_sync_batchnorm(model)
    if args.torchscript:
        if is_dearkd:
            raise ValueError(
                '--torchscript does not go with DearKD, which reads tokens from the middle of the model.'
                ' Use --torchcompile.')
        if any(isinstance(module, ConvAttention) for module in model.modules()):
            raise ValueError(
                '--torchscript trains CNNs and plain ViTs, not models with MHCA blocks, which TorchScript only runs.'
                ' Use --torchcompile.')
        if args.fuser:
            set_jit_fuser(args.fuser)
        cfg = getattr(model, 'pretrained_cfg', None)
        try:
            model = torch.jit.script(model)
        except Exception as e:  # the compiler raises what it likes
            raise ValueError(f'--torchscript can not compile {args.model}: {_reason(e)}. Use --torchcompile.') from e
        cast(Any, model).pretrained_cfg = cfg  # timm's distillation tasks look for it
    return model


def _match_classes(teacher: Any, names: Optional[Sequence[str]], num_classes: int) -> Optional[List[int]]:
    """Return the teacher's class for each of the student's, by name; None if they are the same or have no names.

    Warns if the names differ: they may be other names of the same classes.
    """
    known = label_names(teacher)
    names = [normal_name(name) for name in names or ()]
    if len(names) != num_classes or len(known) != teacher.num_classes or known == names:
        return None
    unknown = [name for name in names if name not in known]
    if not unknown:
        _logger.info("The teacher's classes are in another order, or more: those of the images are found by name.")
        return [known.index(name) for name in names]
    if len(known) == num_classes:
        index = names.index(unknown[0])
        _logger.warning(
            f'The teacher knows no class {unknown[0]!r}. Its classes are taken in its order, where {unknown[0]!r} is'
            f' {known[index]!r}. If these differ, set --kd-class-map FILE.')
    return None


def _build_distillation(
        args,
        distill_type: str,
        model: nn.Module,
        data_config: Dict[str, Any],
        label_names: Optional[Sequence[str]],
        common: Dict[str, Any],
) -> TrainingTask:
    """DearKD's task or one of timm's distillation tasks, all with the same `Teacher`.

    Raises:
        ValueError: If the teacher, the student and the options do not fit together.
    """
    loaded = create_teacher(args.kd_model_name, args.kd_teacher_checkpoint)
    class_map = load_class_map(args.kd_class_map) if args.kd_class_map else None
    if class_map is None and distill_type != 'feature':
        class_map = _match_classes(loaded, label_names, cast(Any, model).num_classes)
    teacher = Teacher.for_student(
        model,
        loaded,
        img_size=args.kd_teacher_img_size,
        class_map=class_map,
        mean=data_config['mean'],
        std=data_config['std'],
        input_size=data_config['input_size'],
    )
    task: TrainingTask
    if distill_type == 'dearkd':
        task = DearKDTask(
            model,
            teacher,
            build_schedule(args, args.epochs),
            hooks=args.dearkd_hooks,
            normalize_features=args.dearkd_normalize_features,
            **common,
        )
    else:
        try:
            task = _build_timm_task(args, distill_type, model, teacher, common)
        except (AssertionError, KeyError, RuntimeError, TypeError) as e:
            raise ValueError(f'--kd-distill-type {distill_type} with {args.kd_model_name}: {_reason(e)}') from e
    if args.kd_teacher_img_size is None:
        for size in args.train_img_sizes or ():
            teacher.probe((data_config['input_size'][0], size, size))
    _log_teacher_size(args, loaded, data_config['input_size'])
    if args.amp:
        teacher.store_weights(getattr(torch, args.amp_dtype))
    return task


def _build_timm_task(args, distill_type: str, model: nn.Module, teacher: nn.Module, common: Dict[str, Any]):
    common = dict(
        common,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
    )
    if distill_type == 'logit':
        return LogitTask(
            model, teacher, loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)
    if distill_type == 'feature':
        return FeatureTask(
            model,
            teacher,
            student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim,
            **common,
        )
    return TokenTask(
        model, teacher, distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common)


def _log_teacher_size(args, teacher: nn.Module, input_size: Tuple[int, int, int]) -> None:
    """Tell at what size the teacher was trained, where it sees another and the files say so."""
    checkpoint, name, given = args.kd_teacher_checkpoint, args.kd_model_name, args.kd_teacher_img_size
    if checkpoint and not training_args(checkpoint) and not os.path.isdir(name) and ':' not in name:
        return  # weights alone: the architecture's usual size need not be theirs
    trained = tuple(get_model_input_config(teacher)['input_size'][1:])
    seen = tuple(input_size[1:]) if given is None else (given, given)
    if trained == seen:
        return
    ratio = max(max(a / b, b / a) for a, b in zip(trained, seen))
    remedy = f' --kd-teacher-img-size {trained[-1]} resizes its images.' if given is None else ''
    # CNNs do well at somewhat larger sizes: timm evaluates at up to 1.4 times the size of training
    level = logging.WARNING if given is None and ratio > 1.5 else logging.INFO
    _logger.log(
        level,
        f'The teacher was trained at {trained[0]}x{trained[1]} pixels and sees {seen[0]}x{seen[1]}, where its answers'
        f' may be worse.{remedy}')


def build_optimizer(args, task: TrainingTask, device: torch.device, ranks: Ranks) -> torch.optim.Optimizer:
    """timm's optimizer over all that the task trains, at the learning rate given or scaled by the batch size."""
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
        raise ValueError(f'Could not create --opt {args.opt}: {_reason(e)}') from e
    base: Any = getattr(optimizer, '_base_optimizer', optimizer)  # Lookahead is no whole optimizer, and loads by this
    if 'fused' in base.defaults and hasattr(base, 'register_load_state_dict_pre_hook'):
        base.register_load_state_dict_pre_hook(_keep_fused)
    return optimizer


def _keep_fused(optimizer: torch.optim.Optimizer, state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """A checkpoint's state for this optimizer's kind of step, whichever the checkpoint was written with."""
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
    return optimizer_class in (torch.optim.Adam, torch.optim.AdamW)  # Adagrad's is for the CPU alone in older versions


def build_scheduler(args, optimizer: torch.optim.Optimizer, num_updates: int, start: Position):
    """timm's learning-rate schedule, brought to where the run begins, and the length of the run in epochs.

    Args:
        args: The options.
        optimizer: What it schedules.
        num_updates: Updates per epoch.
        start: Where the run begins.
    """
    rates = [group['lr'] for group in optimizer.param_groups]
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=num_updates)
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
