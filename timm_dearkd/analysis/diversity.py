"""How far apart the images of a class are: mean LPIPS over random pairs (table 6)."""
import argparse
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Set, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.data import resolve_model_data_config
from tqdm import tqdm

from distill_hooks import FeatureCapture, create_teacher
from distill_hooks.teacher import input_normalisation
from timm_dearkd.engine.device import find_device
from timm_dearkd.engine.image_folder import index_by_name, scan_folder
from timm_dearkd.files import write_bytes

from .inputs import check_counts, check_overwrite, open_image

_logger = logging.getLogger(__name__)

__all__ = ['FeatureDistance', 'LPIPSDistance', 'class_pairs', 'measure_diversity']

# of two image batches (B, C, H, W) with values from 0 to 1: (B,)
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LPIPSDistance:
    """LPIPS (Zhang et al., 2018), higher for images that look less alike.

    Args:
        backbone: 'alex' (ours, for the paper names none), 'vgg' or 'squeeze', whose ImageNet weights torchvision has
            to download.
        device: Where it runs.

    Raises:
        ValueError: The `lpips` package or the weights can not be had.
    """

    in_chans = 3
    img_size = 224

    def __init__(self, backbone: str = 'alex', device: Union[str, torch.device] = 'cpu') -> None:
        try:
            import lpips
            with warnings.catch_warnings():  # it calls torchvision in a way that is going to change
                warnings.simplefilter('ignore')
                self.model = lpips.LPIPS(net=backbone, verbose=False).eval().to(device)
        except (ImportError, OSError, RuntimeError) as e:
            what = 'pip install lpips' if isinstance(e, ImportError) else f'{type(e).__name__}: {e}'
            raise ValueError(
                f'LPIPS needs the lpips package and the weights of {backbone} ({what}). Without them, measure with the'
                ' features of a CNN that you have: --model NAME --checkpoint FILE.') from e
        self.name = f'LPIPS ({backbone})'
        self.device = device

    @torch.inference_mode()
    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return self.model(first.to(self.device), second.to(self.device), normalize=True).flatten().cpu()


