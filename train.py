#!/usr/bin/env python3
"""Train a timm model on images, alone or taught by a CNN with DearKD.

A thin fork of timm's train.py: the same flags, files and habits.

    python train.py DIR --model dearkd_tiny_patch16_224 --kd-model-name regnety_160.deit_in1k
    python train.py IMAGENET --model dearkd_tiny_patch16_224 -c recipes/dearkd_300e.yaml
"""
import json
import logging
import os
from datetime import datetime
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import FastCollateMixup, Mixup
from timm.data.model_config import resolve_input_data_config
from timm.layers import set_fast_norm
from timm.models import create_model, resolve_model_input_args, safe_model_name
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
from timm_dearkd.engine.data import (
    ClassFraction,
    check_img_size,
    check_labels,
    class_names,
    create_eval_loader,
    create_train_loader,
    open_dataset,
    open_eval_dataset,
    set_image_mode,
)
from timm_dearkd.engine.device import Precision, select_device
from timm_dearkd.engine.loop import Stepper, mean_lr, train_one_epoch, validate
from timm_dearkd.engine.options import build_config_parser, build_parser, check_args, parse_args
from timm_dearkd.engine.output import AtomicCheckpointSaver, export_model, save_images, save_recovery, write_text

_logger = logging.getLogger('train')

DEFAULT_OUTPUT = os.path.join('.', 'output', 'train')

config_parser = build_config_parser()
parser = build_parser()


