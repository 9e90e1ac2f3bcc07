"""The images of a distillation: their splits, and what the choice of options depends on."""
import json
import os
import random
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from .engine.image_folder import FolderScan, class_order, find_splits, scan_folder, split_folder
from .files import write_bytes

__all__ = ['Images', 'is_mirrored_alike', 'look_at', 'prepare_splits', 'split_images']

# Our choices
VALIDATION_SHARE = 0.2
NUM_SAMPLES = 64  # images that are opened
MIRROR_AGREEMENT = 0.75  # share of the images whose mirror image gets the same class
TIMMS_SPLITS = ('train', 'validation')  # the defaults of train.py


@dataclass(frozen=True)
class Images:
    """Counts and properties of the images.

    Args:
        num_train: Number of training images.
        num_validation: Number of validation images.
        num_classes: Number of classes.
        side: Median of the shorter sides, in pixels.
        is_grey: Whether no sample has colours.
        samples: Paths of some training images.
    """
    num_train: int
    num_validation: int
    num_classes: int
    side: int
    is_grey: bool
    samples: Sequence[str]


def look_at(data: str, train_split: str, val_split: str, train_fraction: float = 1.) -> Images:
    """Count the images of a folder with splits, and open some of them.

    `train_fraction` is the share of the training images that are used.

    Raises:
        FileNotFoundError: If a split does not exist.
        ValueError: If there are no images, or none of the samples can be read.
    """
    scan = scan_folder(split_folder(data, train_split))
    if not scan.images:
        raise ValueError(f'No images in {scan.root!r}. Put the images into one folder per class: {data}/CLASS/IMAGE.')
    chosen = [scan.images[i * len(scan.images) // NUM_SAMPLES][0] for i in range(NUM_SAMPLES)]
    samples, sides, modes = list(dict.fromkeys(chosen)), [], set()
    for path in samples:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
                modes.add(image.mode)
        except OSError:
            continue  # train.py names and skips it
    if not sides:
        raise ValueError(f'None of {len(samples)} images in {scan.root!r} can be read. Convert them to PNG or JPEG.')
    num_validation = len(scan_folder(split_folder(data, val_split)).images) if val_split else 0
    return Images(
        round(train_fraction * len(scan.images)), num_validation, len(scan.names), sorted(sides)[len(sides) // 2],
        modes <= {'L', '1'}, samples)


@torch.inference_mode()
def is_mirrored_alike(model: nn.Module, paths: Sequence[str]) -> bool:
    """Return whether a CNN gives most images and their mirror images the same class."""
    config = resolve_model_data_config(model)
    transform: Any = create_transform(**config)
    mode = 'L' if config['input_size'][0] == 1 else 'RGB'
    tensors = []
    for path in paths:
        try:
            with Image.open(path) as image:
                tensors.append(transform(image.convert(mode)))
        except OSError:
            continue
    x = torch.stack(tensors).to(next(model.parameters()).device)
    same = model(x).argmax(1) == model(x.flip(3)).argmax(1)
    return same.float().mean().item() >= MIRROR_AGREEMENT


def prepare_splits(data: str, output: Path, train_split: str, val_split: str) -> str:
    """Return a folder with splits: `data`, or OUTPUT/data with links to its images.

    Raises:
        FileNotFoundError: If `data` is no folder.
        ValueError: If it has no images, or if OUTPUT/data has a split of other images.
    """
    if not os.path.isdir(data):
        raise FileNotFoundError(f'No folder {data!r}. Give a folder with one folder of images per class.')
    splits = find_splits(data)
    if len(splits) > 1 or (train_split, val_split) != TIMMS_SPLITS:
        return data
    scan = scan_folder(os.path.join(data, splits[0]) if splits else data)
    if not scan.images:
        raise ValueError(f'No images in {data!r}. Put the images into one folder per class: {data}/CLASS/IMAGE.')
    split_images(scan, output / 'data')
    return str(output / 'data')


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it if the file system has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for make in (os.symlink, os.link):
        try:
            make(source, target)
            return
        except OSError:
            continue
    shutil.copy2(source, target)


def split_images(scan: FolderScan, folder: Path, seed: int = 0) -> None:
    """Link the images of a folder as FOLDER/train/CLASS/* and FOLDER/validation/CLASS/*.

    A fifth of each class, drawn with the seed, is for validation, but at least one image of each class with two or
    more. An existing split of the same images is kept.

    Args:
        scan: The images.
        folder: Folder to write.
        seed: Random seed of the split.

    Raises:
        ValueError: If the folder has a split of other images.
    """
    by_class: Dict[str, List[str]] = defaultdict(list)
    for path, name in scan.images:
        by_class[name].append(os.path.relpath(path, scan.root))
    record = json.dumps(dict(source=os.path.abspath(scan.root), seed=seed, images=by_class), sort_keys=True).encode()
    written = folder / 'split.json'
    if written.exists():
        if written.read_bytes() != record:
            raise ValueError(
                f'{str(folder)!r} has a split of other images than {scan.root!r} has now. Set another --output, or'
                f' remove {str(folder.parent)!r} to start again.')
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a call that was interrupted
    draw = random.Random(seed)
    for name in class_order(by_class):
        images = draw.sample(by_class[name], len(by_class[name]))
        count = max(round(VALIDATION_SHARE * len(images)), int(len(images) > 1))
        for i, image in enumerate(images):
            split = 'validation' if i < count else 'train'
            is_flat = os.path.dirname(image) == name
            target = os.path.basename(image) if is_flat else image.replace(os.sep, '-')
            _link(Path(os.path.abspath(os.path.join(scan.root, image))), folder / split / name / target)
    write_bytes(written, record)
