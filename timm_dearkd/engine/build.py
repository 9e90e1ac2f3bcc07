"""From options to objects. Beside the script itself, this is the one place that reads `args`."""
import logging
import os
import platform
from datetime import datetime
from typing import Any, Callable, Dict, Optional, Tuple, cast

import timm
import torch
import torch.nn as nn
from PIL import ImageMode
from timm.data import FastCollateMixup, Mixup
from timm.data.model_config import resolve_input_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import resolve_model_input_args, safe_model_name
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.utils import set_jit_fuser
from torch.utils.data import Subset

from distill_hooks import DearKDTask, TwoStageSchedule, has_content_tokens, load_class_map, resolve_teacher

from .._version import __version__
from ..analysis.attention_distance import LOG_NAME, DistanceLog, attention_layers
from ..analysis.inputs import spread
from .data import (
    ClassFraction,
    SkipUnreadable,
    TrainLoader,
    check_img_size,
    check_labels,
    class_names,
    create_eval_loader,
    create_train_loader,
    open_dataset,
    open_eval_dataset,
    set_image_mode,
)
from .device import SINGLE, Precision, Ranks
from .loop import Stepper, Trainer, Validator
from .output import (
    AtomicCheckpointSaver,
    Position,
    find_checkpoint,
    remove_recovery,
    trim_table,
    write_run_info,
    write_text,
)
from .recorder import Recorder
from .tracking import Tracker

__all__ = [
    'build_datasets', 'build_distance_images', 'build_eval_loader', 'build_evaluation', 'build_mixup',
    'build_optimizer', 'build_recorder', 'build_schedule', 'build_scheduler', 'build_student', 'build_task',
    'build_train_loader', 'build_trainer', 'build_validator', 'describe_run', 'images_per_update', 'output_parent',
]

_logger = logging.getLogger(__name__)

NUM_DISTANCE_IMAGES = 32


def _dataset_kwargs(args) -> Dict[str, Any]:
    return dict(
        download=args.dataset_download,
        batch_size=args.batch_size,
        seed=args.seed,
        input_img_mode=args.input_img_mode or 'RGB',
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
        class_map=args.class_map,
    )


def build_datasets(args) -> Tuple[Any, Any]:
    """The training and the validation set; without a --val-split, there is no validation set."""
    common, root = _dataset_kwargs(args), args.data_dir or args.data
    train_set = open_dataset(
        args.dataset, root, args.train_split, is_training=True,
        repeats=args.epoch_repeats, num_samples=args.train_num_samples, **common)
    if args.train_fraction < 1.:
        skips = isinstance(train_set, SkipUnreadable)
        train_set = ClassFraction(
            train_set.dataset if skips else train_set, args.train_fraction, args.fraction_seed,
            keep_length=args.fraction_keep == 'steps')
        train_set = SkipUnreadable(train_set) if skips else train_set  # the next image is one of the fraction
        _logger.info(f'Training on {len(train_set.indices)} images, {100 * args.train_fraction:g} % of every class.')
    if not args.val_split:
        return train_set, None
    eval_set = open_eval_dataset(
        train_set, args.dataset, root, args.val_split, is_training=False,
        num_samples=args.val_num_samples, **common)
    roots = [getattr(getattr(dataset, 'reader', None), 'root', None) for dataset in (train_set, eval_set)]
    if not args.dataset and roots[0] == roots[1]:
        _logger.warning(
            f'{root} has no splits, so the validation images are those of the training, and their accuracy says little.'
            f' Make {root}/train and {root}/validation.')
    return train_set, eval_set


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
    names = class_names(dataset)
    num_classes = args.num_classes
    if num_classes is None and names and not args.eval_only:
        num_classes = len(names)
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
        pretrained_cfg_overlay=overlay or None,
    )
    try:
        kwargs = resolve_model_input_args(args.model, vars(args), **{**overrides, **args.model_kwargs})
        if args.dearkd_rpe_drop is not None and 'dearkd' not in kwargs['model_name']:
            raise ValueError('--dearkd-rpe-drop needs MHCA blocks. Use a dearkd_* model.')
        model: Any = create_model(
            kwargs.pop('model_name'),
            pretrained=args.pretrained or bool(args.pretrained_path),
            checkpoint_path=args.initial_checkpoint,
            **kwargs,
        )
    except (AssertionError, FileNotFoundError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f'Could not create --model {args.model}: {_reason(e)}') from e
    check_labels(dataset, model.num_classes)
    check_img_size(model, args.train_img_sizes or ())
    _adapt_student(args, model)
    model.to(device=device, dtype=model_dtype(args))
    data_config = resolve_input_data_config(model, args=vars(args), verbose=True)
    num_params = sum(p.numel() for p in model.parameters())
    _logger.info(f'Model {safe_model_name(args.model)}: {num_params:,} parameters, {model.num_classes} classes')
    return model, data_config


