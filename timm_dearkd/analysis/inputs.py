"""Models, images and output files of the tools."""
import argparse
import itertools
import logging
import os
from collections import Counter
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from timm.data.model_config import resolve_input_data_config
from timm.models import get_model_input_config, is_model

import distill_hooks
from distill_hooks.errors import one_line
from timm_dearkd.commands import add_device, check_overwrite
from timm_dearkd.engine.data import evenly_spaced
from timm_dearkd.engine.distillation import saved_names
from timm_dearkd.engine.image_folder import (
    IMAGE_MODES,
    UNREADABLE,
    check_mode,
    class_order,
    exceeds_8_bits,
    find_splits,
    has_class_folders,
    index_by_name,
    normal_name,
    scan_folder,
    warn_of_other_types,
)
from timm_dearkd.engine.options import run_options
from timm_dearkd.engine.process import find_device
from timm_dearkd.engine.wrappers import warn_of_changes

_logger = logging.getLogger(__name__)


def add_model_arguments(parser: argparse.ArgumentParser, output: str, required: bool = True) -> None:
    """Add the options of tools that load models. `output` is their default prefix."""
    add = parser.add_argument
    add('--model', required=required, nargs='+', metavar='NAME', help='timm name, hf-hub:, local-dir: or run folder')
    add('--checkpoint', metavar='FILE', help='weights of the first model (default: its pretrained ones)')
    add_device(parser)
    add_output_arguments(parser, output)


