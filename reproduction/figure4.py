"""Figure 4 of the report: how far the layers look over the epochs, of the runs that recorded it."""
import statistics
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from reproduction.cells import FIGURE4, STAGE1, Cell, Scale
from reproduction.results import Figure, Results
from reproduction.significance import judge_change
from timm_dearkd.analysis.attention_distance import plot_over_epochs
from timm_dearkd.analysis.figures import render
from timm_dearkd.distances import DistanceHistory, read_log
from timm_dearkd.files import write_bytes

__all__ = ['write_figure4']


def layer_means(history: DistanceHistory, epoch: int) -> List[float]:
    """Attention distance of each layer in patches, a mean over its heads, after an epoch, counted from 1."""
    return [statistics.mean(heads) for _, heads in sorted(history.epochs[epoch - 1].items())]


def stage1_epochs(scale: Scale, cell: Cell) -> int:
    """Epochs in which a run has a teacher."""
    flag = '--dearkd-stage1-epochs'
    return int(cell.argv[cell.argv.index(flag) + 1]) if flag in cell.argv else scale.epochs


def read_histories(scale: Scale, found: Results, results: Path) -> Dict[str, Dict[int, DistanceHistory]]:
    """Complete ones by name and seed."""
    histories: Dict[str, Dict[int, DistanceHistory]] = {}
    for name, entry in zip(FIGURE4, found.tables['figure4'].entries):
        for cell in entry.cells:
            history = read_log(results / f'{cell.name}.distances.csv') if cell.name in found.cells else None
            if history is not None and set(range(scale.epochs)) <= set(history.epochs):
                histories.setdefault(name, {})[cell.seed] = history
    return histories


def write_figure4(scale: Scale, found: Results, results: Path, folder: Path, root: Path) -> List[str]:
    """Lines of the report: distances, how they change in stage II, and pictures, which go into a folder."""
    runs = read_histories(scale, found, results)
    if not runs:
        return []
    half, most, last = round(scale.epochs / 2), round(scale.epochs * STAGE1), scale.epochs
    taught = int(scale.hooks[0].split(':')[0])  # the block that learns from the CNN's features
    depths: Dict[str, Optional[int]] = {'all layers': None, f'the first {taught} layers, which the CNN teaches': taught}

    def mean_at(name: str, epoch: int, depth: Optional[int]) -> Dict[int, float]:
        return {seed: statistics.mean(layer_means(history, epoch)[:depth])
                for seed, history in runs.get(name, {}).items()}

    def change(late: Tuple[str, int], early: Tuple[str, int], depth: Optional[int]) -> Figure:
        first, second = mean_at(*late, depth), mean_at(*early, depth)
        return Figure({seed: first[seed] - second[seed] for seed in first.keys() & second.keys()}, 3)

    lines, pictures = [], []
    ends = dict(zip(FIGURE4, (stage1_epochs(scale, entry.cells[0]) for entry in found.tables['figure4'].entries)))
    for name, by_seed in runs.items():
        seed, history = min(by_seed.items())
        told = '; '.join(
            f'after {moment} ' + ', '.join(f'{distance:.2f}' for distance in layer_means(history, epoch))
            for moment, epoch in (
                ('the first epoch', 1), (f'epoch {half}', half), (f'epoch {most}', most), ('the last', last)))
        lines.append(f'- {FIGURE4[name]}, patches by layer (seed {seed}): {told}.')
        picture = folder / f'figure4-{name}.png'
        write_bytes(picture, render(plot_over_epochs(history, ends[name] if ends[name] < last else None)))
        pictures += [f'![Attention distance of {FIGURE4[name]}]({picture.relative_to(root).as_posix()})', '']
    for layers, depth in depths.items():
        for end in (half, most):
            told = ', '.join(f'{FIGURE4[name]} {change((name, last), (name, end), depth)}' for name in runs)
            lines.append(f'- Change from epoch {end} to the last, a mean over {layers}: {told}.')
        for name in runs:
            if ends[name] < last:
                lines += judge_change(f'{FIGURE4[name]}: the distance grows after stage I, a mean over {layers}',
                                      change((name, last), (name, ends[name]), depth), 'patches')
        lines += judge_change(
            f'Without the CNN from epoch {half} on, the student looks further in the end than with it, to which it is'
            f' the same until then, a mean over {layers}', change(('stage50_ce', last), ('mhca_hidden', last), depth),
            'patches')
    return [*lines, '', *pictures]
