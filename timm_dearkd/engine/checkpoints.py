"""Checkpoints of a run: written whole, found again, and resumed."""
import logging
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
import yaml
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, random_seed
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch.utils._pytree import tree_map_only

from distill_hooks.errors import first_line, one_line

from .data import UNKNOWN_CLASSES, Classes
from .process import Precision, Ranks, TrainingError
from .seeding import set_rng_state

_logger = logging.getLogger(__name__)

EXPORT_NAME = 'model_best.safetensors'


class _TaskWithRun:
    """A task whose checkpoints also have the state of the run."""

    def __init__(self, task: TrainingTask, run_state: Dict[str, Any], classes: Classes) -> None:
        self.task = task
        self.run_state = run_state
        self.classes = classes

    def get_checkpoint_state(self, ema: bool = False, **kwargs: Any) -> Dict[str, Any]:
        state = self.task.get_checkpoint_state(ema=ema, **kwargs)
        return state if ema else {**state, **self.run_state, 'classes': self.classes._asdict()}


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's `CheckpointSaver` with a complete file under every name at any moment, also after a power cut.

    timm removes `last` and `model_best` before it writes them again. Here they are replaced by a rename.

    Args:
        *args: See `CheckpointSaver`.
        classes: Classes of the training set, for every checkpoint.
        **kwargs: See `CheckpointSaver`.

    Raises:
        TrainingError: If a method cannot write a file. The files written before stay.
    """

    def __init__(self, *args: Any, classes: Classes = UNKNOWN_CLASSES, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run_state: Dict[str, Any] = {}
        if self.task is not None:
            self.task = _TaskWithRun(self.task, self.run_state, classes)

    def _save(self, save_path, epoch, metric=None):
        try:
            super()._save(save_path, epoch, metric)
        except (OSError, RuntimeError) as e:  # PyTorch's writer raises the latter
            reason = 'the disk is full' if self._is_disk_full() else first_line(e)
            Path(save_path).unlink(missing_ok=True)
            raise TrainingError(
                f'Could not write a checkpoint to {self.checkpoint_dir}: {reason}. Those that are there are complete.'
                ' Make room.', 'Resume with --resume FILE, or --resume auto.') from e

    def _is_disk_full(self) -> bool:
        """Return whether there is no room for the weights, which are a part of a checkpoint."""
        num_bytes = sum(tensor.nbytes for tensor in self.model.state_dict().values())
        try:
            return shutil.disk_usage(self.checkpoint_dir).free < num_bytes
        except OSError:  # the folder is gone
            return False

    def _replace(self, src: str, dst: str) -> None:
        with open(src, 'r+b') as f:  # Windows syncs what can be written
            os.fsync(f.fileno())
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        link = f'{dst}.link'
        if os.path.exists(link):
            os.unlink(link)
        super()._duplicate(src, link)
        os.replace(link, dst)

    def restart_ranking(self) -> None:
        """Start a new ranking, because the metric has changed. The newest of the earlier checkpoints are kept."""
        self.best_metric = self.best_epoch = None
        newest_first = sorted((path for path, _ in self.checkpoint_files), key=self._epoch_of, reverse=True)
        self.checkpoint_files = [(path, None) for path in newest_first]

    def _epoch_of(self, path: str) -> int:
        """Return the N of `checkpoint-N`; -1 if it is not a number."""
        number = os.path.basename(path)[len(self.save_prefix) + 1:-len(self.extension)]
        return int(number) if number.isdecimal() else -1

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore the ranks. Replace a `model_best` that is not the best epoch, as after a kill between the two files.

        The exported student is removed with it, so that `complete_export` writes it again.
        """
        super().load_state_dict(state_dict)
        best = os.path.join(self.checkpoint_dir, 'model_best' + self.extension)
        rank = _rank(best)
        if rank == tuple(state_dict.get('pending', ())):  # of the epoch that is resumed
            self.best_epoch, self.best_metric = rank
        if not os.path.exists(best) or rank == (self.best_epoch, self.best_metric):
            return
        path, self.best_metric = self.checkpoint_files[0] if self.checkpoint_files else ('', None)
        self.best_epoch = None  # the next one that is evaluated, whatever it scores
        if self.best_metric is not None:
            self.best_epoch = self._epoch_of(path)
            for name in ('config.json', EXPORT_NAME):
                Path(self.checkpoint_dir, name).unlink(missing_ok=True)
            self._duplicate(path, best)

    def save_recovery(self, epoch: int, batch_idx: int = 0) -> None:
        super().save_recovery(epoch, batch_idx)
        kept = {self.curr_recovery_file, self.prev_recovery_file}
        for path in _recovery_files(self.recovery_dir):
            if str(path) not in kept:  # of the run before it was resumed
                path.unlink()