def _parse_args(argv: Optional[Sequence[str]] = None):
    return parse_args(parser, config_parser, argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    prepare(argv)()


def prepare(argv: Optional[Sequence[str]] = None) -> Callable[[], None]:
    """Everything up to the first step, which is where mistakes in the options show. Returns the training."""
    setup_default_logging()
    args, args_text = _parse_args(argv)
    check_args(args)
    auto_resume = args.resume == 'auto'
    if auto_resume:
        last = os.path.join(args.output or DEFAULT_OUTPUT, args.experiment, 'last.pth.tar')
        args.resume = last if os.path.isfile(last) else ''
    device = select_device(args.device)
    random_seed(args.seed)
    if args.fast_norm:
        set_fast_norm()

    train_set, eval_set = open_datasets(args)
    model, data_config = create_student(args, train_set, device)
    for dataset in (train_set, eval_set):
        set_image_mode(dataset, args.input_img_mode or ('RGB' if data_config['input_size'][0] == 3 else 'L'))
    mixup = create_mixup(args, model.num_classes)
    loader_train, loader_eval = create_loaders(args, train_set, eval_set, data_config, mixup, device)
    task = create_task(args, model, data_config, device, soft_targets=mixup is not None)

    precision = Precision(device, getattr(torch, args.amp_dtype) if args.amp else None)
    optimizer = create_optimizer(args, task)
    start_epoch = resume(args, task, optimizer, precision)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    lr_scheduler, num_epochs = create_scheduler(args, optimizer, len(loader_train), start_epoch)
    if isinstance(task, DearKDTask):
        task.schedule = create_schedule(args, num_epochs)
    stop_epoch = num_epochs if args.stop_epoch is None else args.stop_epoch
    for name, epochs in (('stop-epoch', [stop_epoch]), ('save-epochs', args.save_epochs)):
        if not all(1 <= epoch <= num_epochs for epoch in epochs):
            raise ValueError(f'--{name} is {epochs[0]}, expected 1 to {num_epochs}, the epochs of the run.')
    if start_epoch >= stop_epoch and auto_resume:
        _logger.info(f'{args.experiment} has its {start_epoch} epochs already. It is left as it is.')
        return lambda: None
    if start_epoch >= stop_epoch:
        raise ValueError(f'Nothing to train: the run ends after epoch {stop_epoch}, and {start_epoch} are done.')

    saver = create_output(args, args_text, model, data_config, task, optimizer, precision)
    trim_summary(os.path.join(saver.checkpoint_dir, 'summary.csv'), start_epoch)
    _logger.info(f'Training for {stop_epoch - start_epoch} epochs of {num_epochs}. Output: {saver.checkpoint_dir}')
    export = partial(
        export_model, folder=saver.checkpoint_dir, data_config=data_config, label_names=class_names(train_set))
    return partial(
        fit, args, task, optimizer, lr_scheduler, precision, loader_train, loader_eval, saver, export,
        range(start_epoch, stop_epoch))


def fit(args, task, optimizer, lr_scheduler, precision, loader_train, loader_eval, saver, export, epochs) -> None:
    """Train and evaluate the epochs, with a checkpoint after each."""
    output_dir = saver.checkpoint_dir
    step = Stepper(task, optimizer, precision.scaler, args.clip_grad, args.clip_mode)
    use_ema = task.has_ema() and not args.model_ema_force_cpu
    results: List[Dict[str, Any]] = []
    try:
        for epoch in epochs:
            stage = ''
            if isinstance(task, DearKDTask):
                task.set_epoch(epoch)
                stage = f'  Stage: {task.weights.stage}'
            if hasattr(loader_train.dataset, 'set_epoch'):
                loader_train.dataset.set_epoch(epoch)
            if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
                loader_train.mixup_enabled = False
            losses = train_one_epoch(
                epoch, task, loader_train, step, precision,
                lr_scheduler=lr_scheduler,
                grad_accum_steps=args.grad_accum_steps,
                channels_last=args.channels_last,
                log_interval=args.log_interval,
                label=f'Train: {epoch}{stage}',
                on_log=partial(save_images, output_dir) if args.save_images else None,
                on_update=partial(save_recovery, saver, epoch, args.recovery_interval)
                if args.recovery_interval else None,
            )
            lr = mean_lr(optimizer)  # the epoch's own, before the scheduler moves on

            metrics: Dict[str, Any] = {}
            is_due = (epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs.stop or epoch + 1 in args.save_epochs
            if loader_eval is not None and is_due:
                for ema in (False, True) if use_ema else (False,):
                    metrics = validate(
                        task.get_eval_model(ema=ema), loader_eval, task.create_evaluator(), precision,
                        channels_last=args.channels_last,
                        log_interval=args.log_interval,
                        label=f'Test: {epoch}{stage}' + (' (EMA)' if ema else ''),
                    )
            metric = metrics.get(args.eval_metric) if loader_eval is not None else losses['loss']
            if lr_scheduler is not None:
                lr_scheduler.step(epoch + 1, metric)
            row = summary_row(task, losses)
            update_summary(
                epoch, row, metrics or dict.fromkeys(ClassificationEvaluator.metric_names, ''),
                os.path.join(output_dir, 'summary.csv'), lr=lr)
            results.append({'epoch': epoch, 'train': row, **({'validation': metrics} if metrics else {})})
            _, best_epoch = saver.save_checkpoint(epoch, metric=metric)
            if epoch + 1 in args.save_epochs:
                saver.save_milestone(epoch + 1)
            if best_epoch == epoch:
                export(task.get_eval_model(ema=use_ema))
    except KeyboardInterrupt:
        _logger.warning(f'Interrupted. The last finished epoch is in {os.path.join(output_dir, "last.pth.tar")}.')
    if saver.best_metric is not None:
        _logger.info(f'*** Best metric: {saver.best_metric:.4g} (epoch {saver.best_epoch})')
        _logger.info(f"*** Load it with timm.create_model('local-dir:{output_dir}', pretrained=True)")
    print_results(results, args.eval_metric)


def print_results(results: List[Dict[str, Any]], eval_metric: str) -> None:
    """The ten best epochs as JSON on standard output, behind the mark that timm's script sets."""
    best = sorted(
        results,
        key=lambda result: result.get('validation', result['train']).get(eval_metric, 0),
        reverse='loss' in eval_metric,
    )
    print(f'--result\n{json.dumps(best[-10:], indent=4)}')


def summary_row(task: TrainingTask, losses: Dict[str, float]) -> Dict[str, Any]:
    """Training columns of summary.csv: the same in every epoch, empty where a stage has no such loss."""
    if not isinstance(task, DearKDTask):
        return dict(losses)
    return dict(
        stage=task.weights.stage, alpha=task.weights.alpha, **{name: losses.get(name, '') for name in task.loss_names})


def open_datasets(args) -> Tuple[Any, Any]:
    """The training and the validation set; without a --val-split, there is no validation set."""
    common = dict(
        download=args.dataset_download,
        batch_size=args.batch_size,
        seed=args.seed,
        input_img_mode=args.input_img_mode or 'RGB',
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
        class_map=args.class_map,
    )
    root = args.data_dir or args.data
    train_set = open_dataset(
        args.dataset, root, args.train_split, is_training=True,
        repeats=args.epoch_repeats, num_samples=args.train_num_samples, **common)
    if args.train_fraction < 1.:
        train_set = ClassFraction(
            train_set, args.train_fraction, args.fraction_seed, keep_length=args.fraction_keep == 'steps')
        _logger.info(f'Training on {len(train_set.indices)} images, {100 * args.train_fraction:g} % of every class.')
    if not args.val_split:
        args.eval_metric = 'loss'
        return train_set, None
    eval_set = open_eval_dataset(
        train_set, args.dataset, root, args.val_split, is_training=False,
        num_samples=args.val_num_samples, **common)
    return train_set, eval_set


def create_student(args, train_set, device: torch.device) -> Tuple[nn.Module, Dict[str, Any]]:
    """The model to train, and timm's data configuration for it."""
    names = class_names(train_set)
    if args.num_classes is None and names:
        args.num_classes = len(names)
        _logger.info(f'--num-classes not given: {args.num_classes}, as the data set has.')
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else {}
    overlay.update(args.pretrained_cfg_overlay)
    overrides = dict(
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
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
        model = create_model(
            kwargs.pop('model_name'),
            pretrained=args.pretrained or bool(args.pretrained_path),
            checkpoint_path=args.initial_checkpoint,
            **kwargs,
        )
    except (AssertionError, FileNotFoundError, KeyError, RuntimeError, TypeError, ValueError) as e:
        reason = ' '.join(str(e).split())[:400]
        raise ValueError(f'Could not create --model {args.model}: {reason}') from e
    check_labels(train_set, model.num_classes)
    check_img_size(model)
    if args.head_init_scale is not None:
        with torch.no_grad():
            model.get_classifier().weight.mul_(args.head_init_scale)
            model.get_classifier().bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        nn.init.constant_(model.get_classifier().bias, args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    model.to(device=device, dtype=model_dtype(args))
    data_config = resolve_input_data_config(model, args=vars(args), verbose=True)
    num_params = sum(p.numel() for p in model.parameters())
    _logger.info(f'Model {safe_model_name(args.model)}: {num_params:,} parameters, {model.num_classes} classes')
    return model, data_config


def model_dtype(args) -> torch.dtype:
    return getattr(torch, args.model_dtype or 'float32')


def create_mixup(args, num_classes: int) -> Optional[Callable]:
    """timm's Mixup/CutMix, as the prefetcher's collate function or for whole batches; None when off."""
    if not (args.mixup > 0. or args.cutmix > 0. or args.cutmix_minmax):
        return None
    if args.aug_splits:
        raise ValueError('--aug-splits does not go with --mixup or --cutmix. Leave one of them out.')
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


def create_loaders(args, train_set, eval_set, data_config: Dict[str, Any], mixup, device: torch.device):
    """The training and the validation loader."""
    common = dict(
        device=device,
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        use_prefetcher=not args.no_prefetcher,
        img_dtype=model_dtype(args),
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
        interpolation=(not args.no_aug and args.train_interpolation) or data_config['interpolation'],
        use_multi_epochs_loader=args.use_multi_epochs_loader,
        worker_seeding=args.worker_seeding,
        persistent_workers=not args.mixup_off_epoch,  # their collate function would not hear of it
        **common,
    )
    if eval_set is None:
        return loader_train, None
    return loader_train, create_eval_loader(
        eval_set, data_config, args.validation_batch_size or args.batch_size, **common)


def create_schedule(args, num_epochs: int) -> TwoStageSchedule:
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


def create_task(
        args,
        model: nn.Module,
        data_config: Dict[str, Any],
        device: torch.device,
        soft_targets: bool,
) -> TrainingTask:
    """timm's classification or distillation task, or DearKD's."""
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
    if not args.kd_model_name:
        task: TrainingTask = ClassificationTask(model, **common)
    elif distill_type == 'dearkd':
        task = DearKDTask(
            model,
            args.kd_model_name,
            create_schedule(args, args.epochs),
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
    if args.channels_last:
        task.to(memory_format=torch.channels_last)
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


def create_scheduler(args, optimizer: torch.optim.Optimizer, num_batches: int, start_epoch: int):
    """timm's learning-rate schedule, brought to the epoch to start with, and the length of the run in epochs."""
    updates_per_epoch = -(-num_batches // args.grad_accum_steps)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    if lr_scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            lr_scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            lr_scheduler.step(start_epoch)
    return lr_scheduler, num_epochs


def resume(args, task: TrainingTask, optimizer: torch.optim.Optimizer, precision: Precision) -> int:
    """Continue from `--resume`. Returns the epoch to start with."""
    epoch = None
    if args.resume:
        try:
            epoch = resume_task_checkpoint(
                task, args.resume,
                optimizer=None if args.no_resume_opt else optimizer,
                loss_scaler=None if args.no_resume_opt else precision.scaler,
            )
            if task.has_ema():
                load_task_ema_checkpoint(task, args.resume)
        except Exception as e:  # torch's unpickler alone raises half a dozen kinds
            reason = ' '.join(str(e).split())[:300]
            raise ValueError(f'--resume {args.resume} does not fit this run: {reason}') from e
    return args.start_epoch if args.start_epoch is not None else epoch or 0


def create_output(args, args_text: str, model, data_config, task, optimizer, precision) -> AtomicCheckpointSaver:
    """The output folder with `args.yaml`, and the saver that writes into it."""
    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(data_config['input_size'][-1])])
    output_dir = get_outdir(args.output or DEFAULT_OUTPUT, name)
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
        run = prepare()
    except (OSError, ValueError) as e:
        parser.error(' '.join(str(e).split()))
    run()
