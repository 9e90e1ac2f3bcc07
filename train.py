#!/usr/bin/env python3
"""Train a timm model on images, alone or taught by a CNN with DearKD.

A thin fork of timm's train.py: the same flags, files and habits.

    python train.py DIR --model dearkd_tiny_patch16_224 --kd-model-name regnety_160.deit_in1k
    python train.py IMAGENET --model dearkd_tiny_patch16_224 -c recipes/dearkd_300e.yaml
"""
import difflib
import logging
import os
from datetime import datetime
from functools import partial
from typing import Any, Dict, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from timm.data.model_config import resolve_input_data_config
from timm.layers import set_fast_norm
from timm.models import create_model, parse_model_name, resolve_model_input_args, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationEvaluator,
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils import get_outdir, random_seed, setup_default_logging, trim_summary, update_summary

import timm_dearkd  # noqa: F401  registers the architectures
from distill_hooks import DearKDTask, TwoStageSchedule, has_content_tokens
from timm_dearkd.attention import AdaptiveRelPos
from timm_dearkd.engine.data import (
    check_img_size,
    check_labels,
    class_names,
    create_eval_loader,
    create_mixup,
    create_train_loader,
    open_dataset,
)
from timm_dearkd.engine.device import Precision, select_device
from timm_dearkd.engine.loop import Stepper, mean_lr, train_one_epoch, validate
from timm_dearkd.engine.options import build_config_parser, build_parser, parse_args
from timm_dearkd.engine.output import AtomicCheckpointSaver, export_model, save_images, save_recovery, write_text

_logger = logging.getLogger('train')

config_parser = build_config_parser()
parser = build_parser()


