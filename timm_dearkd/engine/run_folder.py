"""The output folder of a run: its lock, run.json, tables and the exported student."""
import contextlib
import csv
import json
import logging
import os
import shutil
import socket
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Union, cast

import safetensors.torch
import torch
import torch.nn as nn
import torchvision
from filelock import FileLock, Timeout
from timm.models import clean_state_dict, is_model, load_state_dict, save_for_hf
from timm.models._hub import save_config_for_hf
from timm.models._input import get_model_args
from timm.utils import unwrap_model

from ..files import write_table, write_text
from .checkpoints import EXPORT_NAME, Position, find_checkpoint, list_checkpoints, refuse_to_overwrite
from .image_folder import UNUSED_CLASS
from .process import TrainingError

_logger = logging.getLogger(__name__)

LOCK_NAME = '.lock'
WAIT_SECONDS = 10.  # data-loader processes can hold the lock for 5 s after their main process was killed


class RunFolder:
    """Output folder of a run, which one process at a time writes into.

    The lock belongs to the open file (flock), so the kernel drops it when the process ends, however it ends. The lock
    file stays. While the lock is held, the file names the process.

    Args:
        parent: Folder of the run folders.
        name: Name of the run folder; '' creates a new one, named in `create`.
    """

    def __init__(self, parent: str, name: str = '') -> None:
        self.parent = parent
        self.path = os.path.join(parent, name) if name else ''
        self.checkpoint = ''
        self._lock: Optional[FileLock] = None
        self._is_new = False

    def __enter__(self) -> 'RunFolder':
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.release()

    def find_start(self, resume: str) -> str:
        """Lock the folder if it exists. Return the checkpoint to resume from, which `checkpoint` keeps.

        Args:
            resume: A checkpoint, 'auto' for the newest one in the folder, or '' for a new run.

        Raises:
            ValueError: If another process writes into the folder, or if it holds a run that would be overwritten.
        """
        if self.path and os.path.isdir(self.path):
            self._acquire()
        if resume == 'auto':
            resume = find_checkpoint(self.path)
        elif self.path:
            refuse_to_overwrite(self.path, resume)
        self.checkpoint = resume
        return resume

    def create(self, default_name: str) -> str:
        """Create the folder if it does not exist, lock it, and return its path.

        Args:
            default_name: Name of the folder if none was given. If it is taken, '-2', '-3', ... is appended.

        Raises:
            ValueError: If the folder cannot be created, or see `find_start`: another process may have come first.
        """
        try:
            os.makedirs(os.path.dirname(self.path) or self.parent, exist_ok=True)
            if self.path:
                self._is_new = _make_folder(self.path)
            else:
                names = (f'{default_name}-{number}' if number > 1 else default_name for number in count(1))
                self.path = next(path for name in names if _make_folder(path := os.path.join(self.parent, name)))
                self._is_new = True
        except OSError as e:
            path = self.path or self.parent
            raise ValueError(f'Could not make the folder {path!r} ({e.strerror}). Set another --output.') from e
        if self._is_new or self._lock is None:
            self._acquire()
            refuse_to_overwrite(self.path, self.checkpoint)
        return self.path

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            if self._lock.is_locked:
                _write_owner(self._lock.lock_file, '')
            self._lock.release()
            self._lock = None

    def discard(self) -> None:
        """Unlock the folder, and remove it if this process created it."""
        is_own = self._is_new and self._lock is not None and self._lock.is_locked  # else another process may use it
        if is_own:
            shutil.rmtree(self.path, ignore_errors=True)
        lock_is_left = is_own and os.path.exists(os.path.join(self.path, LOCK_NAME))
        self.release()
        if lock_is_left:  # Windows does not remove an open file
            with contextlib.suppress(OSError):  # if another process has locked the folder by now
                Path(self.path, LOCK_NAME).unlink(missing_ok=True)
                os.rmdir(self.path)

    def _acquire(self) -> None:
        # a soft lock, filelock's substitute for flock, would outlive a process that was killed
        lock = FileLock(os.path.join(self.path, LOCK_NAME), fallback_to_soft=False)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                _logger.info(f'{self.path} is locked by {_owner(lock.lock_file)}. Waiting up to {WAIT_SECONDS:g} s.')
                lock.acquire(timeout=WAIT_SECONDS, poll_interval=0.1)
        except Timeout:
            raise ValueError(
                f'Folder {self.path!r} is in use: {_owner(lock.lock_file)} is writing into it. Wait for that process to'
                ' end, or name another --experiment.') from None
        except (NotImplementedError, OSError) as e:
            _logger.warning(
                f'{self.path} cannot be locked ({e}). Do not start a second run with the same --experiment.')
        else:
            _write_owner(lock.lock_file, f'PID {os.getpid()} on {socket.gethostname()}')
        self._lock = lock


def has_run(folder: Union[str, Path]) -> bool:
    """Return whether a folder has a run with a checkpoint or a student, or one that a process is training.

    Another run, which ended before its first checkpoint, may be replaced.
    """
    if not Path(folder, 'args.yaml').exists():
        return False
    if list_checkpoints(folder) or Path(folder, EXPORT_NAME).exists():
        return True
    try:
        with FileLock(Path(folder, LOCK_NAME), timeout=0, fallback_to_soft=False):
            return False
    except Timeout:
        return True
    except (NotImplementedError, OSError):  # it cannot be locked
        return False


