"""Attention maps of each head on an image: content, position and their sum."""
import argparse
import json
import math
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.layers import Attention
from torchvision.transforms.functional import to_pil_image

from distill_hooks.teacher import input_normalisation
from timm_dearkd.attention import ConvAttention
from timm_dearkd.commands import POSITIVE_INT
from timm_dearkd.distances import attention_layers, attention_weights, read_attention
from timm_dearkd.files import write_bytes, write_text

from .figures import new_figure, render
from .inputs import add_model_arguments, image_transform, load_model, open_image, output_files


def _parts(attention: Attention, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Return the attention (heads, T, T) of tokens (1, T, dim), by kind of score."""
    if not isinstance(attention, ConvAttention):
        return {'content': attention_weights(attention, x)[0]}
    content, position, total = attention.attention_scores(x)
    parts = {'content': content[0], 'position': position, 'sum': total[0]}
    return {name: scores.float().softmax(dim=-1) for name, scores in parts.items()}


@torch.no_grad()
def attention_maps(
        model: nn.Module,
        image: torch.Tensor,
        layer: int,
        patch: Tuple[int, int],
) -> Dict[str, torch.Tensor]:
    """Return the attention of a layer's heads from a query patch to all patches.

    Args:
        model: A timm `VisionTransformer`, DearKD's or any other.
        image: Normalised image (C, H, W).
        layer: Layer, counted from 1.
        patch: Row and column of the query patch, counted from 0.

    Returns:
        Softmax (heads, rows, columns) of the scores 'content', and for MHCA 'position' and 'sum' (Eq. 3). The softmax
        includes prefix tokens such as [CLS]; the result does not.

    Raises:
        ValueError: If the model has no such attention, layer or patch.
    """
    layers = attention_layers(model)
    if not 1 <= layer <= len(layers):
        raise ValueError(f'--layer {layer}, expected 1 to {len(layers)}.')
    rows, columns = model.patch_embed.dynamic_feat_size(tuple(image.shape[-2:]))  # type: ignore[union-attr, operator]
    if not (0 <= patch[0] < rows and 0 <= patch[1] < columns):
        raise ValueError(f'--patch {patch[0]} {patch[1]}, expected a row from 0 to {rows - 1} and a column from 0 to'
                         f' {columns - 1}.')
    found, = read_attention(model, image.unsqueeze(0), [layers[layer - 1]], _parts)
    query = patch[0] * columns + patch[1] - rows * columns  # counted from the end; patches follow the prefix tokens
    return {name: maps[:, query, -rows * columns:].unflatten(-1, (rows, columns)) for name, maps in found.items()}


def head_positions(model: nn.Module) -> Dict[int, Tuple[List[float], List[List[float]]]]:
    """Return alpha (heads,) and delta (heads, 2) by MHCA block, counted from 1.

    Delta is in patches, row and column.
    """
    return {
        number: (block.attn.rpe.alpha.tolist(), block.attn.rpe.delta.tolist())
        for number, block in enumerate(getattr(model, 'blocks', ()), start=1)
        if isinstance(getattr(block, 'attn', None), ConvAttention)
    }


def plot_maps(image: Image.Image, maps: Dict[str, torch.Tensor], patch: Tuple[int, int]) -> Any:
    """Plot the maps over the image: a row per kind of score, a column per head.

    Args:
        image: The image that the model sees, see `seen_image`.
        maps: See `attention_maps`.
        patch: Row and column of the query patch, which gets a frame.
    """
    from matplotlib.patches import Rectangle

    heads, rows, columns = next(iter(maps.values())).shape
    figure, axes = new_figure(len(maps), heads, (1.3 * heads + 0.5, 1.45 * len(maps) + 0.3))
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    for number, (row, (name, of_heads)) in enumerate(zip(axes, maps.items())):
        for head, (ax, values) in enumerate(zip(row, of_heads.cpu().numpy()), start=1):
            ax.imshow(np.asarray(image.convert('L')), cmap='gray', extent=extent)
            ax.imshow(values, cmap='inferno', alpha=0.65, vmin=0, extent=extent)
            ax.add_patch(Rectangle((patch[1] - 0.5, patch[0] - 0.5), 1, 1, fill=False, color='cyan'))
            ax.set(xticks=[], yticks=[])
            if number == 0:
                ax.set_title(f'head {head}', fontsize=8)
        row[0].set_ylabel(name)
    return figure


def plot_heads(positions: Dict[int, Tuple[List[float], List[List[float]]]]) -> Any:
    r"""Plot the offset and the width of each MHCA head, with a panel for each block.

    A head is a disc at its offset :math:`\Delta`. The radius is the deviation :math:`1 / \sqrt{2 \alpha}` of its
    positional term, in patches. A head with alpha <= 0 has no deviation and is a cross.

    Args:
        positions: See `head_positions`; not empty.
    """
    from matplotlib.patches import Circle

    columns = min(4, len(positions))
    rows = -(-len(positions) // columns)
    reach = max(
        abs(offset) + min(2., _radius(alpha)) for alphas, deltas in positions.values()
        for alpha, delta in zip(alphas, deltas) for offset in delta)
    limit = math.ceil(max(2., reach)) + 0.5
    figure, axes = new_figure(rows, columns, (2.3 * columns, 2.5 * rows), sharex=True, sharey=True)
    for ax in axes.flat[len(positions):]:
        ax.axis('off')
    for ax, (number, (alphas, deltas)) in zip(axes.flat, positions.items()):
        for head, (alpha, (y, x)) in enumerate(zip(alphas, deltas)):
            color = f'C{head % 10}'
            if alpha > 0:
                ax.add_patch(Circle((x, y), _radius(alpha), color=color, alpha=0.18, lw=0))
            ax.plot(x, y, '.' if alpha > 0 else 'x', color=color)
        ax.plot(0, 0, '+', color='black', markersize=9)
        ticks = range(-int(limit), int(limit) + 1, max(1, int(limit) // 3))
        ax.set(xlim=(-limit, limit), ylim=(limit, -limit), aspect='equal', xticks=ticks, yticks=ticks)
        ax.grid(alpha=0.3)
        ax.set_title(f'block {number}', fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel('columns', fontsize=8)
    axes[0][0].set_ylabel('rows', fontsize=8)
    return figure


def _radius(alpha: float) -> float:
    return 1 / math.sqrt(2 * alpha) if alpha > 0 else 0.


def seen_image(model: nn.Module, tensor: torch.Tensor) -> Image.Image:
    """Return a model's normalised input (C, H, W) as an image."""
    mean, std = (values.float().view(-1, 1, 1) for values in input_normalisation(model, len(tensor)))
    return to_pil_image((tensor.cpu() * std + mean).clamp(0, 1), mode=image_transform(model)[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the tool."""
    add = parser.add_argument
    add('image', metavar='IMAGE', help='image file')
    add_model_arguments(parser, 'attention_map')
    add('--layer', type=POSITIVE_INT, default=1, metavar='N', help='layer, counted from 1 (default: %(default)s)')
    add('--patch', type=int, nargs=2, metavar=('ROW', 'COLUMN'),
        help='query patch, counted from 0 (default: the middle)')


def run(args: argparse.Namespace) -> None:
    """Write plots of the maps and of the heads, and the numbers of both as JSON."""
    if len(args.model) > 1:
        raise ValueError(f'--model has {len(args.model)} names, expected one.')
    new_figure()
    files = output_files(args, 'attention_map', args.model[0], '.json', '.png', '_heads.png')
    model = load_model(args.model[0], args.checkpoint, args.device)
    transform, mode = image_transform(model)
    tensor = transform(open_image(args.image, mode))
    attention_layers(model)
    rows, columns = model.patch_embed.dynamic_feat_size(tuple(tensor.shape[-2:]))
    patch = tuple(args.patch) if args.patch else (rows // 2, columns // 2)
    maps = attention_maps(model, tensor.to(next(model.parameters()).device), args.layer, patch)
    positions = head_positions(model)
    numbers = dict(
        model=args.model[0], image=args.image, layer=args.layer, patch=patch,
        maps={name: values.tolist() for name, values in maps.items()},
        heads=[dict(layer=number, alpha=alpha, delta=delta) for number, (alpha, delta) in positions.items()])
    write_text(files[0], json.dumps(numbers))
    write_bytes(files[1], render(plot_maps(seen_image(model, tensor), maps, patch)))
    if positions:
        write_bytes(files[2], render(plot_heads(positions)))
    else:
        print(f'{args.model[0]} has no MHCA. Its attention is content only, and there is no plot of the heads.')
    print(', '.join(str(path) for path in files[:3 if positions else 2]))
