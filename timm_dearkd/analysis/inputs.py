"""Models and images that the tools take."""
import argparse
from pathlib import Path
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from PIL import Image
from timm.data import ImageDataset, ImageNetInfo, create_transform, resolve_model_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets

from distill_hooks import create_teacher
from timm_dearkd.engine.device import select_device

__all__ = [
    'ImageFiles', 'add_model_arguments', 'check_counts', 'class_names', 'find_images', 'image_transform', 'load_images',
    'load_model', 'output_path',
]


def add_model_arguments(parser: argparse.ArgumentParser, output: str, required: bool = True) -> None:
    """Options of every tool that looks into a model."""
    add = parser.add_argument
    add('--model', required=required, nargs='+', metavar='NAME', help='timm name, local-dir: or the folder of a run')
    add('--checkpoint', metavar='FILE', help='weights of the first (its pretrained ones)')
    add('--device', help='cuda, cpu, ... (the accelerator there is, else the CPU)')
    add('--output', default=output, metavar='PREFIX', help=f'begin of the names of the files ({output})')


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below 1.

    Raises:
        ValueError: One that is.
    """
    for name in names:
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                raise ValueError(f'--{name.replace("_", "-")} {value}, expected 1 or more.')


def output_path(prefix: str, suffix: str) -> Path:
    """PREFIX with an ending; the prefix may have dots."""
    path = Path(prefix)
    return path.with_name(f'{path.name}{suffix}')


def load_model(name: str, checkpoint: Optional[str] = None, device: Optional[str] = None) -> Any:
    """A trained timm model in eval mode, see `distill_hooks.create_teacher`.

    Raises:
        FileNotFoundError: No such checkpoint.
        ValueError: An unknown name or device, or no weights to be had.
    """
    return create_teacher(name, checkpoint, device=select_device(device)[0]).eval()


def image_transform(model: nn.Module) -> Tuple[Callable[[Image.Image], torch.Tensor], str]:
    """A model's own preprocessing of validation images, and the image mode that it starts from."""
    config = resolve_model_data_config(model)
    return create_transform(**config), 'L' if config['input_size'][0] == 1 else 'RGB'


def class_names(model: Any) -> List[str]:
    """Names of a model's classes: those it was saved with, ImageNet's, or their numbers."""
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    if names and len(names) == model.num_classes:
        return [str(name) for name in names]
    if model.num_classes == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(index) for index in range(1000)]
    return [str(index) for index in range(model.num_classes)]


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
        with Image.open(path) as file:
            return file.convert(self.mode), label


def find_images(paths: Sequence[str], names: Sequence[str], mode: str = 'RGB') -> ImageFiles:
    """Images of files and folders. In a folder of class folders, those that a model's classes are named like label
    them; so do any, in order, if there are as many as classes.

    Args:
        paths: Files and folders.
        names: The model's class names.
        mode: Image mode to convert to.

    Raises:
        FileNotFoundError: No such file or folder.
        ValueError: A folder without images.
    """
    samples: List[Tuple[str, Optional[int]]] = []
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f'No file or folder {path!r}. Give images, or folders of them.')
        if not Path(path).is_dir():
            samples.append((path, None))
            continue
        found, class_to_idx = find_images_and_targets(path)
        if not found:
            raise ValueError(f'{path!r} holds no images.')
        by_name = {name: index for index, name in enumerate(names)}
        in_order = len(class_to_idx) == len(names) and len(names) > 1 and not set(class_to_idx) & set(by_name)
        labels = {index: index if in_order else by_name.get(name) for name, index in class_to_idx.items()}
        samples += [(str(file), labels.get(index)) for file, index in found]
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
    try:
        dataset = ImageDataset(folder, transform=transform, input_img_mode=mode)
    except RuntimeError as e:
        raise ValueError(f'{folder!r} holds no images.') from e
    return torch.stack([dataset[place][0] for place in spread(len(dataset), count)])


def spread(length: int, count: int) -> List[int]:
    """At most `count` places in a sequence, as far apart as can be."""
    return torch.linspace(0, length - 1, min(count, length)).long().tolist()