def build_evaluation(args, device: torch.device, create_model: Callable[..., Any]):
    """A model to evaluate, its data configuration, and the validation set with the labels it was trained with."""
    common, root = dict(_dataset_kwargs(args), is_training=False), args.data_dir or args.data
    eval_set = open_dataset(args.dataset, root, args.val_split, num_samples=args.val_num_samples, **common)
    try:  # a class may have no validation images
        classes = open_dataset(args.dataset, root, args.train_split, **common)
        eval_set = open_eval_dataset(
            classes, args.dataset, root, args.val_split, num_samples=args.val_num_samples, **common)
    except (OSError, ValueError):
        classes = eval_set
    if args.num_classes is None and args.initial_checkpoint and class_names(classes):
        args.num_classes = len(class_names(classes) or ())
    model, data_config = build_student(args, eval_set, device, create_model)
    trained = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    if trained and not args.class_map and set(class_names(classes) or ()) <= set(trained):
        common['class_map'] = {name: index for index, name in enumerate(trained)}
        eval_set = open_dataset(args.dataset, root, args.val_split, num_samples=args.val_num_samples, **common)
    return model, data_config, eval_set


def _adapt_student(args, model: Any) -> None:
    if args.head_init_scale is not None:
        with torch.no_grad():
            model.get_classifier().weight.mul_(args.head_init_scale)
            model.get_classifier().bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        nn.init.constant_(model.get_classifier().bias, args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)


def _reason(error: Exception) -> str:
    return ' '.join(str(error).split())[:400] or type(error).__name__


def model_dtype(args) -> torch.dtype:
    return getattr(torch, args.model_dtype or 'float32')


def images_per_update(args, ranks: Ranks) -> int:
    """Images that all processes together take an optimizer step with."""
    return args.batch_size * args.grad_accum_steps * ranks.world_size


def build_mixup(args, num_classes: int) -> Optional[Mixup]:
    """timm's Mixup/CutMix, as the prefetcher's collate function or for whole batches; None when off."""
    if not (args.mixup > 0. or args.cutmix > 0. or args.cutmix_minmax):
        return None
    return (Mixup if args.no_prefetcher else FastCollateMixup)(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def _loader_kwargs(args, device: torch.device, ranks: Ranks) -> Dict[str, Any]:
    return dict(
        device=device,
        ranks=ranks,
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        use_prefetcher=not args.no_prefetcher,
        img_dtype=model_dtype(args),
    )


def build_train_loader(
        args,
        dataset,
        data_config: Dict[str, Any],
        mixup: Optional[Mixup],
        device: torch.device,
        ranks: Ranks,
) -> TrainLoader:
    """The training loader, with the input sizes and batch sizes that are asked for."""
    set_image_mode(dataset, _image_mode(args, data_config))
    sizes = args.train_img_sizes or (args.train_batches_per_epoch and [data_config['input_size'][-2:]]) or None
    return create_train_loader(
        dataset,
        data_config,
        args.batch_size,
        seed=args.seed,
        mixup=mixup,
        mixup_off_epoch=args.mixup_off_epoch,
        num_aug_splits=args.aug_splits,
        num_aug_repeats=args.aug_repeats,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.,
        auto_augment=args.aa,
        interpolation=(not args.no_aug and args.train_interpolation) or data_config['interpolation'],
        use_multi_epochs_loader=args.use_multi_epochs_loader and not sizes,  # ours keeps its workers anyway
        worker_seeding=args.worker_seeding,
        input_size_choices=sizes,
        batch_size_choices=args.train_batch_sizes if sizes else None,
        batch_choice_weights=args.train_size_probs,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
        **_loader_kwargs(args, device, ranks),
    )


def build_eval_loader(args, dataset, data_config: Dict[str, Any], device: torch.device, ranks: Ranks):
    """The validation loader; None without a validation set."""
    if dataset is None:
        return None
    set_image_mode(dataset, _image_mode(args, data_config))
    return create_eval_loader(
        dataset, data_config, args.validation_batch_size or args.batch_size, **_loader_kwargs(args, device, ranks))


def _image_mode(args, data_config: Dict[str, Any]) -> str:
    in_chans = data_config['input_size'][0]
    mode = args.input_img_mode or ('RGB' if in_chans == 3 else 'L')
    if len(ImageMode.getmode(mode).bands) != in_chans:
        raise ValueError(f'--input-img-mode {mode} gives another number of channels than the model takes, {in_chans}.')
    return mode


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
) -> TrainingTask:
    """timm's classification or distillation task, or DearKD's, with the average of weights that is asked for."""
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
    model = _convert_norms(args, model, is_dearkd)
    task: Any
    if not args.kd_model_name:
        task = ClassificationTask(model, **common)
    elif is_dearkd:
        task = DearKDTask(
            model,
            args.kd_model_name,
            build_schedule(args, args.epochs),
            teacher_checkpoint=args.kd_teacher_checkpoint,
            teacher_class_map=load_class_map(args.kd_class_map) if args.kd_class_map else None,
            teacher_img_size=args.kd_teacher_img_size,
            hooks=args.dearkd_hooks,
            normalize_features=args.dearkd_normalize_features,
            mean=data_config['mean'],
            std=data_config['std'],
            input_size=data_config['input_size'],
            **common,
        )
        if args.amp:
            task.teacher.store_weights(getattr(torch, args.amp_dtype))
    else:
        try:
            task = _build_timm_task(args, distill_type, model, common)
        except (AssertionError, KeyError, RuntimeError, TypeError) as e:
            raise ValueError(f'--kd-distill-type {distill_type} with {args.kd_model_name}: {_reason(e)}') from e
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
        if args.fuser:
            set_jit_fuser(args.fuser)
        try:
            model = torch.jit.script(model)
        except Exception as e:  # the compiler raises what it likes
            raise ValueError(f'--torchscript can not compile {args.model}: {_reason(e)}. Use --torchcompile.') from e
    return model