class FeatureDistance:
    """The statistic of LPIPS on the features of any timm CNN, without LPIPS's learned weights (our choice).

    At each of the CNN's levels the features are scaled to unit length over the channels; the squared differences are
    summed over channels, averaged over positions, and added up over the levels. Only figures of one CNN compare.

    Args:
        model: The CNN.
        name: What to call it.

    Raises:
        ValueError: A model that does not say where its feature levels are, or has other channels than 1 or 3.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        modules = {module for module, _ in model.named_modules() if module}
        levels = [level['module'] for level in getattr(model, 'feature_info', None) or ()]
        levels = [level for level in levels if level in modules]  # timm's lists also name what a model may lack
        if not levels:
            raise ValueError(f'{name} does not say where its feature maps are. Choose a timm CNN, such as resnet50.')
        config = resolve_model_data_config(model)
        self.in_chans: int = getattr(model, 'in_chans', len(config['mean']))
        if self.in_chans not in (1, 3):
            raise ValueError(f'{name} takes {self.in_chans} channels, expected 1 or 3. Choose another CNN.')
        self.model = model.eval()
        self.capture = FeatureCapture(model, levels)
        self._channels = -1 if getattr(model, 'output_fmt', 'NCHW') == 'NHWC' else 1
        self.img_size: int = config['input_size'][-1]
        self.name = f'squared distance of {name} features (not LPIPS)'
        self.device = next(model.parameters()).device
        self.mean, self.std = (
            values.float().view(1, -1, 1, 1).to(self.device) for values in input_normalisation(model, self.in_chans))

    @torch.inference_mode()
    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        images = torch.cat([first, second]).to(self.device)
        self.model((images - self.mean) / self.std)
        total = torch.zeros(len(first), device=self.device)
        for features in self.capture.take():
            if not isinstance(features, torch.Tensor) or features.ndim != 4:
                raise ValueError(f'{self.name}: not feature maps. Choose another CNN, such as resnet50.')
            a, b = F.normalize(features.float(), dim=self._channels, eps=1e-10).chunk(2)
            total += (a - b).square().sum(dim=self._channels).mean(dim=(1, 2))
        return total.cpu()


def class_pairs(
        labels: Sequence[int],
        pairs_per_class: int,
        seed: int = 0,
) -> Dict[int, List[Tuple[int, int]]]:
    """Random pairs of different images of each class that has two, without repeats.

    Args:
        labels: Class of each image.
        pairs_per_class: All pairs, where there are fewer.
        seed: Of the choice.
    """
    by_label: Dict[int, List[int]] = {}
    for i, label in enumerate(labels):
        by_label.setdefault(label, []).append(i)
    result = {}
    for label, members in sorted(by_label.items()):
        count = len(members) * (len(members) - 1) // 2
        if not count:
            continue
        chosen = np.random.default_rng((seed, label)).choice(count, min(count, pairs_per_class), replace=False)
        pairs = []
        for number in sorted(chosen.tolist()):
            # the pairs (0, 1), (0, 2), (1, 2), (0, 3), ... by number
            second = (1 + math.isqrt(1 + 8 * number)) // 2
            pairs.append((members[number - second * (second - 1) // 2], members[second]))
        result[label] = pairs
    return result


def _load(path: str, size: int, in_chans: int) -> torch.Tensor:
    """An image (C, size, size) from 0 to 1: the shorter side resized, the centre cut out."""
    image = open_image(path, 'L' if in_chans == 1 else 'RGB')
    scale = size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).reshape(size, size, in_chans).permute(2, 0, 1)


def measure_diversity(
        folder: str,
        distance: Distance,
        img_size: int,
        in_chans: int = 3,
        pairs_per_class: int = 100,
        batch_size: int = 32,
        seed: int = 0,
) -> Dict[str, Any]:
    """Mean distance between images of one class, averaged over the classes.

    Args:
        folder: One folder per class; or what `timm_dearkd.data_free` wrote, whose `train` is measured.
        distance: Of image pairs, see `LPIPSDistance` and `FeatureDistance`.
        img_size: Side length in pixels that images are brought to.
        in_chans: Their channels, 1 or 3.
        pairs_per_class: Random pairs of each class (the number is ours; the paper has 4000 in all).
        batch_size: Pairs at a time.
        seed: Of the pairs.

    Returns:
        'mean', 'stderr' (over classes), 'classes' (mean by class), 'pairs' and 'images'.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: No class with two images, or none that can be read. Others that can not are named, and left out.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f'No folder {folder!r}. Give one that has a folder of images for each class.')
    root = root / 'train' if (root / 'train').is_dir() else root
    scan = scan_folder(str(root))
    samples, numbers = scan.images, index_by_name(scan.names)
    pairs = class_pairs([numbers[name] for _, name in samples], pairs_per_class, seed)
    if not pairs:
        raise ValueError(
            f'{str(root)!r} has {len(samples)} images and no class with two of them. Expected a folder for each class.')
    todo = [(label, *pair) for label, of_class in pairs.items() for pair in of_class]
    unreadable: Set[str] = set()
    values: Dict[int, List[float]] = {}
    batches = range(0, len(todo), batch_size)
    for start in tqdm(batches, desc=root.as_posix(), unit='batch', leave=False, mininterval=1, disable=None):
        loaded = []
        for label, *pair in todo[start:start + batch_size]:
            try:
                loaded.append((label, *(_load(samples[i][0], img_size, in_chans) for i in pair)))
            except ValueError as e:
                if str(e) not in unreadable:
                    _logger.warning(f'{e} Its pairs are left out.')
                unreadable.add(str(e))
        if loaded:
            labels, first, second = zip(*loaded)
            for label, value in zip(labels, distance(torch.stack(first), torch.stack(second)).tolist()):
                values.setdefault(label, []).append(value)
    if not values:
        raise ValueError(f'None of the images in {str(root)!r} can be read.')
    names = {index: name for name, index in numbers.items()}
    by_class = {names[label]: float(np.mean(of_class)) for label, of_class in values.items()}
    means = np.array(list(by_class.values()))
    return dict(
        mean=float(means.mean()),
        stderr=float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None,
        classes=by_class, pairs=sum(map(len, values.values())), images=len(samples))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add('folders', nargs='+', metavar='FOLDER', help='image folders: one folder per class, or what data_free wrote')
    add('--model', metavar='NAME', help='a timm CNN whose features are compared instead of LPIPS')
    add('--checkpoint', metavar='FILE', help='its weights (its pretrained ones)')
    add('--lpips-net', default='alex', choices=('alex', 'vgg', 'squeeze'))
    add('--pairs-per-class', type=int, default=100)
    add('--img-size', type=int, help='size that images are brought to (that of the CNN; 224 for LPIPS)')
    add('--batch-size', type=int, default=32, help='pairs at a time')
    add('--seed', type=int, default=0, help='of the choice of pairs')
    add('--device', help='cuda, cpu, ... (the accelerator there is, else the CPU)')
    add('--output', metavar='FILE', help='write the figures as JSON (writes no file)')
    add('--overwrite', action='store_true', help='replace the file if it exists')


def run(args: argparse.Namespace) -> None:
    """The command: a table with a row for each folder."""
    check_counts(args, 'pairs_per_class', 'batch_size', 'img_size')
    check_overwrite([Path(args.output)] if args.output else [], args.overwrite)
    device = find_device(args.device)
    distance: Any
    if args.model:
        distance = FeatureDistance(create_teacher(args.model, args.checkpoint, device=device), args.model)
    else:
        distance = LPIPSDistance(args.lpips_net, device)
    results = {
        folder: measure_diversity(
            folder, distance, args.img_size or distance.img_size, distance.in_chans, args.pairs_per_class,
            args.batch_size, args.seed)
        for folder in args.folders
    }
    print(f'| images | {distance.name} | standard error | classes | pairs |\n| --- | --- | --- | --- | --- |')
    for folder, result in results.items():
        stderr = '' if result['stderr'] is None else f'{result["stderr"]:.3f}'
        print(f'| {folder} | {result["mean"]:.3f} | {stderr} | {len(result["classes"])} | {result["pairs"]} |')
    if args.output:
        content = json.dumps(dict(metric=distance.name, folders=results), indent=1)
        write_bytes(Path(args.output), content.encode())