class Position(NamedTuple):
    """Position at which a run is resumed: epoch, finished updates of that epoch, and state of the run."""
    epoch: int = 0
    update: int = 0
    meter: Optional[Dict[str, Any]] = None
    rng_states: Tuple[Dict[str, Any], ...] = ()
    scheduler: Optional[Dict[str, Any]] = None
    ema_rng_state: Optional[torch.Tensor] = None
    num_skipped: int = 0
    num_labels: Tuple[int, int] = (0, 0)  # read and computed, see `LabelCache`
    options: Optional[Dict[str, Any]] = None  # of the run that is resumed


def _recovery_files(folder: str) -> List[Path]:
    return sorted(Path(folder).glob('recovery-*.pth.tar'))


def list_checkpoints(folder: Union[str, Path]) -> List[Path]:
    """Return the checkpoints of a run, without those that were not written completely."""
    return [path for path in sorted(Path(folder).glob('*.pth.tar')) if not path.name.endswith('tmp.pth.tar')]


def remove_recovery(folder: str) -> None:
    """Remove the checkpoints within epochs."""
    for path in _recovery_files(folder):
        path.unlink()


def _place(checkpoint: Dict[str, Any]) -> Tuple[int, int]:
    """Return the epoch that follows a checkpoint, and how many of its updates are done."""
    within = checkpoint.get('progress')
    return checkpoint['epoch'] + (within is None), (within or {}).get('update', 0)


def _read_metadata(path: str) -> Optional[Dict[str, Any]]:
    """Return what a checkpoint holds; None if it cannot be read, {} if it holds no dictionary."""
    try:
        checkpoint = load_checkpoint_metadata(path)
    except Exception:  # torch's unpickler alone raises half a dozen kinds
        return None
    return checkpoint if isinstance(checkpoint, dict) else {}


def _rank(path: str) -> Tuple[Optional[int], Optional[float]]:
    """Return epoch and metric of a checkpoint; None for both if it cannot be read."""
    checkpoint = _read_metadata(path) or {}
    return checkpoint.get('epoch'), checkpoint.get('metric')


def find_checkpoint(folder: str) -> str:
    """Return the newest checkpoint of a run, of an epoch or within one; '' if there is none.

    Raises:
        ValueError: If none of the checkpoints can be read.
    """
    tried: List[str] = []
    found: List[Tuple[Tuple[int, int], str]] = []
    names = ('last.', 'recovery-')
    for is_newest in (True, False):  # other checkpoints only if these fail
        for path in list_checkpoints(folder) if not found else ():
            if path.name.startswith(names) != is_newest:
                continue
            tried.append(path.name)
            try:
                found.append((_place(load_checkpoint_metadata(str(path))), str(path)))
            except Exception as e:  # see `_read_metadata`
                _logger.warning(f'{path} cannot be read ({type(e).__name__}). Skipped.')
    if tried and not found:
        raise ValueError(
            f'No checkpoint in {folder!r} can be read: {", ".join(tried)}. Start another --experiment.')
    return max(found)[1] if found else ''


def read_classes(path: str) -> Classes:
    """Return the classes that a checkpoint was trained with; `UNKNOWN_CLASSES` if it has none, or for no path."""
    checkpoint = _read_metadata(path) if path else None
    classes = (checkpoint or {}).get('classes')
    if not isinstance(classes, dict) or set(classes) != set(Classes._fields):  # other scripts have such a key, too
        return UNKNOWN_CLASSES
    return Classes(**classes)


def refuse_to_overwrite(folder: str, resume: str) -> None:
    """Refuse to start a run in a folder that holds another one, or a later state of the same one.

    Args:
        folder: Output folder of the run.
        resume: The checkpoint that the run is resumed from; '' for none.

    Raises:
        ValueError: If the folder has checkpoints, and `resume` is not the newest of them.
    """
    if not resume or os.path.dirname(os.path.abspath(resume)) != os.path.abspath(folder):
        if list_checkpoints(folder):
            raise ValueError(
                f'{folder!r} holds a run. Resume it with --resume auto, name another --experiment, or remove the'
                ' folder.')
        return
    checkpoint = _read_metadata(resume)
    if checkpoint is None:  # `resume_run` reports what is wrong with the file
        return
    newest = find_checkpoint(folder)
    has_place = 'epoch' in checkpoint  # weights alone have none
    if newest and not (has_place and _place(checkpoint) == _place(load_checkpoint_metadata(newest))):
        raise ValueError(
            f'--resume {resume} is not the newest checkpoint of its run, {os.path.basename(newest)} is. Resume it in'
            ' another --experiment, or set --resume auto.')


# Options that may differ in a resumed run without a warning
_FREE_OPTIONS = {
    'resume', 'start_epoch', 'stop_epoch', 'save_epochs', 'output', 'experiment', 'workers', 'pin_mem', 'log_interval',
    'recovery_interval', 'checkpoint_hist', 'device', 'no_ddp_bb', 'report', 'torchcompile', 'torchcompile_mode',
    'save_images', 'log_tensorboard', 'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id',
    'validation_batch_size', 'no_resume_opt', 'local_rank', 'kd_label_cache'}


