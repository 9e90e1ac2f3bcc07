"""Output of a run: checkpoints, summary.csv, the exported student, and values for the trackers."""
import csv
import json
import logging
import math
import os
import platform
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, cast

import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from timm.models import safe_model_name
from timm.task import ClassificationEvaluator

from distill_hooks import DearKDTask

from .._version import __version__
from ..distances import LOG_NAME, DistanceLog
from ..files import append_row, write_text
from .checkpoints import EXPORT_NAME, AtomicCheckpointSaver, Position, remove_recovery
from .data import Classes, have_same_folder
from .distillation import count_outputs, uses_ema
from .loop import Trainer, mean_lr
from .process import Interrupted, Precision, Ranks, StopRequest, images_per_update, model_dtype, on_primary
from .run_folder import RunFolder, save_images, trim_table, write_run_info
from .seeding import get_rng_state
from .tracking import Tracker, mhca_stats, scalars

_logger = logging.getLogger(__name__)

MAX_LOSS_AFTER_STAGE1 = 0.9  # of the loss of guessing, or of the first epoch; our choice


class Recorder:
    """Recorder of a run. All processes call it, the primary one writes.

    Args:
        trainer: Trainer of the run.
        folder: Output folder of the run.
        saver: Writes the checkpoints; None in processes other than the primary one.
        tracker: TensorBoard or Weights & Biases.
        export: Writes the best student; called with the folder and the state dict.
        images_per_update: Images of all processes per update.
        recovery_interval: Updates between checkpoints within an epoch; 0 writes none.
        export_ema: Whether the best student is the average of weights.
        saves_images: Whether to write the images of the log lines.
        distance_log: Records how far the heads look.
    """

    def __init__(
            self,
            trainer: Trainer,
            folder: str,
            saver: Optional[AtomicCheckpointSaver],
            tracker: Tracker,
            export: Callable[[str, Dict[str, torch.Tensor]], Any],
            images_per_update: int,
            recovery_interval: int = 0,
            export_ema: bool = False,
            saves_images: bool = False,
            distance_log: Optional[DistanceLog] = None,
    ) -> None:
        self.trainer = trainer
        self.folder = folder
        self.saver = saver
        self.tracker = tracker
        self.export = export
        self.images_per_update = images_per_update
        self.recovery_interval = recovery_interval
        self.export_ema = export_ema
        self.saves_images = saves_images
        self.distance_log = distance_log
        self.results: List[Dict[str, Any]] = []
        self.teacher_top1: Optional[float] = None  # in percent, set by `fit`

    def on_log(self, epoch: int, update: int, losses, rates, images: torch.Tensor) -> None:
        """Record the numbers of a log line."""
        if self.saves_images:
            save_images(self.folder, update, images)
        if not self.tracker.enabled:
            return
        task: Any = self.trainer.task
        weights = getattr(task, 'weights', None)  # DearKD's, for the epoch
        values = {
            **{f'train/{name}': value for name, value in losses.items()},
            **({'stage': weights.stage, 'alpha': weights.alpha} if weights is not None else {}),
            'epoch': epoch,
            'lr': mean_lr(self.trainer.step.optimizer),
            **{f'speed/{name}': value for name, value in rates.items()},
            **{f'mhca/{name}': value for name, value in scalars(mhca_stats(task.get_eval_model())).items()},
        }
        self.tracker.log(values, epoch * self.trainer.num_updates + update)

    def on_update(self, stop: StopRequest, epoch: int, update: int, last: bool) -> None:
        """Write the checkpoint that is due after an update.

        Raises:
            Interrupted: If a signal has come. A checkpoint of this update is written.
        """
        stopping = bool(stop)
        if stopping or (self.recovery_interval and (last or update % self.recovery_interval == 0)):
            self.trainer.check_finite(epoch)
            self._save_recovery(epoch, update)
        if stopping:
            raise self._interruption(stop)

    def on_eval_batch(self, stop: StopRequest) -> None:
        """Stop the evaluation after an epoch if a signal has come. A resumed run evaluates again.

        Raises:
            Interrupted: See `on_update`.
        """
        if stop:
            self._save_recovery(self.trainer.epoch, self.trainer.num_updates)
            raise self._interruption(stop)

    def _interruption(self, stop: StopRequest) -> Interrupted:
        remedy = f'Resume with --resume {self.saver.curr_recovery_file}, or --resume auto.' if self.saver else ''
        return Interrupted(stop.signum, remedy)

    def _save_recovery(self, epoch: int, update: int) -> None:
        if self.trainer.labels is not None:  # a run that resumes here does not see the images again
            self.trainer.labels.save()
        self._collect_state(progress=dict(
            update=update,
            images_per_update=self.images_per_update,
            meter=self.trainer.meter.state_dict(),
        ))
        if self.saver is not None:
            self.saver.save_recovery(epoch, batch_idx=update)

    def on_epoch(
            self,
            epoch: int,
            losses: Dict[str, float],
            metrics: Dict[str, float],
            metric: Optional[float],
            lr: float,
            milestone: bool = False,
    ) -> None:
        """Write the results and the checkpoint of an epoch.

        Args:
            epoch: The epoch, counted from 0.
            losses: Mean training losses.
            metrics: Metrics of the validation set; empty if it was not evaluated.
            metric: Value that ranks the checkpoints; None ranks them by recency.
            lr: Learning rate of the epoch.
            milestone: Whether to keep the checkpoint for good.
        """
        self._check_learning(epoch, losses)
        row = summary_row(self.trainer.task, losses)
        self.results.append({'epoch': epoch, 'train': row, **({'validation': metrics} if metrics else {})})
        self._collect_state()
        if self.saver is None:
            return
        teacher = {} if self.teacher_top1 is None else {'teacher_top1': self.teacher_top1}
        empty: Dict[str, Any] = dict.fromkeys(ClassificationEvaluator.metric_names, '')
        evaluated = {**empty, **metrics, **teacher}
        append_row(Path(self.folder, 'summary.csv'), {  # timm's columns
            'epoch': epoch, **{f'train_{name}': value for name, value in row.items()},
            **{f'eval_{name}': value for name, value in evaluated.items()}, 'lr': lr})
        if self.distance_log is not None:
            self.distance_log.record(epoch)
        self.tracker.log({f'eval/{k}': v for k, v in metrics.items()}, (epoch + 1) * self.trainer.num_updates)
        if metric is not None and not math.isfinite(metric):  # would be neither better nor worse than any other
            _logger.warning(f'The metric of the checkpoints is {metric} in epoch {epoch}. The epoch gets no rank.')
            metric = None
        _, best_epoch = self.saver.save_checkpoint(epoch, metric=metric)
        if milestone:
            self.saver.save_milestone(epoch + 1)
        remove_recovery(self.folder)  # `last` is further on
        if best_epoch == epoch:
            state = self.trainer.task.get_checkpoint_state(ema=self.export_ema)
            self.export(self.folder, state['state_dict_ema' if self.export_ema else 'state_dict'])

    def log_results(self, eval_metric: str) -> None:
        """Log the best epoch and where its student is, and print the best epochs."""
        self.compare_with_teacher()
        if self.saver is not None and self.saver.best_metric is not None:
            _logger.info(f'*** Best metric: {self.saver.best_metric:.4g} (epoch {self.saver.best_epoch})')
            if os.path.exists(os.path.join(self.folder, 'config.json')):
                _logger.info(f"*** Load it with timm.create_model('local-dir:{self.folder}', pretrained=True)")
            else:
                _logger.info(f'*** Its weights: {os.path.join(self.folder, EXPORT_NAME)}')
        print_results(self.results, eval_metric)

    def compare_with_teacher(self) -> None:
        """Log the top-1 of the best epoch beside the teacher's."""
        if self.saver is None or self.saver.best_epoch is None or self.teacher_top1 is None:
            return
        with open(os.path.join(self.folder, 'summary.csv'), newline='') as f:
            rows = {int(row['epoch']): row for row in csv.DictReader(f)}
        top1 = rows.get(self.saver.best_epoch, {}).get('eval_top1')
        if top1:
            _logger.info(f'*** Top-1: teacher {self.teacher_top1:.2f} %, student {float(top1):.2f} %')

    def _check_learning(self, epoch: int, losses: Dict[str, float]) -> None:
        """Warn at the end of stage I if the student hardly knows more than by guessing."""
        task = self.trainer.task
        if not isinstance(task, DearKDTask) or epoch + 1 != task.schedule.stage1_epochs:
            return
        if task.labels == 'teacher' and task.soft_temperature is not None:  # the loss depends on the teacher
            name, reference = 'of the first epoch', self._first_label_loss()
        else:
            name, reference = 'of guessing', math.log(count_outputs(task))
        if losses.get('ce_loss', 0.) > MAX_LOSS_AFTER_STAGE1 * reference and self.trainer.ranks.is_primary:
            _logger.warning(
                f'After stage I the label loss is {losses["ce_loss"]:.3g}, and that {name} is {reference:.3g}. The'
                ' student has hardly learned. Try another --lr, or more --epochs.')

    def _first_label_loss(self) -> float:
        """Return the label loss of the first epoch; infinity before it has a row."""
        path = Path(self.folder, 'summary.csv')
        if not path.exists():
            return math.inf
        with open(path, newline='') as f:
            return float(next(csv.DictReader(f), {}).get('train_ce_loss') or math.inf)

    def _collect_state(self, **state: Any) -> None:
        """Collect the state of the run for the next checkpoint, apart from the task and the optimizer."""
        device, ranks = self.trainer.precision.device, self.trainer.ranks
        rng_states: List[Any] = [get_rng_state(device)] * ranks.world_size
        if ranks.distributed:
            dist.all_gather_object(rng_states, rng_states[0])
        if self.saver is not None:
            plateau = getattr(self.trainer.lr_scheduler, 'lr_scheduler', None)  # the one schedule with a state
            ema = getattr(self.trainer.task, 'trainable_module_ema', None)
            labels = self.trainer.labels
            self.saver.run_state.clear()
            self.saver.run_state.update(
                rng_states=rng_states,
                ema_rng_state=ema._sr_generator.get_state() if ema is not None else None,  # rounds bfloat16
                scheduler=plateau.state_dict() if plateau is not None else None,
                num_skipped=self.trainer.num_skipped,
                num_labels=(labels.num_read, labels.num_computed) if labels is not None else (0, 0),
                **state,
            )


