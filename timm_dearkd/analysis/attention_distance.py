"""Mean attention distance of each layer and head (figure 4), as CSV and plot."""
import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch

from timm_dearkd.commands import POSITIVE_INT
from timm_dearkd.distances import LOG_NAME, DistanceHistory, attention_distances, attention_layers, read_log
from timm_dearkd.files import write_bytes, write_table

from .figures import escape_label, new_figure, plot_series, render, shade_stage2
from .inputs import add_model_arguments, load_images, load_model, output_files
from .runs import open_run


def plot_distances(distances: Dict[str, torch.Tensor], patch_sizes: Sequence[int]) -> Any:
    """Plot each head as a point over its layer, and the mean of each layer as a line.

    Args:
        distances: (layers, heads) in patches, by model name.
        patch_sizes: Patch size of each model in pixels. If they are equal, a second axis shows pixels.
    """
    figure, ((axes,),) = new_figure()
    for i, (name, values) in enumerate(distances.items()):
        layers = range(1, len(values) + 1)
        for layer, heads in zip(layers, values.tolist()):
            axes.scatter([layer] * len(heads), heads, s=8, alpha=0.4, color=f'C{i}')
        axes.plot(layers, values.mean(dim=1).tolist(), marker='o', color=f'C{i}', label=escape_label(name))
    axes.set(xlabel='layer', ylabel='mean attention distance, patches', ylim=(0, None))
    if len(set(patch_sizes)) == 1:
        _add_pixels(axes, patch_sizes[0])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def plot_over_epochs(history: DistanceHistory, stage2_start: Optional[int] = None) -> Any:
    """Plot each layer's mean over its heads by epoch, with stage II shaded.

    Args:
        history: See `read_log`.
        stage2_start: First epoch of stage II; None if the run did not reach it.
    """
    from matplotlib import colormaps

    log = history.epochs
    figure, ((axes,),) = new_figure()
    layers = sorted({layer for by_layer in log.values() for layer in by_layer})
    shade_stage2(axes, stage2_start, min(log), max(log))
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
    """Add the options of the tool."""
    add = parser.add_argument
    add('images', metavar='FOLDER',
        help='image folder; without --model, folder of a run with --track-attention-distance')
    add_model_arguments(parser, 'attention_distance', required=False)
    add('--num-images', type=POSITIVE_INT, metavar='N', help='images to average over (default: 64)')


def _rows(distances: Dict[str, torch.Tensor], patch_sizes: Sequence[int]) -> List[Sequence[Any]]:
    """Return the CSV rows: model, layer, head, distance in patches and in pixels."""
    return [('model', 'layer', 'head', 'patches', 'pixels')] + [
        (name, layer, head, f'{value:.4f}', f'{value * patch_size:.2f}')
        for (name, values), patch_size in zip(distances.items(), patch_sizes)
        for layer, heads in enumerate(values.tolist(), start=1) for head, value in enumerate(heads, start=1)]


def run(args: argparse.Namespace) -> None:
    """Write a CSV and a plot; print the means by layer."""
    new_figure()  # fails before the long work if matplotlib is missing
    if not args.model:
        _run_over_epochs(args)
        return
    if len(set(args.model)) < len(args.model):
        raise ValueError('--model has the same name twice. Name each model once.')
    table, picture = output_files(args, 'attention_distance', args.model[0], '.csv', '.png')
    distances: Dict[str, torch.Tensor] = {}
    patch_sizes = []
    for i, name in enumerate(args.model):
        model = load_model(name, args.checkpoint if i == 0 else None, args.device)
        attention_layers(model)
        device = next(model.parameters()).device
        batches = load_images(model, args.images, args.num_images or 64).split(16)
        sums: Any = sum(attention_distances(model, batch.to(device)).cpu() * len(batch) for batch in batches)
        distances[name] = sums / sum(map(len, batches))
        patch_sizes.append(model.patch_embed.feat_ratio())
    write_table(table, _rows(distances, patch_sizes))
    write_bytes(picture, render(plot_distances(distances, patch_sizes)))
    for name, values in distances.items():
        print(f'{name}: ' + ' '.join(f'{value:.2f}' for value in values.mean(dim=1).tolist()) + ' patches by layer')
    print(f'{table}, {picture}')


def _run_over_epochs(args: argparse.Namespace) -> None:
    for flag in ('checkpoint', 'num_images', 'device'):
        if getattr(args, flag) is not None:
            raise ValueError(f'--{flag.replace("_", "-")} needs a model to measure. Add --model NAME.')
    log = read_log(args.images)
    if not log:
        raise ValueError(
            f'{args.images!r} has no {LOG_NAME}, which train.py --track-attention-distance writes. To measure on an'
            ' image folder, add --model NAME.')
    picture, = output_files(args, 'attention_distance', args.images, '.png')
    figure = plot_over_epochs(log, open_run(args.images).stage2_start)
    write_bytes(picture, render(figure))
    print(f'{len(log.epochs)} epochs. {Path(args.images) / LOG_NAME}, {picture}')