def _make_folder(path: str) -> bool:
    """Create a folder; False if it exists."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
        return False
    return True


def _write_owner(lock_file: str, text: str) -> None:
    with contextlib.suppress(OSError):  # Windows refuses to write to a locked file; the text is for messages only
        Path(lock_file).write_text(text)


def _owner(lock_file: str) -> str:
    """Return the process that holds a lock, in words."""
    try:
        owner = Path(lock_file).read_text()
    except OSError:
        owner = ''
    return f'another process ({owner})' if owner else 'another process'


def read_run_info(folder: Union[str, Path]) -> Dict[str, Any]:
    """Return the contents of `run.json`; {} if it does not exist or cannot be read."""
    path = Path(folder) / 'run.json'
    try:
        info = json.loads(path.read_text())
        if isinstance(info, dict):
            return info
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        pass
    _logger.warning(f'{path} cannot be read. Ignored.')
    return {}


def write_run_info(folder: str, command: str, position: Position, **info: Any) -> None:
    """Write `run.json`: facts about a run that its options do not have.

    Args:
        folder: Output folder of the run.
        command: Command that started the run, or resumed it. A resumed run keeps the earlier commands.
        position: Where the run starts.
        **info: Facts, as JSON values.
    """
    is_resumed = position.epoch or position.update
    before = read_run_info(folder) if is_resumed else {}
    sessions = before.get('sessions', [])
    started = datetime.now().astimezone().isoformat(' ', 'seconds')
    sessions.append(dict(command=command, epoch=position.epoch, started=started))
    info.update(sessions=sessions, results=before.get('results', {}))
    write_text(Path(folder, 'run.json'), json.dumps(info, indent=1))


def record_results(folder: str, **results: Optional[float]) -> None:
    """Add numbers to the `results` of `run.json`."""
    info = read_run_info(folder)
    info['results'] = {**info.get('results', {}), **results}
    write_text(Path(folder, 'run.json'), json.dumps(info, indent=1))


def save_config(model: nn.Module, path: Path, label_names: Optional[Sequence[str]] = None, **kwargs: Any) -> None:
    """Write timm's `config.json` in a form that 🤗 transformers' TimmWrapper also reads.

    Args:
        model: A timm model.
        path: The file.
        label_names: Class names in the order of the classifier.
        **kwargs: Further arguments of timm's `save_config_for_hf`.
    """
    names = {'label_names': list(label_names)} if label_names else {}
    save_config_for_hf(model, str(path), model_config=names, **kwargs)
    config = json.loads(path.read_text())
    config.get('model_args', {}).pop('num_classes', None)  # TimmWrapper passes the one at the top
    path.write_text(json.dumps(config, indent=2))


def save_folder(model: nn.Module, folder: Path, **kwargs: Any) -> None:
    """Write a model as a folder for the Hub or `local-dir:`: `model.safetensors` and `config.json`."""
    save_for_hf(model, str(folder), safe_serialization=True)
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    save_config(model, folder / 'config.json', names, **kwargs)


def export_model(
        model: nn.Module,
        folder: str,
        state_dict: Dict[str, torch.Tensor],
        *,
        data_config: Dict[str, Any],
        label_names: Optional[List[str]] = None,
) -> None:
    """Write a model so that ``timm.create_model('local-dir:FOLDER', pretrained=True)`` loads it.

    The weights go to `model_best.safetensors`, the architecture, its arguments, the input and the class names to
    `config.json`. Of a model that timm cannot create by name, only the weights are written.

    Args:
        model: A timm model, or a wrapper of one.
        folder: Output folder of the run.
        state_dict: The weights: the model's, or their average.
        data_config: timm's preprocessing configuration that the model was trained with.
        label_names: Class names in the order of the classifier.
    """
    model = unwrap_model(model)
    weights = clean_state_dict(state_dict)
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()
        if '.aux_bn.' not in name}  # --split-bn has them for augmented copies, in training only
    has_config = not why_no_config(model)
    if label_names and has_config:  # with --num-classes, the model may know more
        others = range(len(label_names), cast(Any, model).num_classes)
        label_names = [*label_names, *(f'{UNUSED_CLASS}{index})' for index in others)]
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
            f'Could not write the student to {folder}: {e}. Its checkpoint is complete. Make room.',
            'Run the same command with --resume auto.') from e


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
            return f'its argument {key} is not a JSON value'
    return ''


def complete_export(folder: str, export: Callable[[str, Dict[str, torch.Tensor]], Any], use_ema: bool) -> None:
    """Export the best checkpoint if a run was killed before it could.

    Args:
        folder: Output folder of the run.
        export: Writes the student; called with the folder and the state dict.
        use_ema: Export the average of weights.
    """
    best, exported = Path(folder) / 'model_best.pth.tar', Path(folder) / EXPORT_NAME
    if best.exists() and (not exported.exists() or exported.stat().st_mtime < best.stat().st_mtime):
        export(folder, load_state_dict(str(best), use_ema=use_ema))


def trim_table(path: str, start_epoch: int) -> None:
    """Remove rows of a table by epoch, such as summary.csv: those from an epoch on, and incomplete ones."""
    if not os.path.exists(path):
        return
    with open(path, newline='') as f:
        header, *rows = list(csv.reader(f)) or [[]]
    kept = [row for row in rows if len(row) == len(header) and row[0].isdecimal() and int(row[0]) < start_epoch]
    write_table(Path(path), [header, *kept] if kept else [])


def save_images(output_dir: str, update: int, images: torch.Tensor) -> None:
    """Write a batch of images (B, C, H, W) as one picture."""
    path = os.path.join(output_dir, f'train-batch-{update}.jpg')
    torchvision.utils.save_image(images, path, padding=0, normalize=True)