def _build_timm_task(args, distill_type: str, model: nn.Module, common: Dict[str, Any]) -> TrainingTask:
    """One of timm's own distillation tasks."""
    name, checkpoint = resolve_teacher(args.kd_model_name, args.kd_teacher_checkpoint)
    common = dict(
        student_model=model,
        teacher_model=name,
        teacher_pretrained_path=checkpoint,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        **common,
    )
    if distill_type == 'logit':
        return LogitDistillationTask(loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common)
    if distill_type == 'feature':
        return FeatureDistillationTask(
            student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim,
            **common,
        )
    return TokenDistillationTask(
        distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common)


def build_optimizer(args, task: TrainingTask, device: torch.device, ranks: Ranks) -> torch.optim.Optimizer:
    """timm's optimizer over all that the task trains, at the learning rate given or scaled by the batch size."""
    kwargs = optimizer_kwargs(cfg=args)
    if args.lr is None:
        ratio = images_per_update(args, ranks) / args.lr_base_size
        scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
        kwargs['lr'] = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
        _logger.info(f'Learning rate {kwargs["lr"]:.4g}, from lr-base {args.lr_base:g} ({scale} in the batch size).')
    if device.type == 'cuda' and _takes_fused(args.opt):
        kwargs['fused'] = True  # leaves out a step on the device, and is faster
    try:
        optimizer = create_optimizer_v2(cast(nn.Module, task.get_trainable_module()), **{**kwargs, **args.opt_kwargs})
    except (AssertionError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f'Could not create --opt {args.opt}: {_reason(e)}') from e
    if 'fused' in optimizer.defaults and hasattr(optimizer, 'register_load_state_dict_pre_hook'):
        optimizer.register_load_state_dict_pre_hook(_keep_fused)
    return optimizer