def add_output_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of tools that write files, see `output_files`."""
    add = parser.add_argument
    add('--output', metavar='PREFIX',
        help=f'start of the file names (default: RUN/analysis/{name} for a run folder, else {name})')
    add('--overwrite', action='store_true', help='replace files that exist')


def output_files(args: argparse.Namespace, name: str, source: str, *endings: str) -> List[Path]:
    """Return the files that a tool writes: PREFIX and each ending.

    If the default files exist, PREFIX-2, PREFIX-3, ... are free names beside them.

    Args:
        args: Options, see `add_output_arguments`.
        name: Last part of the default prefix.
        source: First model or run. If it is a folder, the default prefix is in its subfolder `analysis`, else in the
            current folder.
        *endings: Endings of the file names, such as '.csv'.

    Raises:
        ValueError: See `check_overwrite`.
    """
    folder = source.removeprefix('local-dir:')
    is_folder = os.path.isdir(folder) and (folder != source or not is_model(source))
    prefix = Path(args.output or (Path(folder, 'analysis', name) if is_folder else name))
    for number in itertools.count(1):
        suffix = '' if number == 1 else f'-{number}'
        files = [prefix.with_name(f'{prefix.name}{suffix}{ending}') for ending in endings]
        if args.output or args.overwrite or not any(file.exists() for file in files):
            break
    check_overwrite(files, args.overwrite)
    return files


def load_model(name: str, checkpoint: Optional[str] = None, device: Optional[str] = None) -> Any:
    """Load a trained timm model in eval mode, see `distill_hooks.load_model`.

    Its `pretrained_cfg` has the `input_img_mode` that its run was given.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If the name or the device is unknown, or no weights are available.
    """
    model: Any = distill_hooks.load_model(name, checkpoint, device=find_device(device)).eval()
    mode = run_options(name, checkpoint).get('input_img_mode')
    if mode and not exceeds_8_bits(mode):
        model.pretrained_cfg['input_img_mode'] = mode
    elif get_model_input_config(model)['input_size'][0] == 4:
        _logger.warning('Reads the images as CMYK. The results are wrong if the model was trained on RGBA.')
    return model


def image_transform(model: Any) -> Tuple[Callable[[Image.Image], torch.Tensor], str]:
    """Return a model's preprocessing of validation images, and their Pillow mode.

    Raises:
        ValueError: If the model takes more than 4 channels.
    """
    config = resolve_input_data_config(model)
    in_chans = config['input_size'][0]
    if in_chans not in IMAGE_MODES:
        raise ValueError(f'--model takes {in_chans} channels, expected 1 to 4, as images have.')
    return create_transform(**config), model.pretrained_cfg.get('input_img_mode') or IMAGE_MODES[in_chans]


def label_names(model: Any) -> Optional[List[str]]:
    """Return the class names that label a model's images; None if unknown.

    They are the names that the model was saved with, or ImageNet's synsets, after which its class folders are named.
    """
    names, info = saved_names(model), _imagenet_info(model)
    if len(names) == model.num_classes:
        return names
    return info.label_names() if info else None


def _imagenet_info(model: Any) -> Optional[ImageNetInfo]:
    subset = infer_imagenet_subset(model)
    return ImageNetInfo(subset) if subset else None


def class_names(model: Any) -> List[str]:
    """Return a readable name for each class, all different: description (ImageNet), name or index."""
    names, info = label_names(model), _imagenet_info(model)
    if names is None:
        return [str(index) for index in range(model.num_classes)]
    if info is not None and names == info.label_names():
        names = [info.label_name_to_description(name) for name in names]
    counts = Counter(names)  # a crane is a bird, and a machine
    return [f'{name} ({index})' if counts[name] > 1 else name for index, name in enumerate(names)]


def open_image(path: str, mode: str = 'RGB', has_warned: Optional[torch.Tensor] = None) -> Image.Image:
    """Read an image file.

    Args:
        path: The file.
        mode: Pillow mode to convert to.
        has_warned: See `warn_of_changes`; None gives no such warnings.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, or has more than 8 bits per channel.
    """
    try:
        with Image.open(path) as file:
            found, image = file.mode, file.convert(mode)
            if has_warned is not None:
                warn_of_changes(file, mode, has_warned, lambda: path)
    except FileNotFoundError:
        raise FileNotFoundError(f'No image at {path!r}.') from None
    except UNREADABLE as e:
        raise ValueError(f'{path!r} cannot be read as an image ({one_line(e)}).') from e
    check_mode(path, found)
    return image


class ImageFiles(Sequence):
    """Images and labels of files, which are opened when they are indexed.

    Args:
        samples: Path and label of each image; None is an unknown label.
        mode: Pillow mode to convert to.
        has_warned: See `open_image`.
    """

    def __init__(
            self,
            samples: List[Tuple[str, Optional[int]]],
            mode: str = 'RGB',
            has_warned: Optional[torch.Tensor] = None,
    ) -> None:
        self.samples, self.mode, self.has_warned = samples, mode, has_warned

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        path, label = self.samples[index]
        return open_image(path, self.mode, self.has_warned), label


def find_images(
        paths: Sequence[str],
        names: Optional[Sequence[str]] = None,
        num_classes: int = 0,
        mode: str = 'RGB',
) -> ImageFiles:
    """Find the images in files and folders. Class folders label their images.

    Warns of image files of types that are not read, and of the first image that a viewer shows differently.

    Args:
        paths: Files and folders.
        names: Class names of the model. Images in folders with other names have no label; a warning lists the folders.
        num_classes: Number of classes of the model. Without `names`, this many class folders are numbered in order.
        mode: Pillow mode to convert to.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a folder has no images.
    """
    samples: List[Tuple[str, Optional[int]]] = []
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f'No file or folder {path!r}. Give images, or folders of them.')
        if not Path(path).is_dir():
            samples.append((path, None))
            continue
        scan = scan_folder(path)
        warn_of_other_types(scan)
        if not scan.images:
            raise ValueError(f'{path!r} has no images.')
        splits = [name for name in find_splits(path) if has_class_folders(os.path.join(path, name))]
        if len(splits) > 1:
            _logger.warning(
                f'{path!r} has the splits {", ".join(splits)}. All of their images count. For those of one split, give'
                f' {os.path.join(path, splits[-1])}.')
        in_order = names is None and len(scan.names) == num_classes
        labels = index_by_name(scan.names) if in_order else {normal_name(name): i for i, name in enumerate(names or ())}
        unknown = class_order(scan.names - set(labels))
        if unknown and len(scan.names) > 1 and (names or num_classes):
            _logger.warning(
                f'{len(unknown)} of {len(scan.names)} folders in {path!r} are not classes of the model. Their images'
                f' have no label: {", ".join(unknown[:5])}.')
        samples += [(file, labels.get(name)) for file, name in scan.images]
    return ImageFiles(samples, mode, torch.zeros(2, dtype=torch.bool).share_memory_())


def load_images(model: nn.Module, folder: str, count: int) -> torch.Tensor:
    """Load images of an image folder with a model's validation preprocessing.

    Args:
        model: The model.
        folder: Image folder.
        count: Number of images, spread evenly over the folder.

    Returns:
        Images (count, C, H, W), or fewer if some cannot be read.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If no image can be read.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'No folder {folder!r}. Give a folder of images.')
    transform, mode = image_transform(model)
    files = find_images([folder], mode=mode)
    images = []
    for place in evenly_spaced(len(files), count):
        try:
            images.append(transform(files[place][0]))
        except ValueError as e:
            _logger.warning(f'{e} Skipping it.')
    if not images:
        raise ValueError(f'None of the images in {folder!r} can be read.')
    return torch.stack(images)
