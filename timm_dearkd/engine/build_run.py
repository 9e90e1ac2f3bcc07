"""From options to what runs the epochs and what records them."""
import logging
import os
import platform
from datetime import datetime
from functools import partial
from typing import Any, Callable, Dict, Optional, cast

import timm
import torch
import torch.nn as nn
from timm.models import safe_model_name
from timm.task import TrainingTask

from distill_hooks import TwoStageSchedule

from .._version import __version__
from ..distances import LOG_NAME, DistanceLog
from .build_data import images_per_update, model_dtype
from .data import Classes
from .device import Precision, Ranks
from .loader import TrainLoader
from .loop import Stepper, Trainer, Validator
from .output import (
    AtomicCheckpointSaver,
    Position,
    remove_recovery,
    trim_table,
    write_run_info,
    write_text,
)
from .recorder import Recorder
from .run_folder import RunFolder, on_primary
from .tracking import Tracker

__all__ = [
    'build_recorder', 'build_trainer', 'build_validator', 'describe_run', 'log_changed_stages', 'output_parent',
    'warn_of_short_run']

_logger = logging.getLogger(__name__)


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
    return Trainer(
        task,
        loader,
        Stepper(task, optimizer, precision.scaler, args.clip_grad, args.clip_mode),
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


def warn_of_short_run(args, num_epochs: int, num_updates: int) -> None:
    """Say so where defaults that are meant for long runs would spoil this one."""
    if args.sched != 'none' and args.warmup_epochs >= num_epochs:
        _logger.warning(
            f'All of the {num_epochs} epochs are warm-up, from a learning rate of {args.warmup_lr:g}. Set fewer'
            ' --warmup-epochs.')
    left = args.model_ema_decay ** (num_epochs * num_updates)
    if args.model_ema and not args.model_ema_warmup and left > 0.05:
        _logger.warning(
            f'{100 * left:.0f} % of the average of weights will still be those that the run starts with. Set'
            ' --model-ema-warmup, or a lower --model-ema-decay.')


def log_changed_stages(args, stage1_epochs: int, resumed: Position, first_epoch: int) -> None:
    """Warn if a resumed run goes back from stage II to stage I, and log any other change of the stages.

    Args:
        args: The options.
        stage1_epochs: Epochs of stage I.
        resumed: Position of the checkpoint.
        first_epoch: First epoch that is trained now, counted from 0.
    """
    before = resumed.options or {}
    if not before.get('kd_model_name') or 'dearkd_stage1_epochs' not in before:
        return
    old_epochs = TwoStageSchedule(before['epochs'], before['dearkd_stage1_epochs']).stage1_epochs
    if old_epochs == stage1_epochs:
        return
    flag = 'epochs' if args.dearkd_stage1_epochs is None else 'dearkd-stage1-epochs'
    change = f'With --{flag} {getattr(args, flag.replace("-", "_"))}, stage I lasts {stage1_epochs} epochs'
    keep = f' To keep the stages, set --dearkd-stage1-epochs {old_epochs}.' if old_epochs <= args.epochs else ''
    last_epoch = resumed.epoch if resumed.update else resumed.epoch - 1
    if old_epochs <= last_epoch and first_epoch < stage1_epochs:
        _logger.warning(
            f'The run was in stage II at epoch {last_epoch}. {change} (was {old_epochs}), so epochs {first_epoch} to'
            f' {stage1_epochs - 1} are in stage I again.{keep}')
    else:
        _logger.info(f'{change} (was {old_epochs}).{keep}')


def output_parent(args) -> str:
    """Folder that the output folders are made in."""
    return args.output or os.path.join('.', 'output', 'train')


def build_recorder(
        args,
        args_text: str,
        run_folder: RunFolder,
        trainer: Trainer,
        model: nn.Module,
        data_config: Dict[str, Any],
        export: Callable[..., None],
        start: Position,
        run_info: Dict[str, Any],
        classes: Classes,
        distance_images: Optional[torch.Tensor] = None,
) -> Recorder:
    """The output folder with `args.yaml` and `run.json`, and what writes into it."""
    default_name = '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(data_config['input_size'][-1])])
    folder = on_primary(trainer.ranks, partial(run_folder.create, default_name, args.resume))
    saver, is_primary = None, trainer.ranks.is_primary
    if is_primary:
        write_text(folder, 'args.yaml', args_text)
        write_run_info(folder, position=start, **run_info)
        saver = _build_saver(args, folder, model, trainer, classes)
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


def _build_saver(
        args, folder: str, model: nn.Module, trainer: Trainer, classes: Classes) -> AtomicCheckpointSaver:
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
        classes=classes,
    )
    if args.resume and os.path.dirname(os.path.abspath(args.resume)) == os.path.abspath(folder):
        saver.load_state_dict_from_checkpoint(args.resume)
    else:
        remove_recovery(folder)  # of a run that has no other checkpoint
    return saver
