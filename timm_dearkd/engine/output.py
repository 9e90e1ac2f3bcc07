"""Files of a run: its checkpoints, how it goes on from one, and the exported student."""
import csv
import json
import logging
import os
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union, cast

import safetensors.torch
import torch
import torch.nn as nn
import torchvision
from timm.models import clean_state_dict, is_model, load_state_dict, save_for_hf
from timm.models._hub import save_config_for_hf
from timm.models._input import get_model_args
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, unwrap_model
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch.utils._pytree import tree_map_only

from distill_hooks.errors import first_line

from ..files import write_table, write_text
from .data import UNKNOWN_CLASSES, Classes
from .device import Precision
from .interrupt import TrainingError

__all__ = [
    'AtomicCheckpointSaver', 'Position', 'complete_export', 'export_model', 'find_checkpoint', 'read_classes',
    'read_run_info', 'record_results',
    'refuse_to_overwrite', 'remove_recovery', 'resume_run', 'save_config', 'save_folder', 'save_images', 'trim_table',
    'write_run_info',
]

_logger = logging.getLogger(__name__)

EXPORT_NAME = 'model_best.safetensors'


class _TaskWithRun:
    """A task whose checkpoints hold the run's state too."""

    def __init__(self, task: TrainingTask, run_state: Dict[str, Any], classes: Classes) -> None:
        self.task = task
        self.run_state = run_state
        self.classes = classes

    def get_checkpoint_state(self, ema: bool = False, **kwargs: Any) -> Dict[str, Any]:
        state = self.task.get_checkpoint_state(ema=ema, **kwargs)
        return state if ema else {**state, **self.run_state, 'classes': self.classes._asdict()}


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's `CheckpointSaver`, but with a whole file under every name at any moment, power cuts included.

    timm unlinks `last` and `model_best` before it writes them anew; here they are replaced by a rename.

    Args:
        *args: timm's.
        classes: Classes of the training set, for every checkpoint.
        **kwargs: timm's.

    Raises:
        TrainingError: A file that can't be written, in `save_checkpoint` and the like. Those there are stay.
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
            Path(save_path).unlink(missing_ok=True)
            raise TrainingError(
                f'Could not write a checkpoint to {self.checkpoint_dir}: {first_line(e)}. Those that are there'
                ' are whole. Make room, and go on with --resume FILE, or --resume auto.') from e

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

    def forget_ranks(self) -> None:
        """Rank what comes by itself, for its metric is another; checkpoints that are there count by recency."""
        self.best_metric = self.best_epoch = None
        newest_first = sorted((path for path, _ in self.checkpoint_files), key=self._epoch_of, reverse=True)
        self.checkpoint_files = [(path, None) for path in newest_first]

    def _epoch_of(self, path: str) -> int:
        """The N of a `checkpoint-N`; -1 where it is no number."""
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
    """Where a run goes on: the epoch, the updates of it that are done, and what they left behind."""
    epoch: int = 0
    update: int = 0
    meter: Optional[Dict[str, Any]] = None
    rng_states: Tuple[Dict[str, Any], ...] = ()
    scheduler: Optional[Dict[str, Any]] = None
    ema_rng_state: Optional[torch.Tensor] = None
    num_skipped: int = 0
    options: Optional[Dict[str, Any]] = None  # that the run had before


def _recovery_files(folder: str) -> List[Path]:
    return sorted(Path(folder).glob('recovery-*.pth.tar'))


def _checkpoints(folder: str) -> List[Path]:
    """All of a run, but for one that was not written to its end."""
    return [path for path in sorted(Path(folder).glob('*.pth.tar')) if not path.name.endswith('tmp.pth.tar')]


def remove_recovery(folder: str) -> None:
    """Remove the checkpoints within epochs."""
    for path in _recovery_files(folder):
        path.unlink()


def _place(checkpoint: Dict[str, Any]) -> Tuple[int, int]:
    """The epoch that goes on from a checkpoint, and how many updates of it are done."""
    within = checkpoint.get('progress')
    return checkpoint['epoch'] + (within is None), (within or {}).get('update', 0)


def _rank(path: str) -> Tuple[Optional[int], Optional[float]]:
    """Epoch and metric of a checkpoint."""
    try:
        checkpoint = load_checkpoint_metadata(path)
        return checkpoint['epoch'], checkpoint.get('metric')
    except Exception:  # see `find_checkpoint`
        return None, None


