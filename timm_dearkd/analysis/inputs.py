"""Models and images that the tools take."""
import argparse
import logging
import os
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.models import is_model

from distill_hooks import create_teacher
from timm_dearkd.engine.data import spread
from timm_dearkd.engine.device import find_device
from timm_dearkd.engine.image_folder import check_mode, class_order, index_by_name, normal_name, scan_folder

__all__ = [
    'ImageFiles', 'add_model_arguments', 'add_output_arguments', 'check_counts', 'check_overwrite', 'class_names',
    'find_images', 'image_transform', 'label_names', 'load_images', 'load_model', 'open_image', 'output_files',
]

_logger = logging.getLogger(__name__)

_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'CMYK'}  # by channels


def add_model_arguments(parser: argparse.ArgumentParser, output: str, required: bool = True) -> None:
    """Options of every tool that looks into a model."""
    add = parser.add_argument
    add('--model', required=required, nargs='+', metavar='NAME', help='timm name, local-dir: or the folder of a run')
    add('--checkpoint', metavar='FILE', help='weights of the first (its pretrained ones)')
    add('--device', help='cuda, cpu, ... (the accelerator there is, else the CPU)')
    add_output_arguments(parser, output)


def add_output_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options of every tool that writes files, see `output_files`."""
    add = parser.add_argument
    add('--output', metavar='PREFIX',
        help=f'start of the file names (RUN/analysis/{name} for a run folder, else {name} in the current folder)')
    add('--overwrite', action='store_true', help='replace files that exist')


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below 1.

    Raises:
        ValueError: One that is.
    """
    for name in names:
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not value >= 1:
                raise ValueError(f'--{name.replace("_", "-")} {value}, expected 1 or more.')


def output_files(args: argparse.Namespace, name: str, source: str, *endings: str) -> List[Path]:
    """Return the files that a tool is going to write: PREFIX and each ending.

    Args:
        args: Options, see `add_output_arguments`.
        name: Last part of the default prefix.
        source: First model or run. If it is a folder, the default prefix is in its subfolder `analysis`, else in the
            current folder.
        *endings: What follows the prefix, which may have dots.

    Raises:
        ValueError: See `check_overwrite`.
    """
    folder = source.removeprefix('local-dir:')
    is_folder = os.path.isdir(folder) and (folder != source or not is_model(source.split('.')[0]))
    prefix = Path(args.output or (Path(folder, 'analysis', name) if is_folder else name))
    files = [prefix.with_name(f'{prefix.name}{ending}') for ending in endings]
    check_overwrite(files, args.overwrite)
    return files


def check_overwrite(files: Sequence[Path], overwrite: bool) -> None:
    """Check that files can be written, before any work.

    Raises:
        ValueError: If a file exists and is not to be replaced, or if its folder does not let us write.
    """
    for file in files:
        if file.exists() and not overwrite:
            raise ValueError(f'{str(file)!r} exists. Add --overwrite to replace it, or set another --output.')
        parent = next(parent for parent in file.absolute().parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise ValueError(f'{str(file)!r} cannot be written: no write access to {str(parent)!r}. Set --output.')


def load_model(name: str, checkpoint: Optional[str] = None, device: Optional[str] = None) -> Any:
    """A trained timm model in eval mode, see `distill_hooks.create_teacher`.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: An unknown name or device, or no weights to be had.
    """
    return create_teacher(name, checkpoint, device=find_device(device)).eval()


def image_transform(model: nn.Module) -> Tuple[Callable[[Image.Image], torch.Tensor], str]:
    """A model's own preprocessing of validation images, and the image mode that it starts from.

    Raises:
        ValueError: More channels than images have.
    """
    config = resolve_model_data_config(model)
    in_chans = config['input_size'][0]
    if in_chans not in _MODES:
        raise ValueError(f'The model takes {in_chans} channels, and images have 1 to 4.')
    return create_transform(**config), _MODES[in_chans]


def label_names(model: Any) -> Optional[List[str]]:
    """Names of a model's classes: those it was saved with, or ImageNet's (as its folders are called)."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    if names and len(names) == model.num_classes:
        return [str(name) for name in names]
    subset = infer_imagenet_subset(model)
    return list(ImageNetInfo(subset).label_names()) if subset else None


def class_names(model: Any) -> List[str]:
    """What to call a model's classes: by their names, ImageNet's by what they are, and unknown ones by number."""
    names = label_names(model)
    if names is None:
        return [str(index) for index in range(model.num_classes)]
    subset = infer_imagenet_subset(model)
    info = ImageNetInfo(subset) if subset else None
    if info is None or names != info.label_names():
        return names
    return [info.label_name_to_description(name) for name in names]


def open_image(path: str, mode: str = 'RGB') -> Image.Image:
    """Read an image file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It can not be read, or is too deep for the mode.
    """
    try:
        with Image.open(path) as file:
            found, image = file.mode, file.convert(mode)
    except FileNotFoundError:
        raise FileNotFoundError(f'No image at {path!r}.') from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # Pillow's for broken files
        raise ValueError(f'{path!r} can not be read as an image ({" ".join(str(e).split())}).') from e
    check_mode(path, found, mode)
    return image


class ImageFiles(Sequence):
    """Image files and their labels, opened one by one.

    Args:
        samples: Path and label of each; None is unknown.
        mode: Image mode to convert to.
    """

    def __init__(self, samples: List[Tuple[str, Optional[int]]], mode: str = 'RGB') -> None:
        self.samples, self.mode = samples, mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return open_image(path, self.mode), label


def find_images(
        paths: Sequence[str],
        names: Optional[Sequence[str]] = None,
        num_classes: int = 0,
        mode: str = 'RGB',
) -> ImageFiles:
    """Images of files and folders. In a folder of class folders, their names label the images.

    Args:
        paths: Files and folders.
        names: The model's class names. Folders with other names have no labels, and a warning says so.
        num_classes: How many classes it has. Without names, as many folders are labelled in their order.
        mode: Image mode to convert to.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: A folder without images.
    """
    if mode == 'CMYK':
        _logger.warning('The images are read as CMYK. Of a model that was trained on RGBA, the results are wrong.')
    samples: List[Tuple[str, Optional[int]]] = []
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f'No file or folder {path!r}. Give images, or folders of them.')
        if not Path(path).is_dir():
            samples.append((path, None))
            continue
        scan = scan_folder(path)
        if not scan.images:
            raise ValueError(f'{path!r} holds no images.')
        in_order = names is None and len(scan.names) == num_classes
        labels = index_by_name(scan.names) if in_order else {normal_name(name): i for i, name in enumerate(names or ())}
        unknown = class_order(scan.names - set(labels))
        if unknown and len(scan.names) > 1 and (names or num_classes):
            _logger.warning(
                f'{len(unknown)} of {len(scan.names)} folders in {path!r} are no class of the model, so their images'
                f' have no label: {", ".join(unknown[:5])}.')
        samples += [(file, labels.get(name)) for file, name in scan.images]
    return ImageFiles(samples, mode)


def load_images(model: nn.Module, folder: str, count: int) -> torch.Tensor:
    """Images (count, C, H, W) of an image folder, spread over its classes, as a model takes them in validation.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: A folder without images.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'No folder {folder!r}. Give one with images.')
    transform, mode = image_transform(model)
    files = find_images([folder], mode=mode)
    images = []
    for place in spread(len(files), count):
        try:
            images.append(transform(files[place][0]))
        except ValueError as e:
            _logger.warning(f'{e} It is left out.')
    if not images:
        raise ValueError(f'None of the images in {folder!r} can be read.')
    return torch.stack(images)