def summary_row(task, losses: Dict[str, float]) -> Dict[str, Any]:
    """Return the training columns of summary.csv, the same in every epoch; empty if a stage has no such loss."""
    if not hasattr(task, 'log_names'):
        return dict(losses)
    return dict(
        stage=task.weights.stage, alpha=task.weights.alpha, **{name: losses.get(name, '') for name in task.log_names})


def print_results(results: List[Dict[str, Any]], eval_metric: str) -> None:
    """Print the ten best epochs as JSON, after the marker of timm's script."""
    kind = 'validation' if any('validation' in result for result in results) else 'train'
    if kind == 'train':  # losses of other weights are no better or worse
        last = results[-1][kind] if results else {}
        results = [r for r in results if all(r[kind].get(key) == last.get(key) for key in ('stage', 'alpha'))]

    def rank(result: Dict[str, Any]) -> float:
        value = result[kind].get(eval_metric, 0)
        if not math.isfinite(value):
            return -math.inf
        return -value if 'loss' in eval_metric else value

    best = sorted((result for result in results if kind in result), key=rank)
    print(f'--result\n{json.dumps(best[-10:], indent=4)}')


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
    """Create the output folder with `args.yaml` and `run.json`, and return the recorder of the run."""
    default_name = '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(data_config['input_size'][-1])])
    folder = on_primary(trainer.ranks, partial(run_folder.create, default_name))
    saver, is_primary = None, trainer.ranks.is_primary
    if is_primary:
        write_text(Path(folder, 'args.yaml'), args_text)
        write_run_info(folder, position=start, **run_info)
        saver = _build_saver(args, run_folder, model, trainer, classes)
        for table in ('summary.csv', LOG_NAME):
            trim_table(os.path.join(folder, table), start.epoch)
    wandb = dict(
        project=args.wandb_project,
        name=args.experiment or None,
        config=dict(vars(args)),
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
        export_ema=uses_ema(args, trainer.task),
        saves_images=args.save_images,
        distance_log=DistanceLog(
            folder, cast(nn.Module, trainer.task.get_eval_model()), distance_images, trainer.precision.autocast,
        ) if distance_images is not None and is_primary else None,
    )


