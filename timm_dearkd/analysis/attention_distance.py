"""How far the heads look: the mean distance between a query patch and what it attends to (figure 4)."""
import argparse
import csv
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import Attention
from timm.utils import unwrap_model

from timm_dearkd.attention import AdaptiveRelPos, ConvAttention
from timm_dearkd.files import write_bytes, write_table

from .figures import new_figure, plain, plot_series, render, shade_stage2
from .inputs import add_model_arguments, check_counts, load_images, load_model, output_path
from .runs import open_run

__all__ = [
    'DistanceHistory', 'DistanceLog', 'attention_distances', 'attention_weights', 'mean_distances', 'plot_distances',
    'plot_over_epochs', 'read_log',
]

LOG_NAME = 'attention_distance.csv'
LOG_HEADER = ('epoch', 'layer', 'head', 'patches', 'pixels')


def attention_weights(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """Attention after the softmax, which fused kernels do not show.

    Args:
        attention: timm's `Attention`, or ours.
        x: Tokens (B, T, dim), as its `forward` takes them.

    Returns:
        (B, heads, T, T).
    """
    if isinstance(attention, ConvAttention):
        return attention.attention_scores(x)[2].float().softmax(dim=-1)
    qkv = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
    return ((q * attention.scale) @ k.transpose(-2, -1)).float().softmax(dim=-1)


def mean_distances(weights: torch.Tensor, grid_size: Tuple[int, int]) -> torch.Tensor:
    """Distance between query and attended patch, weighted by attention, averaged over images and queries.

    Args:
        weights: Attention (B, heads, T, T), whose last tokens are the patches. The others, such as [CLS], are left out,
            as queries and as keys, and each query's attention to the patches is brought to a sum of 1 (our choice).
        grid_size: Rows and columns of patches.

    Returns:
        (heads,), in patches.
    """
    rows, columns = grid_size
    patches = rows * columns
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing='ij')
    places = torch.stack([y, x], dim=-1).reshape(patches, 2).float().to(weights.device)
    distances = torch.cdist(places, places, compute_mode='donot_use_mm_for_euclid_dist')
    weights = weights[..., -patches:, -patches:]
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return (weights * distances).sum(dim=-1).mean(dim=(0, 2))


def attention_layers(model: nn.Module) -> List[Attention]:
    layers: List[Any] = [getattr(block, 'attn', None) for block in getattr(model, 'blocks', ())]
    has_grid = hasattr(getattr(model, 'patch_embed', None), 'dynamic_feat_size')
    if not layers or not has_grid or not all(isinstance(layer, Attention) for layer in layers):
        raise ValueError(
            f"{type(model).__name__} has no blocks with timm's Attention on a grid of patches. This is for vision"
            ' transformers such as dearkd_tiny_patch16_224 or deit_tiny_patch16_224.')
    return layers


def stride(model: Any) -> int:
    """Pixels from patch to patch."""
    return int(max(model.patch_embed.feat_ratio(as_scalar=False)))


