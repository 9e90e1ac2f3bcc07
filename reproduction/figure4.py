"""Write figure 4 of the report: the attention distance of the layers over the epochs."""
import math
import statistics
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from reproduction.cells import FIGURE4, STAGE1, Cell, Scale
from reproduction.results import Figure, Results
from reproduction.significance import Estimate, Finding, measure_change
from timm_dearkd.analysis.attention_distance import plot_over_epochs
from timm_dearkd.analysis.figures import render
from timm_dearkd.distances import DistanceHistory, read_log
from timm_dearkd.files import write_bytes

Histories = Dict[str, Dict[int, DistanceHistory]]  # by name and seed
DIGITS = 3


def number(cell: Cell, flag: str, default: str = '') -> int:
    """Return the number that a cell gives to a flag."""
    return int(dict(zip(cell.argv, cell.argv[1:])).get(flag, default))


def list_runs(found: Results) -> Dict[str, Tuple[Cell, ...]]:
    """Return the cells of the figure by name; {} if the scale has no such figure."""
    labels = {label: name for name, label in FIGURE4.items()}
    return {labels[entry.row]: entry.cells for entry in found.tables['figure4'].entries} \
        if 'figure4' in found.tables else {}


def read_histories(found: Results, results: Path) -> Histories:
    """Return the complete attention distance logs."""
    histories: Histories = {}
    for name, cells in list_runs(found).items():
        for cell in cells:
            history = read_log(results / f'{cell.name}.distances.csv') if cell.name in found.cells else None
            if history is not None and set(range(number(cell, '--epochs'))) <= set(history.epochs):
                histories.setdefault(name, {})[cell.seed] = history
    return histories


class Figure4:
    """Attention distances as tables and claims.

    Args:
        scale: Scale of the experiments.
        found: Results.
        results: Folder of the logs.
    """

    def __init__(self, scale: Scale, found: Results, results: Path) -> None:
        self.runs = read_histories(found, results)
        cells = {name: cells[0] for name, cells in list_runs(found).items()}
        self.last = {name: number(cell, '--epochs') for name, cell in cells.items()}
        self.ends = {name: number(cell, '--dearkd-stage1-epochs', str(self.last[name]))  # epochs with a teacher
                     for name, cell in cells.items()}
        taught = int(scale.hooks[0].split(':')[0])  # the block that learns from the CNN's features
        self.depths: Dict[str, Optional[int]] = {'all layers': None, f'layers 1 to {taught}': taught}

    def layers(self, name: str, epoch: int) -> Dict[int, List[float]]:
        """Return the distances by seed and layer, means over heads in patches, after an epoch counted from 1."""
        return {seed: [statistics.mean(heads) for _, heads in sorted(history.epochs[epoch - 1].items())]
                for seed, history in self.runs.get(name, {}).items()}

    def late(self, name: str) -> Dict[str, int]:
        """Return the epochs from which the changes of a run are told."""
        return {'last half': round(self.last[name] / 2), 'last sixth': round(self.last[name] * STAGE1)}

    def compare(self, late: Tuple[str, int], early: Tuple[str, int], depth: Optional[int]) -> Tuple[str, Estimate]:
        """Return the two distances and their difference, on the seeds that both runs share."""
        first, second = ({seed: statistics.mean(layers[:depth]) for seed, layers in self.layers(*moment).items()}
                         for moment in (late, early))
        shared = sorted(first.keys() & second.keys())
        if not shared:
            return '', Estimate(math.nan, math.nan, {})
        here = ' vs. '.join(f'{statistics.mean(by_seed[seed] for seed in shared):.{DIGITS}f}'
                            for by_seed in (first, second))
        return here, measure_change(Figure({seed: first[seed] - second[seed] for seed in shared}, DIGITS))

    def findings(self) -> List[Finding]:
        """Test whether the distance grows after stage I, and whether it ends higher than without stage II."""
        findings, staged = [], [name for name in self.runs if self.ends[name] < self.last[name]]
        for layers, depth in self.depths.items():
            tests = [
                (f'{FIGURE4[name]}: attention distance after training > after stage I, {layers}',
                 name == 'dearkd', (name, self.last[name]), (name, self.ends[name]))
                for name in staged]
            tests += [
                (f'{FIGURE4[name]}: attention distance after training > without stage II, {layers}', False,
                 (name, self.last[name]), (one_stage, self.last[one_stage]))
                for name, one_stage in (
                    ('stage50_ce', 'mhca_hidden'), ('longer_pupil_stage50_anneal', 'longer_pupil_mhca_hidden'))
                if name in self.last]
            for text, of_paper, late, early in tests:
                here, difference = self.compare(late, early, depth)
                if math.isfinite(difference.margin):
                    findings.append(Finding(
                        text, 'grows in stage II' if of_paper else '', here, difference, DIGITS, of_paper))
        return findings

    def distances(self) -> List[str]:
        """Return the lines of a table of the distances by layer."""
        layers = range(1, 1 + max(len(found) for name in self.runs for found in self.layers(name, 1).values()))
        lines = ['Attention distance in patches, mean over heads and seeds:', '',
                 '| | epoch | ' + ' | '.join(f'layer {layer}' for layer in layers) + ' |',
                 '| --- ' * (2 + len(layers)) + '|']
        for name in self.runs:
            for epoch in (1, *self.late(name).values(), self.last[name]):
                means = [f'{statistics.mean(column):.2f}' for column in zip(*self.layers(name, epoch).values())]
                lines.append(f'| {FIGURE4[name]} | {epoch} | ' + ' | '.join(means) + ' |')
        return [*lines, '']

    def changes(self) -> List[str]:
        """Return the lines of a table of the changes late in training."""
        spans = [(span, layers, depth) for span in ('last half', 'last sixth') for layers, depth in self.depths.items()]
        lines = ['Change of the distance in patches. ± is computed from the seeds of each run alone:', '',
                  '| | seeds | ' + ' | '.join(
                      f'{span} of the epochs, {layers}' for span, layers, _ in spans) + ' |',
                  '| --- ' * (2 + len(spans)) + '|']
        for name, by_seed in self.runs.items():
            changes = [
                self.compare((name, self.last[name]), (name, self.late(name)[span]), depth)[1].text(DIGITS)
                for span, _, depth in spans]
            lines.append(f'| {FIGURE4[name]} | {len(by_seed)} | ' + ' | '.join(changes) + ' |')
        return [*lines, '']

    def plots(self, folder: Path, root: Path, names: Sequence[str]) -> List[str]:
        """Write a plot of the first seed of these runs, and return the lines that show them."""
        lines = []
        for name in names:
            if name not in self.runs:
                continue
            seed, history = min(self.runs[name].items())
            picture, end = folder / f'figure4-{name}.png', self.ends[name]
            write_bytes(picture, render(plot_over_epochs(history, end if end < self.last[name] else None)))
            lines += [f'{FIGURE4[name]}, seed {seed}:', '',
                      f'![Attention distance of {FIGURE4[name]}]({picture.relative_to(root).as_posix()})', '']
        return lines