def _keep_fused(optimizer: torch.optim.Optimizer, state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """A checkpoint's state for this optimizer's kind of step, whichever the checkpoint was written with."""
    groups = [{**group, 'fused': optimizer.defaults['fused']} for group in state_dict['param_groups']]
    return {**state_dict, 'param_groups': groups}


def _takes_fused(name: str) -> bool:
    try:
        optimizer_class: Any = get_optimizer_class(name, bind_defaults=False)
    except ValueError:
        return False
    return optimizer_class.__module__.startswith('torch.') and 'fused' in optimizer_class.__init__.__code__.co_varnames


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


def build_trainer(
        args,
        task: TrainingTask,
        loader: TrainLoader,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        ranks: Ranks,
) -> Trainer:
    """What runs the epochs."""
    power = dict(none=0., sqrt=0.5, linear=1.)[args.variable_batch_loss_scale]
    on_host = precision.device.type == 'cpu'
    return Trainer(
        task,
        loader,
        Stepper(task, optimizer, precision.scaler, args.clip_grad, args.clip_mode, on_host),
        precision,
        ranks,
        grad_accum_steps=args.grad_accum_steps,
        channels_last=args.channels_last,
        log_interval=args.log_interval,
        skip_nan_steps=args.skip_nan_steps,
        loss_scale=(lambda batch_size: (batch_size / args.batch_size) ** power) if power else None,
        synchronize=args.synchronize_step,
    )


def build_validator(args, task: TrainingTask, loader, precision: Precision, ranks: Ranks) -> Optional[Validator]:
    """What evaluates; None without a validation set."""
    if loader is None:
        return None
    return Validator(
        task, loader, precision, ranks,
        channels_last=args.channels_last,
        tta=args.tta,
        log_interval=args.log_interval,
    )


def output_parent(args) -> str:
    """Folder that the output folders are made in."""
    return args.output or os.path.join('.', 'output', 'train')


def build_recorder(
        args,
        args_text: str,
        trainer: Trainer,
        model: nn.Module,
        data_config: Dict[str, Any],
        export: Callable[..., None],
        start: Position,
        run_info: Dict[str, Any],
        distance_images: Optional[torch.Tensor] = None,
) -> Recorder:
    """The output folder with `args.yaml` and `run.json`, and what writes into it."""
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(data_config['input_size'][-1])])
    folder, saver = os.path.join(output_parent(args), name), None
    is_primary = trainer.ranks.is_primary
    if is_primary:
        os.makedirs(folder, exist_ok=True)
        write_text(folder, 'args.yaml', args_text)
        write_run_info(folder, position=start, **run_info)
        saver = _build_saver(args, folder, model, trainer)
        for table in ('summary.csv', LOG_NAME):
            trim_table(os.path.join(folder, table), start.epoch)
    wandb = dict(
        project=args.wandb_project,
        name=args.experiment or None,
        config=vars(args),
        tags=args.wandb_tags,
        resume='must' if args.wandb_resume_id else None,
        id=args.wandb_resume_id or None,
    )
    tracker = Tracker(
        folder,
        tensorboard=args.log_tensorboard and is_primary,
        wandb=wandb if args.log_wandb and is_primary else None,
        first_step=start.epoch * trainer.num_updates + start.update + 1,
    )
    return Recorder(
        trainer, folder, saver, tracker,
        export,
        images_per_update=images_per_update(args, trainer.ranks),
        recovery_interval=args.recovery_interval,
        export_ema=trainer.task.has_ema() and not args.model_ema_force_cpu,
        saves_images=args.save_images,
        distance_log=DistanceLog(
            folder, cast(nn.Module, trainer.task.get_eval_model()), distance_images, trainer.precision.autocast,
        ) if distance_images is not None and is_primary else None,
    )


def describe_run(args, train_set, eval_set, model: nn.Module, precision: Precision, ranks: Ranks) -> Dict[str, Any]:
    """Data and environment, for `run.json`."""
    def count(dataset) -> Optional[int]:
        try:
            return len(dataset)
        except TypeError:  # a stream, or no data set
            return None

    device = precision.device
    data = dict(train_images=count(train_set), validation_images=count(eval_set), classes=model.num_classes)
    environment = dict(
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else
        f'{device} ({platform.machine()}, {torch.get_num_threads()} threads)',
        processes=ranks.world_size,
        precision=str(precision.amp_dtype or model_dtype(args)).replace('torch.', ''),
        **{'timm-dearkd': __version__}, timm=timm.__version__, torch=torch.__version__,
        python=platform.python_version(), system=platform.platform())
    return dict(data={key: value for key, value in data.items() if value is not None}, environment=environment)


def build_distance_images(args, eval_set, data_config: Dict[str, Any], model: nn.Module, device: torch.device):
    """The validation images (B, C, H, W) that --track-attention-distance looks at; None without it.

    They are spread over the validation set; of a stream they are the first.

    Raises:
        ValueError: There are none, or the model's attention can't be seen.
    """
    if not args.track_attention_distance:
        return None
    if eval_set is None:
        raise ValueError('--track-attention-distance looks at validation images. Set --val-split.')
    attention_layers(model)
    if hasattr(eval_set, '__getitem__') and hasattr(eval_set, '__len__'):
        eval_set = Subset(eval_set, spread(len(eval_set), NUM_DISTANCE_IMAGES))
    kwargs = dict(_loader_kwargs(args, device, SINGLE), num_workers=0)
    return next(iter(create_eval_loader(eval_set, data_config, NUM_DISTANCE_IMAGES, **kwargs)))[0]


def _build_saver(args, folder: str, model: nn.Module, trainer: Trainer) -> AtomicCheckpointSaver:
    saver = AtomicCheckpointSaver(
        model=model,
        task=trainer.task,
        optimizer=trainer.step.optimizer,
        args=args,
        amp_scaler=trainer.precision.scaler,
        checkpoint_dir=folder,
        recovery_dir=folder,
        decreasing='loss' in args.eval_metric,
        max_history=args.checkpoint_hist,
    )
    if args.resume and os.path.dirname(os.path.abspath(args.resume)) == os.path.abspath(folder):
        saver.load_state_dict_from_checkpoint(args.resume)
        if not os.path.samefile(args.resume, find_checkpoint(folder)):
            saver.go_back_to(args.resume)
    else:
        remove_recovery(folder)  # of another run, which this one replaces
    return saver