def describe_run(args, train_set, eval_set, model: nn.Module, precision: Precision, ranks: Ranks) -> Dict[str, Any]:
    """Return facts on the data and the environment, for `run.json`."""
    def count(dataset) -> Optional[int]:
        try:
            return len(dataset)
        except TypeError:  # a stream, or no data set
            return None

    device = precision.device
    data = dict(train_images=count(train_set), validation_images=count(eval_set), classes=model.num_classes)
    if have_same_folder(args, train_set, eval_set):
        data.update(validation_is_training=True)
    environment = dict(
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else
        f'{device} ({platform.machine()}, {torch.get_num_threads()} threads)',
        processes=ranks.world_size,
        precision=str(precision.amp_dtype or model_dtype(args)).replace('torch.', ''),
        **{'timm-dearkd': __version__}, timm=timm.__version__, torch=torch.__version__,
        python=platform.python_version(), system=platform.platform())
    return dict(data={key: value for key, value in data.items() if value is not None}, environment=environment)


def _build_saver(
        args, run_folder: RunFolder, model: nn.Module, trainer: Trainer, classes: Classes) -> AtomicCheckpointSaver:
    folder, checkpoint = run_folder.path, run_folder.checkpoint
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
    if checkpoint and os.path.dirname(os.path.abspath(checkpoint)) == os.path.abspath(folder):
        saver.load_state_dict_from_checkpoint(checkpoint)
    return saver


def log_expected_end(
        epoch: int, epochs: range, evaluated: Sequence[int], seconds: float, eval_seconds: float) -> None:
    """Log when the run will be over, from the time of one epoch.

    Args:
        epoch: The epoch.
        epochs: Epochs of the run.
        evaluated: Those that are evaluated.
        seconds: Time of the epoch, evaluation included.
        eval_seconds: Time of its evaluation; about 0 if it has none.
    """
    epochs_left, evals_left = epochs.stop - epoch - 1, sum(other > epoch for other in evaluated)
    if not epochs_left:
        return
    left = timedelta(seconds=round((seconds - eval_seconds) * epochs_left + eval_seconds * evals_left))
    end = (datetime.now() + left).strftime('%Y-%m-%d %H:%M')
    untimed = f', plus {evals_left} evaluations' if evals_left and epoch not in evaluated else ''
    _logger.info(
        f'Epoch {epoch} took {timedelta(seconds=round(seconds))}. Expected end: about {end}, in {left}{untimed}.')