def find_checkpoint(folder: str) -> str:
    """The checkpoint of a run that is furthest on, whether of an epoch or within one; '' if there is none.

    Raises:
        ValueError: There are some, but none can be read.
    """
    tried: List[str] = []
    found: List[Tuple[Tuple[int, int], str]] = []
    names = ('last.', 'recovery-')
    for is_newest in (True, False):  # the others where those fail
        for path in _checkpoints(folder) if not found else ():
            if path.name.startswith(names) != is_newest:
                continue
            tried.append(path.name)
            try:
                found.append((_place(load_checkpoint_metadata(str(path))), str(path)))
            except Exception as e:  # torch's unpickler alone raises half a dozen kinds
                _logger.warning(f'{path} can not be read ({type(e).__name__}), and is left out.')
    if tried and not found:
        raise ValueError(
            f'No checkpoint in {folder!r} can be read: {", ".join(tried)}. Begin anew in another --experiment.')
    return max(found)[1] if found else ''


def read_classes(path: str) -> Classes:
    """Return the classes that a checkpoint was trained with; unknown ones where it has none, or for no path."""
    if not path:
        return UNKNOWN_CLASSES
    try:
        checkpoint = load_checkpoint_metadata(path)
    except Exception:  # `resume_run` tells why it cannot be read
        return UNKNOWN_CLASSES
    classes = checkpoint.get('classes') if isinstance(checkpoint, dict) else None
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
        if _checkpoints(folder):
            raise ValueError(
                f'{folder!r} holds a run. Resume it with --resume auto, name another --experiment, or remove the'
                ' folder.')
        return
    newest = find_checkpoint(folder)
    try:
        is_newest = _place(load_checkpoint_metadata(resume)) == _place(load_checkpoint_metadata(newest))
    except Exception:  # `resume_run` tells what is wrong with the file
        return
    if not is_newest:
        raise ValueError(
            f'--resume {resume} is not the newest checkpoint of its run, {os.path.basename(newest)} is. Resume it in'
            ' another --experiment, or set --resume auto.')


# What a run may go on with otherwise, with nothing to be said about it
_FREE_OPTIONS = {
    'resume', 'start_epoch', 'stop_epoch', 'save_epochs', 'output', 'experiment', 'workers', 'pin_mem', 'log_interval',
    'recovery_interval', 'checkpoint_hist', 'device', 'no_ddp_bb', 'report', 'torchcompile', 'torchcompile_mode',
    'save_images', 'log_tensorboard', 'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id',
    'validation_batch_size', 'no_resume_opt', 'local_rank'}


def changed_options(before: Dict[str, Any], now: Dict[str, Any]) -> str:
    """The options of two runs that differ, such as 'lr 0.1 → 0.2'; '' for none."""
    before, now = ({**options, 'data': options.get('data') or options.get('data_dir'), 'data_dir': None}
                   for options in (before, now))
    names = sorted(name for name in before.keys() & now.keys() - _FREE_OPTIONS if before[name] != now[name])
    return ', '.join(f'{name} {before[name]} → {now[name]}' for name in names)


