"""Diversity of the images of a class: mean LPIPS over random pairs (table 6)."""
import argparse
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Sequence, Set, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.data.model_config import resolve_input_data_config
from tqdm import tqdm

from distill_hooks import Teacher, load_model
from timm_dearkd.commands import NON_NEGATIVE_INT, POSITIVE_INT, add_device, check_overwrite
from timm_dearkd.engine.image_folder import has_class_folders, index_by_name, scan_folder
from timm_dearkd.engine.process import find_device
from timm_dearkd.files import write_text

from .inputs import open_image

_logger = logging.getLogger(__name__)

# Takes two image batches (B, C, H, W) with values from 0 to 1, and returns distances (B,)
Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LPIPSDistance:
    """LPIPS (Zhang et al., 2018); higher values mean less similar images.

    Args:
        backbone: 'alex' (our choice; the paper names none), 'vgg' or 'squeeze'. torchvision downloads its ImageNet
            weights.
        device: Device of the network.

    Raises:
        ValueError: If the `lpips` package or the weights are not available.
    """

    in_chans = 3
    img_size = 224

    def __init__(self, backbone: str = 'alex', device: Union[str, torch.device] = 'cpu') -> None:
        try:
            import lpips
            with warnings.catch_warnings():  # it uses deprecated arguments of torchvision
                warnings.simplefilter('ignore')
                self.model = lpips.LPIPS(net=backbone, verbose=False).eval().to(device)
        except (ImportError, OSError, RuntimeError) as e:
            reason = 'pip install lpips' if isinstance(e, ImportError) else f'{type(e).__name__}: {e}'
            raise ValueError(
                f'LPIPS needs the lpips package and the weights of {backbone} ({reason}). To compare the features of a'
                ' CNN instead, set --model NAME --checkpoint FILE.') from e
        self.name = f'LPIPS ({backbone})'
        self.device = device

    @torch.inference_mode()
    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return self.model(first.to(self.device), second.to(self.device), normalize=True).flatten().cpu()


