"""How far the heads look: the mean distance between a query patch and what it attends to (figure 4)."""
import argparse
import csv
import io
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from timm.layers import Attention

from distill_hooks import create_teacher
from timm_dearkd.attention import ConvAttention
from timm_dearkd.engine.device import select_device
from timm_dearkd.engine.output import write_bytes

__all__ = ['attention_distances', 'attention_weights', 'mean_distances', 'plot_distances']


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
    layers: List[Any] = [getattr(block, 'attn', None) for block in getattr(model, 'blocks', ())]
    if not layers or not all(isinstance(layer, Attention) for layer in layers):
        raise ValueError(
            f'{type(model).__name__} has no blocks with timm\'s Attention. Attention distance is for vision'
            ' transformers such as dearkd_tiny_patch16_224 or deit_tiny_patch16_224.')
    grid_size = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))  # type: ignore[union-attr, operator]
    results: List[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args: results.append(mean_distances(attention_weights(module, args[0]), grid_size)))
        for layer in layers
    ]
    training = model.training
    try:
        model.eval()(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return torch.stack(results)


def load_images(model: nn.Module, folder: str, count: int) -> torch.Tensor:
    """Images (count, C, H, W) of an image folder, spread over its classes, as a model takes them in validation.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: A folder without images.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'No folder {folder!r}. Give one with images.')
    config = resolve_model_data_config(model)
    mode = 'L' if config['input_size'][0] == 1 else 'RGB'
    try:
        dataset = ImageDataset(folder, transform=create_transform(**config), input_img_mode=mode)
    except RuntimeError as e:
        raise ValueError(f'{folder!r} holds no images.') from e
    places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    return torch.stack([dataset[place][0] for place in places])


def plot_distances(distances: Dict[str, torch.Tensor], patch_size: int) -> bytes:
    """A PNG: every head as a point over its layer, and a line through the means, for each model.

    Args:
        distances: (layers, heads) by name, in patches.
        patch_size: Pixels of a patch, for the second axis.

    Raises:
        ValueError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ValueError('The picture needs matplotlib: pip install "timm-dearkd[analysis]".') from e

    def pixels(values: Any) -> Any:
        return values * patch_size

    def patches(values: Any) -> Any:
        return values / patch_size

    figure = Figure(figsize=(7, 4), layout='constrained')
    axes = figure.subplots()
    for i, (name, values) in enumerate(distances.items()):
        layers = range(1, len(values) + 1)
        for layer, heads in zip(layers, values.tolist()):
            axes.scatter([layer] * len(heads), heads, s=8, alpha=0.4, color=f'C{i}')
        axes.plot(layers, values.mean(dim=1).tolist(), marker='o', color=f'C{i}', label=name)
    axes.set(xlabel='layer', ylabel='mean attention distance, patches', ylim=(0, None))
    axes.secondary_yaxis('right', functions=(pixels, patches)).set_ylabel('pixels')
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    return buffer.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add('images', metavar='FOLDER', help='image folder: one folder per class')
    add('--model', required=True, nargs='+', metavar='NAME', help='ViTs: timm names, local-dir: or run folders')
    add('--checkpoint', metavar='FILE', help='weights of the first (their pretrained ones)')
    add('--num-images', type=int, default=64)
    add('--device', help='cuda, cpu, ... (the accelerator there is, else the CPU)')
    add('--output', default='attention_distance', metavar='PREFIX', help='writes PREFIX.csv and PREFIX.png')


def write_csv(distances: Dict[str, torch.Tensor], patch_size: int) -> bytes:
    """Rows of model, layer, head, distance in patches and in pixels."""
    text = io.StringIO(newline='')
    writer = csv.writer(text)
    writer.writerow(['model', 'layer', 'head', 'patches', 'pixels'])
    for name, values in distances.items():
        for layer, heads in enumerate(values.tolist(), start=1):
            for head, value in enumerate(heads, start=1):
                writer.writerow([name, layer, head, f'{value:.4f}', f'{value * patch_size:.2f}'])
    return text.getvalue().encode()


def run(args: argparse.Namespace) -> None:
    """The command: a CSV, a picture, and the means by layer."""
    if args.num_images < 1:
        raise ValueError(f'--num-images {args.num_images}, expected 1 or more.')
    device, _ = select_device(args.device)
    distances: Dict[str, torch.Tensor] = {}
    for i, name in enumerate(args.model):
        model: Any = create_teacher(name, args.checkpoint if i == 0 else None, device=device)
        batches = load_images(model, args.images, args.num_images).split(16)
        sums: Any = sum(attention_distances(model, batch.to(device)).cpu() * len(batch) for batch in batches)
        distances[name] = sums / sum(map(len, batches))
    patch_size = model.patch_embed.patch_size[0]
    prefix = Path(args.output)
    write_bytes(prefix.with_name(f'{prefix.name}.csv'), write_csv(distances, patch_size))
    write_bytes(prefix.with_name(f'{prefix.name}.png'), plot_distances(distances, patch_size))
    for name, values in distances.items():
        print(f'{name}: ' + ' '.join(f'{value:.2f}' for value in values.mean(dim=1).tolist()) + ' patches by layer')
    print(f'{prefix}.csv, {prefix}.png')
