"""Attention distances of the heads of a ViT (figure 4), and their log by epoch."""
import csv
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union

import torch
import torch.nn as nn
from timm.layers import Attention
from timm.utils import unwrap_model

from .attention import ConvAttention
from .rel_pos import AdaptiveRelPos

LOG_NAME = 'attention_distance.csv'
Result = TypeVar('Result')
LOG_HEADER = ('epoch', 'layer', 'head', 'patches', 'pixels')


def attention_weights(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """Return the attention after the softmax, which fused kernels do not return.

    Args:
        attention: timm's `Attention`, or `ConvAttention`.
        x: Tokens (B, T, dim), the input of its `forward`.

    Returns:
        (B, heads, T, T).
    """
    if isinstance(attention, ConvAttention):
        return attention.attention_scores(x)[2].float().softmax(dim=-1)
    qkv = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
    return ((q * attention.scale) @ k.transpose(-2, -1)).float().softmax(dim=-1)


def mean_distances(weights: torch.Tensor, grid_size: Tuple[int, int]) -> torch.Tensor:
    """Return the mean distance from query to key patch, weighted by attention.

    Args:
        weights: Attention (B, heads, T, T), with the patches as last tokens. Other tokens, such as [CLS], are skipped
            as queries and as keys, and each query's attention to the patches is normalised to a sum of 1 (our choice).
        grid_size: Rows and columns of patches.

    Returns:
        Distances (heads,) in patches.
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
    """Return the attention of every block of a ViT.

    Raises:
        ValueError: If the model has no blocks with timm's `Attention`, or no grid of patches.
    """
    layers: List[Any] = [getattr(block, 'attn', None) for block in getattr(model, 'blocks', ())]
    has_grid = hasattr(getattr(model, 'patch_embed', None), 'dynamic_feat_size')
    if not layers or not has_grid or not all(isinstance(layer, Attention) for layer in layers):
        raise ValueError(
            f"{type(model).__name__} has no blocks with timm's Attention on a grid of patches. Choose a vision"
            ' transformer such as dearkd_tiny_patch16_224 or deit_tiny_patch16_224.')
    return layers


@torch.no_grad()
def read_attention(
        model: nn.Module,
        images: torch.Tensor,
        layers: Sequence[nn.Module],
        read: Callable[[Any, torch.Tensor], Result],
) -> List[Result]:
    """Run a model in eval mode. Call `read(layer, tokens)` on the input (B, T, C) of layers, and return the results."""
    results: List[Result] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: results.append(read(module, args[0]))) for layer in layers]
    training = model.training
    try:
        model.eval().forward(images)  # forward(): a compiled call would not run the hooks
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return results


def attention_distances(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Compute the mean attention distance of every layer and head of a ViT.

    Args:
        model: A timm `VisionTransformer`, with or without MHCA.
        images: Normalised images (B, C, H, W).

    Returns:
        Distances (layers, heads) in patches.

    Raises:
        ValueError: If the model has no blocks with timm's `Attention`.
    """
    layers = attention_layers(model)
    grid_size = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))  # type: ignore[union-attr, operator]
    return torch.stack(read_attention(
        model, images, layers, lambda layer, tokens: mean_distances(attention_weights(layer, tokens), grid_size)))


class DistanceLog:
    """Log of a model's attention distances on a fixed batch, by epoch.

    The file is `attention_distance.csv` in the folder of the run.

    Args:
        folder: Output folder of the run.
        model: The model, with or without wrappers. Training may change it between records.
        images: Normalised images (B, C, H, W) on the device.
        autocast: Returns the context of the forward.

    Raises:
        ValueError: If the model has no blocks with timm's `Attention`.
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
        for position, grid in zip(positions, grids):  # only this process changed the grid, and DDP compares buffers
            position.set_grid_size(*grid)
        pixels = self.model.patch_embed.feat_ratio()
        is_new = not self.path.exists() or not self.path.stat().st_size
        with open(self.path, 'a', newline='') as f:
            writer = csv.writer(f)
            writer.writerows([LOG_HEADER] if is_new else [])
            writer.writerows(
                [epoch, layer, head, f'{value:.4f}', f'{value * pixels:.2f}']
                for layer, heads in enumerate(distances, start=1) for head, value in enumerate(heads, start=1))


class DistanceHistory(NamedTuple):
    """Distances in patches by epoch, layer and head, and the patch size in pixels."""
    epochs: Dict[int, Dict[int, List[float]]]
    patch_size: float


def read_log(path: Union[str, Path]) -> Optional[DistanceHistory]:
    """Read the complete epochs of a `DistanceLog`. Return None if there are none.

    Args:
        path: File of the log, or folder of the run.
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
                except (KeyError, TypeError, ValueError):  # an incomplete line
                    continue
                epochs.setdefault(epoch, {}).setdefault(layer, []).append(patches)
                sums = [sums[0] + patches, sums[1] + pixels]
    counts = {epoch: sum(map(len, layers.values())) for epoch, layers in epochs.items()}
    whole = {epoch: layers for epoch, layers in epochs.items() if counts[epoch] == max(counts.values())}
    return DistanceHistory(whole, round(sums[1] / sums[0], 1) if sums[0] else 1.) if whole else None