@torch.no_grad()
def attention_distances(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Mean attention distance of every layer and head of a ViT.

    Args:
        model: A timm `VisionTransformer`, DearKD's or any other.
        images: Normalised images (B, C, H, W).

    Returns:
        (layers, heads), in patches.

    Raises:
        ValueError: A model without blocks of timm's `Attention`.
    """
    layers = attention_layers(model)
    grid_size = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))  # type: ignore[union-attr, operator]
    results: List[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args: results.append(mean_distances(attention_weights(module, args[0]), grid_size)))
        for layer in layers
    ]
    training = model.training
    try:
        model.eval().forward(images)  # a compiled call would not run the hooks
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return torch.stack(results)


class DistanceLog:
    """Attention distances of a model on a fixed batch, epoch after epoch, in `attention_distance.csv` of a run.

    Args:
        folder: Output folder of the run.
        model: The model; it may be compiled, in wrappers, or trained in the meantime.
        images: Normalised images (B, C, H, W) on the device.
        autocast: Gives the context of the forward.

    Raises:
        ValueError: A model whose attention can not be seen.
    """

    def __init__(self, folder: str, model: nn.Module, images: torch.Tensor, autocast: Callable[[], Any] = nullcontext):
        self.path = Path(folder) / LOG_NAME
        self.model, self.images, self.autocast = unwrap_model(model), images, autocast
        attention_layers(self.model)

    def record(self, epoch: int) -> None:
        """Append the rows of an epoch."""
        positions = [module for module in self.model.modules() if isinstance(module, AdaptiveRelPos)]
        grids = [position.grid_size for position in positions]
        with self.autocast():
            distances = attention_distances(self.model, self.images).tolist()
        for position, grid in zip(positions, grids):  # other processes have not looked, and DDP compares buffers
            position.set_grid_size(*grid)
        pixels = stride(self.model)
        is_new = not self.path.exists() or not self.path.stat().st_size
        with open(self.path, 'a', newline='') as f:
            writer = csv.writer(f)
            writer.writerows([LOG_HEADER] if is_new else [])
            writer.writerows(
                [epoch, layer, head, f'{value:.4f}', f'{value * pixels:.2f}']
                for layer, heads in enumerate(distances, start=1) for head, value in enumerate(heads, start=1))


class DistanceHistory(NamedTuple):
    """The heads' distances in patches by epoch and layer, and the pixels of a patch."""
    epochs: Dict[int, Dict[int, List[float]]]
    patch_size: float


def read_log(path: Union[str, Path]) -> Optional[DistanceHistory]:
    """What a `DistanceLog` has written so far, without an epoch that is half written; None if there is nothing.

    Args:
        path: Its file, or the folder of the run.
    """
    path = Path(path)
    path = path / LOG_NAME if path.is_dir() else path
    epochs: Dict[int, Dict[int, List[float]]] = {}
    sums = [0., 0.]
    if path.exists():
        with open(path, newline='') as f:
            for row in csv.DictReader(f):
                try:
                    epoch, layer = int(row['epoch']), int(row['layer'])
                    patches, pixels = float(row['patches']), float(row['pixels'])
                except (KeyError, TypeError, ValueError):  # a line may be half written
                    continue
                epochs.setdefault(epoch, {}).setdefault(layer, []).append(patches)
                sums = [sums[0] + patches, sums[1] + pixels]
    counts = {epoch: sum(map(len, layers.values())) for epoch, layers in epochs.items()}
    whole = {epoch: layers for epoch, layers in epochs.items() if counts[epoch] == max(counts.values())}
    return DistanceHistory(whole, round(sums[1] / sums[0], 1) if sums[0] else 1.) if whole else None


def plot_distances(distances: Dict[str, torch.Tensor], patch_sizes: Sequence[int]) -> Any:
    """A figure: every head as a point over its layer, and a line through the means, for each model.

    Args:
        distances: (layers, heads) by name, in patches.
        patch_sizes: Of the models. If they are all the same, a second axis has the pixels.
    """
    figure, ((axes,),) = new_figure()
    for i, (name, values) in enumerate(distances.items()):
        layers = range(1, len(values) + 1)
        for layer, heads in zip(layers, values.tolist()):
            axes.scatter([layer] * len(heads), heads, s=8, alpha=0.4, color=f'C{i}')
        axes.plot(layers, values.mean(dim=1).tolist(), marker='o', color=f'C{i}', label=plain(name))
    axes.set(xlabel='layer', ylabel='mean attention distance, patches', ylim=(0, None))
    if len(set(patch_sizes)) == 1:
        _add_pixels(axes, patch_sizes[0])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def plot_over_epochs(history: DistanceHistory, stage2_start: Optional[int] = None) -> Any:
    """A figure: the mean over the heads of every layer over the epochs, stage II shaded.

    Args:
        history: See `read_log`.
        stage2_start: First epoch of stage II, if there was one.
    """
    from matplotlib import colormaps

    log = history.epochs
    figure, ((axes,),) = new_figure()
    layers = sorted({layer for by_layer in log.values() for layer in by_layer})
    shade_stage2(axes, stage2_start, max(log))
    for i, layer in enumerate(layers):
        epochs = [epoch for epoch in sorted(log) if layer in log[epoch]]
        means = [sum(log[epoch][layer]) / len(log[epoch][layer]) for epoch in epochs]
        color = colormaps['viridis'](0.25 + 0.7 * i / max(1, len(layers) - 1))
        plot_series(axes, epochs, means, color=color, label=f'layer {layer}')
    axes.set(xlabel='epoch', ylabel='mean attention distance, patches', ylim=(0, None))
    _add_pixels(axes, history.patch_size)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1.12, 0.5))
    return figure


def _add_pixels(axes: Any, patch_size: float) -> None:
    scale = axes.secondary_yaxis('right', functions=(lambda y: y * patch_size, lambda y: y / patch_size))
    scale.set_ylabel('pixels')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add('images', metavar='FOLDER',
        help='image folder, one folder per class; or the folder of a run that was trained with'
        ' --track-attention-distance, for a plot over its epochs')
    add_model_arguments(parser, 'attention_distance', required=False)
    add('--num-images', type=int, default=64)


def _rows(distances: Dict[str, torch.Tensor], patch_sizes: Sequence[int]) -> List[Sequence[Any]]:
    """Model, layer, head, distance in patches and in pixels."""
    return [('model', 'layer', 'head', 'patches', 'pixels')] + [
        (name, layer, head, f'{value:.4f}', f'{value * patch_size:.2f}')
        for (name, values), patch_size in zip(distances.items(), patch_sizes)
        for layer, heads in enumerate(values.tolist(), start=1) for head, value in enumerate(heads, start=1)]


def run(args: argparse.Namespace) -> None:
    """The command: a CSV, a picture, and the means by layer."""
    check_counts(args, 'num_images')
    new_figure()  # without matplotlib, no long work
    if not args.model:
        _run_over_epochs(args)
        return
    if len(set(args.model)) < len(args.model):
        raise ValueError('--model names a model twice.')
    distances: Dict[str, torch.Tensor] = {}
    patch_sizes = []
    for i, name in enumerate(args.model):
        model = load_model(name, args.checkpoint if i == 0 else None, args.device)
        attention_layers(model)
        device = next(model.parameters()).device
        batches = load_images(model, args.images, args.num_images).split(16)
        sums: Any = sum(attention_distances(model, batch.to(device)).cpu() * len(batch) for batch in batches)
        distances[name] = sums / sum(map(len, batches))
        patch_sizes.append(stride(model))
    write_table(output_path(args.output, '.csv'), _rows(distances, patch_sizes))
    write_bytes(output_path(args.output, '.png'), render(plot_distances(distances, patch_sizes)))
    for name, values in distances.items():
        print(f'{name}: ' + ' '.join(f'{value:.2f}' for value in values.mean(dim=1).tolist()) + ' patches by layer')
    print(f'{args.output}.csv, {args.output}.png')


def _run_over_epochs(args: argparse.Namespace) -> None:
    log = read_log(args.images)
    if not log:
        raise ValueError(
            f'{args.images!r} has no {LOG_NAME}, which train.py --track-attention-distance writes. For an image folder,'
            ' add --model NAME.')
    figure = plot_over_epochs(log, open_run(args.images).stage2_start)
    write_bytes(output_path(args.output, '.png'), render(figure))
    print(f'{len(log.epochs)} epochs. {Path(args.images) / LOG_NAME}, {args.output}.png')
