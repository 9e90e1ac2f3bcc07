"""The teacher's labels of the augmented images, kept in a folder for other runs (`--kd-label-cache`).

The images of a batch depend only on the seed, the epoch and the place of the batch (see `seeding`), and not on the
workers. So a run with another student, learning rate or schedule sees the same images, and the labels are the same.
"""
import hashlib
import io
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset

from distill_hooks import DearKDTask

from ..files import create_file, write_bytes
from .data import describe_files
from .distillation import count_outputs
from .loader import train_interpolation
from .loop import Trainer
from .process import SINGLE, Ranks, TrainingError, on_primary

_logger = logging.getLogger(__name__)

MANIFEST = 'labels.json'
MISSING = 65535  # in a file; so there are at most 65535 classes
# Our choices. In bfloat16, EfficientNet-Lite0 gave 9 % of 192 augmented and mixed photographs another label, but only
# 0.5 % by more than this share of the logits' spread. Two pixels of shift changed 22 % by more.
CHECK_INTERVAL, MAX_WRONG, MARGIN = 200, 0.01, 0.1

# Options that decide which images are in a batch, or how they look to the teacher
IMAGE_OPTIONS = (
    'dataset', 'input_key', 'input_img_mode', 'train_fraction', 'fraction_seed', 'fraction_keep', 'no_prefetcher',
    'train_img_sizes', 'train_batch_sizes', 'train_size_probs', 'train_size_schedule', 'train_size_schedule_spread',
    'train_size_random_mix', 'train_batches_per_epoch', 'batch_size', 'seed', 'no_aug', 'train_crop_mode', 'scale',
    'ratio', 'hflip', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'aa',
    'affine_aug', 'aug_repeats', 'aug_splits', 'reprob', 'remode', 'recount', 'resplit', 'mixup', 'cutmix',
    'cutmix_minmax', 'mixup_prob', 'mixup_switch_prob', 'mixup_mode', 'mixup_off_epoch', 'kd_teacher_img_size')