class FeatureDistance:
    """Distance like LPIPS on the features of any timm CNN (our choice).

    The features of each level are normalised to unit length over the channels. Their squared differences are summed
    over channels and levels, and averaged over positions. LPIPS also has learned weights. Distances of different CNNs
    cannot be compared.

    Args:
        model: The CNN.
        name: Name of the CNN in tables and errors.

    Raises:
        ValueError: If the model does not list its feature levels, or does not take 1 or 3 channels.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        modules = {module for module, _ in model.named_modules() if module}
        levels = [level['module'] for level in getattr(model, 'feature_info', None) or ()]
        levels = [level for level in levels if level in modules]  # timm's lists can name modules that a model lacks
        if not levels:
            raise ValueError(f'--model {name} does not list its feature maps. Choose a timm CNN, such as resnet50.')
        config = resolve_input_data_config(model)
        self.in_chans: int = getattr(model, 'in_chans', len(config['mean']))
        if self.in_chans not in (1, 3):
            raise ValueError(f'--model {name} takes {self.in_chans} channels, expected 1 or 3. Choose another CNN.')
        self.img_size: int = config['input_size'][-1]
        self.name = f'squared distance of {name} features (not LPIPS)'
        self.device = next(model.parameters()).device
        unit = [0.] * self.in_chans, [1.] * self.in_chans  # images are from 0 to 1; the Teacher normalises them
        self.teacher = Teacher(model, levels, self.in_chans, *unit).to(self.device)

    @torch.inference_mode()
    def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        _, maps = self.teacher(torch.cat([first, second]).to(self.device))
        total = torch.zeros(len(first), device=self.device)
        for features in maps:
            if not isinstance(features, torch.Tensor) or features.ndim != 4:
                raise ValueError(f'{self.name}: not feature maps. Choose another --model, such as resnet50.')
            a, b = F.normalize(features.float(), dim=1, eps=1e-10).chunk(2)
            total += (a - b).square().sum(dim=1).mean(dim=(1, 2))
        return total.cpu()


def class_pairs(
        labels: Sequence[int],
        pairs_per_class: int,
        seed: int = 0,
) -> Dict[int, List[Tuple[int, int]]]:
    """Draw pairs of different images of each class, without repeats.

    Args:
        labels: Class of each image.
        pairs_per_class: Number of pairs; a class with fewer pairs gives all of them.
        seed: Random seed.

    Returns:
        Indices of the images of each pair, by class. Classes with one image are missing.
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
            # pair `number` of the sequence (0, 1), (0, 2), (1, 2), (0, 3), ...
            second = (1 + math.isqrt(1 + 8 * number)) // 2
            pairs.append((members[number - second * (second - 1) // 2], members[second]))
        result[label] = pairs
    return result


def _load(path: str, size: int, in_chans: int) -> torch.Tensor:
    """Load an image (C, size, size) from 0 to 1: resize its shorter side, crop."""
    image = open_image(path, 'L' if in_chans == 1 else 'RGB')
    scale = size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).reshape(size, size, in_chans).permute(2, 0, 1)


def _load_pairs(
        pairs: Iterable[Tuple[int, int, int]],
        paths: Sequence[str],
        img_size: int,
        in_chans: int,
        unreadable: Set[str],
) -> List[Tuple[int, torch.Tensor, torch.Tensor]]:
    """Load pairs (class, first, second) of images; skip those that cannot be read.

    Errors are added to `unreadable`, so that each one is logged once.
    """
    loaded = []
    for label, first, second in pairs:
        try:
            loaded.append((label, _load(paths[first], img_size, in_chans), _load(paths[second], img_size, in_chans)))
        except ValueError as e:
            if str(e) not in unreadable:
                _logger.warning(f'{e} Skipping its pairs.')
            unreadable.add(str(e))
    return loaded


def _find_root(folder: str) -> Path:
    """Return the place of the class folders: the folder, or `train` in it.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f'No folder {folder!r}. Give one that has a folder of images for each class.')
    return root / 'train' if has_class_folders(str(root / 'train')) else root


def measure_diversity(
        folder: str,
        distance: Distance,
        img_size: int,
        in_chans: int = 3,
        pairs_per_class: int = 100,
        batch_size: int = 32,
        seed: int = 0,
) -> Dict[str, Any]:
    """Return the mean distance between images of a class, averaged over classes.

    Images that cannot be read are skipped with a warning.

    Args:
        folder: Folder with a subfolder per class, or the output of `timm_dearkd.data_free`, whose `train` is measured.
        distance: Distance of image pairs, see `LPIPSDistance` and `FeatureDistance`.
        img_size: Side length in pixels that images are resized to.
        in_chans: Channels that images are converted to, 1 or 3.
        pairs_per_class: Random pairs of each class (our choice; the paper has 4000 in all).
        batch_size: Pairs per batch.
        seed: Random seed of the pairs.

    Returns:
        'mean', 'stderr' (over classes), 'classes' (mean by class), 'pairs' and 'images'.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If images have no class folder, no class has two images, or no image can be read.
    """
    root = _find_root(folder)
    scan = scan_folder(str(root))
    if Path() in scan.folders:
        remedy = ' Shards are not read: use --format folder.' if (root / '_info.json').exists() else ''
        raise ValueError(f'There are images in {str(root)!r} itself. Expected a folder for each class.{remedy}')
    numbers = index_by_name(scan.names)
    pairs = class_pairs([numbers[name] for _, name in scan.images], pairs_per_class, seed)
    if not pairs:
        raise ValueError(
            f'{str(root)!r} has {len(scan.images)} images and no class with two. Expected a folder for each class.')
    todo = [(label, *pair) for label, of_class in pairs.items() for pair in of_class]
    paths = [path for path, _ in scan.images]
    unreadable: Set[str] = set()
    values: Dict[int, List[float]] = {}
    batches = range(0, len(todo), batch_size)
    for start in tqdm(batches, desc=root.as_posix(), unit='batch', leave=False, mininterval=1, disable=None):
        loaded = _load_pairs(todo[start:start + batch_size], paths, img_size, in_chans, unreadable)
        if loaded:
            labels, first, second = zip(*loaded)
            for label, value in zip(labels, distance(torch.stack(first), torch.stack(second)).tolist()):
                values.setdefault(label, []).append(value)
    if not values:
        raise ValueError(f'None of the images in {str(root)!r} can be read.')
    by_class = {name: float(np.mean(values[label])) for name, label in numbers.items() if label in values}
    means = np.array(list(by_class.values()))
    return dict(
        mean=float(means.mean()),
        stderr=float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None,
        classes=by_class, pairs=sum(map(len, values.values())), images=len(scan.images))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the tool."""
    add = parser.add_argument
    add('folders', nargs='+', metavar='FOLDER', help='image folders with a folder per class, or outputs of data_free')
    add('--model', metavar='NAME', help='timm CNN whose features are compared (default: use LPIPS)')
    add('--checkpoint', metavar='FILE', help='weights of --model (default: its pretrained ones)')
    add('--lpips-net', choices=('alex', 'vgg', 'squeeze'), help='network of LPIPS (default: alex)')
    add('--pairs-per-class', type=POSITIVE_INT, default=100, metavar='N',
        help='random pairs of each class (default: %(default)s)')
    add('--img-size', type=POSITIVE_INT, metavar='N',
        help="side length in pixels that images are resized to (default: the CNN's; 224 for LPIPS)")
    add('--batch-size', type=POSITIVE_INT, default=32, metavar='N', help='pairs per batch (default: %(default)s)')
    add('--seed', type=NON_NEGATIVE_INT, default=0, help='random seed of the pairs (default: %(default)s)')
    add_device(parser)
    add('--output', metavar='FILE', help='JSON file to write the distances to (default: none)')
    add('--overwrite', action='store_true', help='replace the file if it exists')


def run(args: argparse.Namespace) -> None:
    """Print a table with a row for each folder."""
    if args.checkpoint and not args.model:
        raise ValueError('--checkpoint has weights of a CNN. Add its name, --model NAME.')
    if args.lpips_net and args.model:
        raise ValueError('--lpips-net is for LPIPS, and --model measures with a CNN instead. Remove one of them.')
    check_overwrite([Path(args.output)] if args.output else [], args.overwrite)
    for folder in args.folders:
        _find_root(folder)  # before the networks are loaded
    device = find_device(args.device)
    distance: Union[FeatureDistance, LPIPSDistance]
    if args.model:
        distance = FeatureDistance(load_model(args.model, args.checkpoint, device=device), args.model)
    else:
        distance = LPIPSDistance(args.lpips_net or 'alex', device)
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
        write_text(Path(args.output), content)