def changed_options(before: Dict[str, Any], now: Dict[str, Any]) -> str:
    """Return the options of two runs that differ, such as 'lr 0.1 → 0.2'; '' for none."""
    before, now = ({**options, 'data': options.get('data') or options.get('data_dir'), 'data_dir': None}
                   for options in (before, now))
    names = sorted(
        name for name in before.keys() & now.keys() - _FREE_OPTIONS
        if yaml.safe_dump(before[name]) != yaml.safe_dump(now[name]))  # a tuple is a list in args.yaml
    return ', '.join(f'{name} {before[name]} → {now[name]}' for name in names)


def resume_run(
        path: str,
        task: TrainingTask,
        options: Dict[str, Any],
        optimizer: Optional[torch.optim.Optimizer],
        precision: Precision,
        images_per_update: int,
) -> Position:
    """Resume a run from a checkpoint.

    Args:
        path: The checkpoint, of a run or with weights alone.
        task: The task, whose weights and EMA are loaded.
        options: Options of this run. 'model' and 'opt' must be those of the checkpoint. A warning names other changes.
        optimizer: The optimizer, whose state is loaded; None does not load it, nor that of the loss scaler.
        precision: Has the loss scaler.
        images_per_update: Images of all processes per update. If the checkpoint is within an epoch of another number,
            the epoch is resumed at the last update that skips no image.

    Raises:
        ValueError: If the file is broken, or is of another model or task.
    """
    try:
        checkpoint = load_checkpoint_metadata(path)
    except Exception as e:  # torch's unpickler alone raises half a dozen kinds
        reason = first_line(e)[:200]
        raise ValueError(f'--resume {path} cannot be read. It may be truncated: {reason}') from e
    run = checkpoint if isinstance(checkpoint, dict) else {}
    trained: Optional[Namespace] = run['args'] if isinstance(run.get('args'), Namespace) else None
    before = dict(vars(trained)) if trained is not None else None
    _check_resumable(path, run.get('arch'), trained, task, options, has_optimizer=optimizer is not None)
    changed = changed_options(before or {}, options)
    if changed:
        stays = ' Those in opt_kwargs keep their old values.' if 'opt_kwargs' in changed else ''
        _logger.warning(f'The run is resumed with other options: {changed}.{stays}')
    try:
        scaler = precision.scaler if optimizer is not None else None
        epoch = resume_task_checkpoint(task, path, optimizer=optimizer, loss_scaler=scaler)
        if task.has_ema():
            load_task_ema_checkpoint(task, path)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f'--resume {path} does not fit this run: {one_line(e)}') from e
    keys = ('rng_states', 'scheduler', 'ema_rng_state', 'progress')
    state = tree_map_only(torch.Tensor, torch.clone, {key: run.get(key) for key in keys})  # not maps of the file
    position = Position(
        epoch or 0,
        rng_states=tuple(state['rng_states'] or ()),
        scheduler=state['scheduler'],
        ema_rng_state=state['ema_rng_state'],
        num_skipped=run.get('num_skipped', 0),
        num_labels=tuple(run.get('num_labels', (0, 0))),
        options=before,
    )
    within = state['progress']
    if within is None:
        return position
    update = within['update'] * within['images_per_update'] // images_per_update
    return position._replace(epoch=run['epoch'], update=update, meter=within['meter'])


def _check_resumable(
        path: str,
        arch: Optional[str],
        trained: Optional[Namespace],
        task: TrainingTask,
        options: Dict[str, Any],
        has_optimizer: bool,
) -> None:
    """Refuse a checkpoint of model `arch` and options `trained` that does not fit the task and options of this run."""
    if arch not in (None, options['model']):
        raise ValueError(
            f'--resume {path} is a run of {arch}, this one is of {options["model"]}.'
            f' Set --model {arch}, or start from weights with --initial-checkpoint.')
    opt, teacher = getattr(trained, 'opt', options['opt']), getattr(trained, 'kd_model_name', None)
    if has_optimizer and opt != options['opt']:
        raise ValueError(
            f'--resume {path} is a run with --opt {opt}, this one has {options["opt"]}. Set that one, or start with a'
            ' new optimizer by --no-resume-opt.')
    if has_optimizer and teacher and not hasattr(task, 'teacher'):
        raise ValueError(
            f'--resume {path} is a run with a teacher, this one has none. Add --kd-model-name {teacher}, or start'
            ' from its weights with --initial-checkpoint.')


def restore_generators(start: Position, seed: int, task: Any, device: torch.device, ranks: Ranks) -> None:
    """Restore the random generators of a resumed run, or seed those of a new one."""
    if len(start.rng_states) == ranks.world_size:
        set_rng_state(start.rng_states[ranks.rank], device)
    else:
        random_seed(seed, ranks.rank)
    if start.ema_rng_state is not None and task.has_ema():
        task.trainable_module_ema._sr_generator.set_state(start.ema_rng_state)