def resume_run(
        path: str,
        task: TrainingTask,
        options: Dict[str, Any],
        optimizer: Optional[torch.optim.Optimizer],
        precision: Precision,
        images_per_update: int,
) -> Position:
    """Continue from a checkpoint.

    Args:
        path: The checkpoint, of a run or with weights alone.
        task: Takes the weights, and those of its EMA.
        options: Of this run; 'model' and 'opt' have to be those of the checkpoint's, a warning names what else differs.
        optimizer: Takes its state; None leaves that, and the loss scaler's.
        precision: Has the loss scaler.
        images_per_update: Of all processes; an epoch that is continued with others starts at the update that
            comes nearest without leaving out images.

    Raises:
        ValueError: A file that is broken, or of another model or task.
    """
    try:
        checkpoint = load_checkpoint_metadata(path)
    except Exception as e:  # torch's unpickler alone raises half a dozen kinds
        reason = first_line(e)[:200]
        raise ValueError(f'--resume {path} can not be read, it may be truncated: {reason}') from e
    run = checkpoint if isinstance(checkpoint, dict) else {}
    arch, opt = options['model'], options['opt']
    if run.get('arch', arch) != arch:
        raise ValueError(
            f'--resume {path} is a run of {run["arch"]}, this one is of {arch}.'
            f' Set --model {run["arch"]}, or start from weights with --initial-checkpoint.')
    trained_with = getattr(run.get('args'), 'opt', opt)
    if optimizer is not None and trained_with != opt:
        raise ValueError(
            f'--resume {path} is a run with --opt {trained_with}, this one has {opt}. Set it to that, or begin with a'
            ' fresh one by --no-resume-opt.')
    taught_by = getattr(run.get('args'), 'kd_model_name', None)
    if optimizer is not None and taught_by and not hasattr(task, 'teacher'):
        raise ValueError(
            f'--resume {path} is a run with a teacher, this one has none. Add --kd-model-name {taught_by}, or start'
            ' from its weights with --initial-checkpoint.')
    trained = run.get('args')
    changed = changed_options(vars(trained) if isinstance(trained, Namespace) else {}, options)
    if changed:
        stays = ' Those in opt_kwargs stay as they were.' if 'opt_kwargs' in changed else ''
        _logger.warning(f'The run goes on with other options: {changed}.{stays}')
    try:
        scaler = precision.scaler if optimizer is not None else None
        epoch = resume_task_checkpoint(task, path, optimizer=optimizer, loss_scaler=scaler)
        if task.has_ema():
            load_task_ema_checkpoint(task, path)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
        reason = ' '.join(str(e).split())[:300]
        raise ValueError(f'--resume {path} does not fit this run: {reason}') from e
    keys = ('rng_states', 'scheduler', 'ema_rng_state', 'progress')
    state = tree_map_only(torch.Tensor, torch.clone, {key: run.get(key) for key in keys})  # else it maps the file
    position = Position(
        epoch or 0,
        rng_states=tuple(state['rng_states'] or ()),
        scheduler=state['scheduler'],
        ema_rng_state=state['ema_rng_state'],
        num_skipped=run.get('num_skipped', 0),
        options=vars(trained) if isinstance(trained, Namespace) else None,
    )
    within = state['progress']
    if within is None:
        return position
    update = within['update'] * within['images_per_update'] // images_per_update
    return position._replace(epoch=run['epoch'], update=update, meter=within['meter'])


def read_run_info(folder: Union[str, Path]) -> Dict[str, Any]:
    """What `write_run_info` wrote; empty where there is nothing to be read."""
    path = Path(folder) / 'run.json'
    try:
        info = json.loads(path.read_text())
        if isinstance(info, dict):
            return info
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        pass
    _logger.warning(f'{path} can not be read, and is left out.')
    return {}


def write_run_info(folder: str, command: str, position: Position, **info: Any) -> None:
    """Write `run.json`: what a report says of a run that its options do not.

    Args:
        folder: Output folder of the run.
        command: What it was started with. If it goes on, this one is added to those before.
        position: Where it starts.
        **info: Anything that JSON holds.
    """
    goes_on = position.epoch or position.update
    before = read_run_info(folder) if goes_on else {}
    sessions = before.get('sessions', [])
    started = datetime.now().astimezone().isoformat(' ', 'seconds')
    sessions.append(dict(command=command, epoch=position.epoch, started=started))
    info.update(sessions=sessions, results=before.get('results', {}))
    write_text(folder, 'run.json', json.dumps(info, indent=1))


def record_results(folder: str, **results: float) -> None:
    """Add figures to the `results` of `run.json`."""
    info = read_run_info(folder)
    info['results'] = {**info.get('results', {}), **results}
    write_text(folder, 'run.json', json.dumps(info, indent=1))


def save_config(model: nn.Module, path: Path, label_names: Optional[Sequence[str]] = None, **kwargs: Any) -> None:
    """Write timm's `config.json`, such that 🤗 transformers' TimmWrapper reads it too.

    Args:
        model: A timm model.
        path: The file.
        label_names: Class names in the order of the classifier.
        **kwargs: Further arguments of timm's `save_config_for_hf`.
    """
    names = {'label_names': list(label_names)} if label_names else {}
    save_config_for_hf(model, str(path), model_config=names, **kwargs)
    config = json.loads(path.read_text())
    config.get('model_args', {}).pop('num_classes', None)  # it stands at the top, and TimmWrapper passes it from there
    path.write_text(json.dumps(config, indent=2))