class LabelCache:
    """A `LabelStore` whose labels are in the files of a folder, one per epoch and process.

    Labels that are missing are computed and written. In stage I, one known batch in `CHECK_INTERVAL` is computed as
    well, and compared. Nothing waits for the device between two calls of `save`.

    Args:
        folder: The folder. See `open_label_folder`.
        task: The task. It must be given the cache as its `label_store`.
        num_batches: Batches per epoch and process.
        max_images: Largest number of images of a batch.
        device: Device of the task.
        ranks: The processes of the run.
    """

    def __init__(
            self,
            folder: str,
            task: DearKDTask,
            num_batches: int,
            max_images: int,
            device: torch.device,
            ranks: Ranks = SINGLE,
    ) -> None:
        self.folder = Path(folder)
        self.task = task
        self.shape = num_batches, max_images
        self.num_classes = count_outputs(task)
        self.device = device
        self.ranks = ranks
        self.num_read = self.num_computed = 0  # images of all processes, as this one counts
        self._checked = torch.zeros(2, dtype=torch.long, device=device)  # wrong labels, and all that were compared
        self._is_new, self._can_write = False, True

    def path(self, epoch: int) -> Path:
        """Return the file of an epoch for this process."""
        return self.folder / f'epoch{epoch:04}-rank{self.ranks.rank}.npy'

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Read the labels of an epoch, counted from 0, which continues at a batch."""
        self.epoch, self.batch = epoch, first_batch
        labels = self._read()
        self._num_known = (labels != MISSING).sum(axis=1)  # per batch, on the host
        table = torch.from_numpy(labels.astype(np.int32))
        if self.device.type == 'cuda':
            table = table.pin_memory()
        self._table = table.to(self.device, non_blocking=True)
        self._is_new = False

    def _read(self) -> np.ndarray:
        """Return the labels in the file of the epoch, (batches, images), with `MISSING` for others."""
        path = self.path(self.epoch)
        missing = np.full(self.shape, MISSING, np.uint16)
        if not path.exists():
            return missing
        try:
            labels = np.load(path)
        except Exception:  # NumPy raises half a dozen kinds for damaged files
            labels = None
        is_valid = isinstance(labels, np.ndarray) and labels.dtype == np.uint16 and labels.shape == self.shape and bool(
            ((labels < self.num_classes) | (labels == MISSING)).all())
        if not is_valid:
            _logger.warning(f'{path} has no labels of this run. The teacher computes them again.')
        return labels if is_valid else missing

    def take(self, batch_size: int) -> Optional[torch.Tensor]:
        """Return the labels (B,) of the next batch on the device; None if the teacher has to answer."""
        self._row, self._is_check = self.batch, False
        self.batch += 1
        if self._num_known[self._row] != batch_size:
            return None
        if self.task.weights.stage == 1:
            self._is_check = (self.epoch * self.shape[0] + self._row) % CHECK_INTERVAL == 0
        if self._is_check:
            return None
        self.num_read += batch_size * self.ranks.world_size
        return self._table[self._row, :batch_size].long()

    def put(self, logits: torch.Tensor) -> None:
        """Keep the teacher's answers (B, classes) for the batch of the last `take`, or compare them."""
        row = self._table[self._row, :len(logits)]
        self.num_computed += len(logits) * self.ranks.world_size
        if self._is_check:
            logits = logits.float()
            best = logits.amax(dim=1)
            margin = best - logits.gather(1, row.long().unsqueeze(1)).squeeze(1)
            self._checked[0] += (~(margin <= MARGIN * (best - logits.mean(dim=1)))).sum()  # NaN is wrong, too
            self._checked[1] += len(logits)
        else:
            row.copy_(logits.argmax(dim=1).where(logits.isfinite().all(dim=1), MISSING))
            self._is_new = True

    def save(self) -> None:
        """Write the new labels. All processes must call this together.

        Raises:
            TrainingError: If more than `MAX_WRONG` of the labels that were compared are not the teacher's answers, by
                three standard deviations.
        """
        checked = self._checked.clone()
        if self.ranks.distributed:
            dist.all_reduce(checked)
        wrong, count = checked.tolist()
        expected = MAX_WRONG * count
        if wrong > expected + 3 * math.sqrt(expected):
            raise TrainingError(
                f'--kd-label-cache {self.folder}: {wrong} of {count} labels are not the answers of the teacher (epoch'
                f' {self.epoch}). The images or the teacher have changed, or libraries that read and transform images.'
                ' Name another folder.')
        if self._is_new and self._can_write:
            labels = self._table.cpu().numpy().astype(np.uint16)
            found = self._read()  # another run may fill the same folder
            content = io.BytesIO()
            np.save(content, np.where(labels == MISSING, found, labels))
            try:
                write_bytes(self.path(self.epoch), content.getvalue())
            except OSError as e:
                self._can_write = False
                _logger.warning(
                    f'--kd-label-cache: the labels cannot be written to {self.folder} ({e.strerror}). The run continues'
                    ' without writing them.')
        self._is_new = False

    def describe(self) -> str:
        """Return how many labels were read and computed, in words."""
        share = self.num_read / max(1, self.num_read + self.num_computed)
        return (f'Labels of the teacher: {self.num_read} read ({100 * share:.0f} %), {self.num_computed} computed.'
                f' They are in {self.folder}.')