def _parse_args(argv: Optional[Sequence[str]] = None):
    return parse_args(parser, config_parser, argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    setup_default_logging()
    args, args_text = _parse_args(argv)
    check_args(args)
    device = select_device(args.device)
    random_seed(args.seed)
    if args.fast_norm:
        set_fast_norm()

    train_set, eval_set = open_datasets(args)
    model, data_config = create_student(args, train_set, device)
    loader_train, loader_eval = create_loaders(args, train_set, eval_set, data_config, model.num_classes, device)
    task = create_task(args, model, data_config, device)

    precision = Precision(device, getattr(torch, args.amp_dtype) if args.amp else None)
    optimizer = create_optimizer(args, task)
    start_epoch = resume(args, task, optimizer, precision)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=-(-len(loader_train) // args.grad_accum_steps))
    if start_epoch > 0:
        if args.sched_on_updates:
            lr_scheduler.step_update(start_epoch * -(-len(loader_train) // args.grad_accum_steps))
        else:
            lr_scheduler.step(start_epoch)

    saver = create_output(args, args_text, model, data_config, task, optimizer, precision)
    trim_summary(os.path.join(saver.checkpoint_dir, 'summary.csv'), start_epoch)
    _logger.info(f'Training for {num_epochs - start_epoch} epochs of {num_epochs}. Output: {saver.checkpoint_dir}')
    fit(
        args, task, optimizer, lr_scheduler, precision, loader_train, loader_eval, saver,
        range(start_epoch, num_epochs), partial(
            export_model, folder=saver.checkpoint_dir, data_config=data_config, label_names=class_names(train_set)))


def fit(args, task, optimizer, lr_scheduler, precision, loader_train, loader_eval, saver, epochs, export) -> None:
    """Train and evaluate the epochs, with a checkpoint after each."""
    output_dir = saver.checkpoint_dir
    step = Stepper(task, optimizer, precision.scaler, args.clip_grad, args.clip_mode)
    for epoch in epochs:
        if isinstance(task, DearKDTask):
            task.set_epoch(epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            loader_train.mixup_enabled = False
        losses = train_one_epoch(
            epoch, task, loader_train, step, precision,
            lr_scheduler=lr_scheduler,
            grad_accum_steps=args.grad_accum_steps,
            channels_last=args.channels_last,
            log_interval=args.log_interval,
            on_log=partial(save_images, output_dir) if args.save_images else None,
            on_batch=partial(save_recovery, saver, epoch, args.recovery_interval) if args.recovery_interval else None,
        )
        lr = mean_lr(optimizer)  # the epoch's own, before the scheduler moves on

        metrics: Dict[str, Any] = {}
        if (epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs.stop:
            use_ema = task.has_ema() and not args.model_ema_force_cpu
            for ema in (False, True) if use_ema else (False,):
                metrics = validate(
                    task.get_eval_model(ema=ema), loader_eval, task.create_evaluator(), precision,
                    channels_last=args.channels_last,
                    log_interval=args.log_interval,
                    label=f'Test: {epoch}' + (' (EMA)' if ema else ''),
                )
        metric = metrics.get(args.eval_metric)
        lr_scheduler.step(epoch + 1, metric)
        update_summary(
            epoch, summary_row(task, losses), metrics or dict.fromkeys(ClassificationEvaluator.metric_names, ''),
            os.path.join(output_dir, 'summary.csv'), lr=lr)
        best_metric, best_epoch = saver.save_checkpoint(epoch, metric=metric)
        if best_epoch == epoch:
            export(task.get_eval_model(ema=task.has_ema()))
    if saver.best_metric is not None:
        _logger.info(f'*** Best {args.eval_metric}: {saver.best_metric:.4g} (epoch {saver.best_epoch})')
        _logger.info(f"*** Load it with timm.create_model('local-dir:{output_dir}', pretrained=True)")


def summary_row(task: TrainingTask, losses: Dict[str, float]) -> Dict[str, Any]:
    """Training columns of summary.csv: the same in every epoch, empty where a stage has no such loss."""
    if not isinstance(task, DearKDTask):
        return dict(losses)
    return dict(
        stage=task.weights.stage, alpha=task.weights.alpha, **{name: losses.get(name, '') for name in task.loss_names})


def check_args(args) -> None:
    """Refuse what can't work before any long work begins."""
    source, name = parse_model_name(args.model)
    if source is None and not timm.is_model(name.split('.')[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.4)
        raise ValueError(f'Unknown --model {args.model!r}. The nearest names: {", ".join(near) or "none"}.')
    for flag in ('batch_size', 'epochs', 'grad_accum_steps', 'log_interval', 'val_interval', 'checkpoint_hist'):
        if getattr(args, flag) < 1:
            raise ValueError(f'--{flag.replace("_", "-")} is {getattr(args, flag)}, expected 1 or more.')
    if args.eval_metric not in ClassificationEvaluator.metric_names:
        names = ', '.join(ClassificationEvaluator.metric_names)
        raise ValueError(f'--eval-metric is {args.eval_metric!r}, expected one of {names}.')
    if args.amp_dtype not in ('float16', 'bfloat16'):
        raise ValueError(f'--amp-dtype is {args.amp_dtype!r}, expected float16 or bfloat16.')
    for flag in ('resume', 'kd_teacher_checkpoint', 'initial_checkpoint', 'pretrained_path'):
        path = getattr(args, flag)
        if path and not os.path.isfile(path):
            raise FileNotFoundError(f'--{flag.replace("_", "-")}: no file {path!r}.')
    if args.aug_splits == 1 or (args.jsd_loss and not args.aug_splits):
        raise ValueError('--aug-splits has to be 2 or more, and --jsd-loss needs it. Set --aug-splits 3, say.')
    if args.kd_teacher_checkpoint and not args.kd_model_name:
        raise ValueError('--kd-teacher-checkpoint needs the architecture of the teacher: add --kd-model-name NAME.')


def open_datasets(args) -> Tuple[Any, Any]:
    """The training and the validation set."""
    in_chans = args.in_chans or (args.input_size[0] if args.input_size else 3)
    common = dict(
        download=args.dataset_download,
        batch_size=args.batch_size,
        seed=args.seed,
        input_img_mode=args.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
    )
    root = args.data or args.data_dir
    train_set = open_dataset(
        args.dataset, root, args.train_split, is_training=True, class_map=args.class_map,
        repeats=args.epoch_repeats, num_samples=args.train_num_samples, **common)
    # a class without validation images must not shift the labels of the others
    class_map = args.class_map or getattr(getattr(train_set, 'reader', None), 'class_to_idx', '')
    eval_set = open_dataset(
        args.dataset, root, args.val_split, is_training=False, class_map=class_map,
        num_samples=args.val_num_samples, **common)
    return train_set, eval_set


def create_student(args, train_set, device: torch.device) -> Tuple[nn.Module, Dict[str, Any]]:
    """The model to train, and timm's data configuration for it."""
    num_classes, names = args.num_classes, class_names(train_set)
    if num_classes is None and names:
        num_classes = len(names)
        _logger.info(f'--num-classes not given: {num_classes}, as the data set has.')
    kwargs = resolve_model_input_args(args.model, vars(args), **args.model_kwargs)
    if args.pretrained_path:
        kwargs['pretrained_cfg_overlay'] = dict(file=args.pretrained_path, num_classes=-1)
    model = create_model(
        kwargs.pop('model_name'),
        pretrained=args.pretrained or bool(args.pretrained_path),
        num_classes=num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
        checkpoint_path=args.initial_checkpoint,
        **kwargs,
    )
    check_labels(train_set, model.num_classes)
    check_img_size(model)
    if args.head_init_scale is not None or args.head_init_bias is not None:
        head = model.get_classifier()
        with torch.no_grad():
            head.weight.mul_(1. if args.head_init_scale is None else args.head_init_scale)
            head.bias.mul_(1. if args.head_init_scale is None else args.head_init_scale)
            if args.head_init_bias is not None:
                nn.init.constant_(head.bias, args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    if args.dearkd_rpe_drop is not None:
        encodings = [m for m in model.modules() if isinstance(m, AdaptiveRelPos)]
        if not encodings:
            raise ValueError(f'--dearkd-rpe-drop: {args.model} has no MHCA blocks. Use a dearkd_* model.')
        for rpe in encodings:
            rpe.drop_rate = args.dearkd_rpe_drop
    model.to(device=device, dtype=getattr(torch, args.model_dtype) if args.model_dtype else None)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    data_config = resolve_input_data_config(model, args=vars(args), verbose=True)
    num_params = sum(p.numel() for p in model.parameters())
    _logger.info(f'Model {safe_model_name(args.model)}: {num_params:,} parameters, {model.num_classes} classes')
    return model, data_config


def create_loaders(args, train_set, eval_set, data_config: Dict[str, Any], num_classes: int, device: torch.device):
    """The training and the validation loader."""
    common = dict(
        device=device,
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        use_prefetcher=not args.no_prefetcher,
        img_dtype=getattr(torch, args.model_dtype) if args.model_dtype else torch.float32,
    )
    mixup = create_mixup(
        num_classes,
        prefetcher=not args.no_prefetcher,
        mixup=args.mixup,
        cutmix=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        smoothing=args.smoothing,
    )
    loader_train = create_train_loader(
        train_set,
        data_config,
        args.batch_size,
        mixup=mixup,
        num_aug_splits=args.aug_splits,
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
        interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        worker_seeding=args.worker_seeding,
        persistent_workers=not args.mixup_off_epoch,  # their collate function would not hear of it
        **common,
    )
    loader_eval = create_eval_loader(eval_set, data_config, args.validation_batch_size or args.batch_size, **common)
    return loader_train, loader_eval


def create_task(args, model: nn.Module, data_config: Dict[str, Any], device: torch.device) -> TrainingTask:
    """timm's classification or distillation task, or DearKD's."""
    mixup_active = args.mixup > 0. or args.cutmix > 0. or bool(args.cutmix_minmax)
    common: Dict[str, Any] = dict(
        criterion_kwargs=dict(
            loss_type='jsd' if args.jsd_loss else 'bce' if args.bce_loss else 'ce',
            jsd_splits=args.aug_splits,
            smoothing=args.smoothing,
            soft_targets=mixup_active,
            **(dict(
                bce_target_thresh=args.bce_target_thresh,
                bce_sum=args.bce_sum,
                pos_weight=args.bce_pos_weight) if args.bce_loss else {}),
        ),
        device=device,
        dtype=getattr(torch, args.model_dtype) if args.model_dtype else None,
    )
    distill_type = args.kd_distill_type or ('dearkd' if has_content_tokens(model) else 'logit')
    if not args.kd_model_name:
        task: TrainingTask = ClassificationTask(model, **common)
    elif distill_type == 'dearkd':
        task = DearKDTask(
            model,
            args.kd_model_name,
            TwoStageSchedule(
                args.epochs,
                args.dearkd_stage1_epochs,
                stage2=args.dearkd_stage2,
                alpha=args.dearkd_alpha,
                beta=args.dearkd_beta,
                cooldown_epochs=args.cooldown_epochs + (args.warmup_epochs if args.warmup_prefix else 0),
            ),
            teacher_checkpoint=args.kd_teacher_checkpoint,
            teacher_img_size=args.kd_teacher_img_size,
            hooks=args.dearkd_hooks,
            normalize_features=args.dearkd_normalize_features,
            mean=data_config['mean'],
            std=data_config['std'],
            input_size=data_config['input_size'],
            **common,
        )
    else:
        task = create_timm_task(args, distill_type, model, common)
    if args.channels_last and hasattr(task, 'teacher'):
        task.teacher.to(memory_format=torch.channels_last)
    if args.model_ema:
        task.setup_ema(
            decay=args.model_ema_decay,
            use_warmup=args.model_ema_warmup,
            device=torch.device('cpu') if args.model_ema_force_cpu else None,
        )
    return task


def create_timm_task(args, distill_type: str, model: nn.Module, common: Dict[str, Any]) -> TrainingTask:
    """One of timm's own distillation tasks."""
    common = dict(
        student_model=model,
        teacher_model=args.kd_model_name,
        teacher_pretrained_path=args.kd_teacher_checkpoint,
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


def create_optimizer(args, task: TrainingTask) -> torch.optim.Optimizer:
    """timm's optimizer over all that the task trains, at the learning rate given or scaled by the batch size."""
    if args.lr is None:
        ratio = args.batch_size * args.grad_accum_steps / args.lr_base_size
        scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
        args.lr = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
        _logger.info(f'Learning rate {args.lr:.4g}, from lr-base {args.lr_base:g} ({scale} in the batch size).')
    return create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)


def resume(args, task: TrainingTask, optimizer: torch.optim.Optimizer, precision: Precision) -> int:
    """Continue from `--resume`. Returns the epoch to start with."""
    epoch = None
    if args.resume:
        epoch = resume_task_checkpoint(
            task, args.resume,
            optimizer=None if args.no_resume_opt else optimizer,
            loss_scaler=None if args.no_resume_opt else precision.scaler,
        )
        if task.has_ema():
            load_task_ema_checkpoint(task, args.resume)
    return args.start_epoch if args.start_epoch is not None else epoch or 0


def create_output(args, args_text: str, model, data_config, task, optimizer, precision) -> AtomicCheckpointSaver:
    """The output folder with `args.yaml`, and the saver that writes into it."""
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(data_config['input_size'][-1])])
    output_dir = get_outdir(args.output or os.path.join('.', 'output', 'train'), name)
    write_text(output_dir, 'args.yaml', args_text)
    saver = AtomicCheckpointSaver(
        model=model,
        task=task,
        optimizer=optimizer,
        args=args,
        amp_scaler=precision.scaler,
        checkpoint_dir=output_dir,
        recovery_dir=output_dir,
        decreasing='loss' in args.eval_metric,
        max_history=args.checkpoint_hist,
    )
    if args.resume and os.path.dirname(os.path.abspath(args.resume)) == os.path.abspath(output_dir):
        saver.load_state_dict_from_checkpoint(args.resume)
    return saver


if __name__ == '__main__':
    try:
        main()
    except (ValueError, FileNotFoundError) as e:
        parser.error(' '.join(str(e).split()))