def save_folder(model: nn.Module, folder: Path, **kwargs: Any) -> None:
    """Write a model as a folder for the Hub or `local-dir:`: `model.safetensors`, and what `save_config` writes."""
    save_for_hf(model, str(folder), safe_serialization=True)
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    save_config(model, folder / 'config.json', names, **kwargs)


def export_model(
        model: nn.Module,
        folder: str,
        state_dict: Optional[Dict[str, torch.Tensor]] = None,
        *,
        data_config: Dict[str, Any],
        label_names: Optional[List[str]] = None,
) -> None:
    """Write a model so that ``timm.create_model('local-dir:FOLDER', pretrained=True)`` loads it.

    The weights go to `model_best.safetensors`, the architecture, its arguments, the input and the class names to
    `config.json`. Of a model that timm cannot create by name, only the weights are written.

    Args:
        model: A timm model; wrappers are taken off.
        folder: Output folder of the run.
        state_dict: Other weights of the model, such as an EMA's.
        data_config: timm's preprocessing configuration that the model was trained with.
        label_names: Class names in the order of the classifier.
    """
    model = unwrap_model(model)
    weights = clean_state_dict(state_dict if state_dict is not None else model.state_dict())
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()
        if '.aux_bn.' not in name}  # --split-bn: of augmented copies, in training alone
    has_config = not why_no_config(model)
    if label_names and has_config:  # with --num-classes, the model may know more
        others = range(len(label_names), cast(Any, model).num_classes)
        label_names = [*label_names, *(f'(no folder, class {index})' for index in others)]
    weights_file, config_file = (Path(folder) / f'.{name}.tmp' for name in (EXPORT_NAME, 'config.json'))
    try:
        weights_file.write_bytes(safetensors.torch.save(tensors, metadata={'format': 'pt'}))
        if has_config:
            save_config(model, config_file, label_names, data_config=data_config)
            os.replace(config_file, Path(folder) / 'config.json')
        os.replace(weights_file, Path(folder) / EXPORT_NAME)  # last, because `complete_export` looks at it
    except OSError as e:
        weights_file.unlink(missing_ok=True)
        config_file.unlink(missing_ok=True)
        raise TrainingError(
            f'Could not write the student to {folder}: {e}. Its checkpoint is there. Make room, and run the same'
            ' command with --resume auto.') from e


def why_no_config(model: nn.Module) -> str:
    """Return why timm cannot create a model from a `config.json`; '' if it can."""
    model = unwrap_model(model)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if not is_model(str(cfg.get('architecture') or '')):
        return 'it has no name in timm (pretrained_cfg architecture)'
    for key, value in get_model_args(model).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            return f'its argument {key} is no JSON value'
    return ''


def complete_export(folder: str, export: Callable[[str, Dict[str, torch.Tensor]], Any], use_ema: bool) -> None:
    """Export the best checkpoint if the run ended between the two.

    Args:
        folder: Output folder of the run.
        export: Takes the folder and the state dict.
        use_ema: Take the average of weights.
    """
    best, exported = Path(folder) / 'model_best.pth.tar', Path(folder) / EXPORT_NAME
    if best.exists() and (not exported.exists() or exported.stat().st_mtime < best.stat().st_mtime):
        export(folder, load_state_dict(str(best), use_ema=use_ema))


def trim_table(path: str, start_epoch: int) -> None:
    """Drop the rows of a table by epoch, such as summary.csv, from an epoch on, and what a kill left by halves."""
    if not os.path.exists(path):
        return
    with open(path, newline='') as f:
        header, *rows = list(csv.reader(f)) or [[]]
    kept = [row for row in rows if len(row) == len(header) and row[0].isdecimal() and int(row[0]) < start_epoch]
    write_table(Path(path), [header, *kept] if kept else [])


def save_images(output_dir: str, update: int, images: torch.Tensor) -> None:
    """Write a batch (B, C, H, W) as one picture."""
    path = os.path.join(output_dir, f'train-batch-{update}.jpg')
    torchvision.utils.save_image(images, path, padding=0, normalize=True)