def describe_labels(args, trainer: Trainer, dataset: Any, data_config: Dict[str, Any]) -> Dict[str, Any]:
    """Return all that the labels depend on, as JSON values: images, mixes and teacher."""
    teacher: Any = trainer.task.teacher
    class_map = teacher.class_map
    erases_on_device = args.reprob > 0 and not args.no_aug and not args.no_prefetcher
    facts = dict(
        teacher=teacher.weights_hash,
        teacher_architecture=getattr(teacher.model, 'pretrained_cfg', {}).get('architecture'),
        teacher_normalisation=[teacher.scale.flatten().tolist(), teacher.shift.flatten().tolist()],
        class_map=None if class_map is None else hashlib.sha256(repr(class_map.tolist()).encode()).hexdigest()[:12],
        image_files=describe_files(dataset),
        **{name: getattr(args, name) for name in IMAGE_OPTIONS},
        **{name: data_config[name] for name in ('input_size', 'mean', 'std')},
        train_interpolation=train_interpolation(args, data_config),
        processes=trainer.ranks.world_size,
        # its random numbers are those of the device
        erasing_device=trainer.precision.device.type if erases_on_device else None,
        size_schedule_epochs=args.epochs if args.train_size_schedule == 'progressive' else None,
    )
    return json.loads(json.dumps(facts))


def open_label_folder(folder: str, facts: Dict[str, Any]) -> None:
    """Create the folder with its manifest, or compare the manifest with the present run.

    Args:
        folder: The folder.
        facts: See `describe_labels`.

    Raises:
        ValueError: If the folder cannot be created, or its labels are of other images or of another teacher.
    """
    path = Path(folder, MANIFEST)
    try:
        if Path(folder).is_dir() and not path.exists() and os.listdir(folder):
            raise ValueError(
                f'--kd-label-cache {folder!r} has other files and no {MANIFEST}. Name another folder.')
        create_file(path, json.dumps(facts, indent=1).encode())
        found = json.loads(path.read_text())
    except OSError as e:
        raise ValueError(f'--kd-label-cache {folder!r} cannot be used ({e.strerror}). Name another folder.') from e
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or 'image_files' not in found:
        raise ValueError(f'--kd-label-cache: {str(path)!r} cannot be read. Remove the folder, or name another one.')
    changed = ', '.join(
        f'{name} {found.get(name)} → {facts.get(name)}' for name in {**found, **facts}
        if found.get(name) != facts.get(name))
    if changed:
        raise ValueError(
            f'--kd-label-cache {folder!r} has the labels of other images or of another teacher: {changed}. Name another'
            ' folder, or restore these options.')


def build_label_cache(args, trainer: Trainer, dataset: Any, data_config: Dict[str, Any]) -> Optional[LabelCache]:
    """Open the folder of --kd-label-cache and give its labels to the task; None without the flag, or a teacher.

    Raises:
        ValueError: If the labels cannot be kept, or the folder has labels of another run.
    """
    task = trainer.task
    if not args.kd_label_cache or not isinstance(task, DearKDTask):
        return None
    num_classes = count_outputs(task)
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f'--kd-label-cache needs the same images in every run, but the order of the stream {args.dataset} depends'
            ' on the workers. Remove the flag.')
    if num_classes > MISSING:
        raise ValueError(f'--kd-label-cache takes up to {MISSING} classes, the teacher has {num_classes}.')
    if 'teacher_agreement' not in task.log_names:
        raise ValueError(
            '--kd-label-cache: this run uses no labels of the teacher. Remove the flag, or set --dearkd-alpha below 1.')

    def prepare() -> None:
        open_label_folder(args.kd_label_cache, describe_labels(args, trainer, dataset, data_config))

    on_primary(trainer.ranks, prepare)
    max_images = max(args.train_batch_sizes or [args.batch_size]) * max(1, args.aug_splits)
    cache = LabelCache(
        args.kd_label_cache, task, len(trainer.loader), max_images, trainer.precision.device, trainer.ranks)
    num_epochs = task.schedule.total_epochs
    num_found = sum(cache.path(epoch).exists() for epoch in range(num_epochs))
    _logger.info(f'--kd-label-cache {args.kd_label_cache} has labels of {num_found} of {num_epochs} epochs.')
    task.label_store = cache
    return cache
