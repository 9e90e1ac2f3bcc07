"""Write RESULTS.md and its plots out of the files in reproduction/results: `python reproduction/report.py`."""
import argparse
import math
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from reproduction.cells import FIGURE4, METHODS, SCALES, Scale, teacher_cell  # noqa: E402
from reproduction.run import definition, read_result, weights_hash  # noqa: E402
from reproduction.table import Entry, Table  # noqa: E402
from reproduction.tables import tables_of  # noqa: E402
from timm_dearkd.analysis.attention_distance import DistanceHistory, plot_over_epochs, read_log  # noqa: E402
from timm_dearkd.analysis.figures import new_figure, render  # noqa: E402
from timm_dearkd.files import write_bytes  # noqa: E402

# Two-sided 95 % quantiles of Student's t by degrees of freedom
T_QUANTILES = {
    1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 12: 2.18, 15: 2.13,
    20: 2.09, 30: 2.04, 60: 2.00}
Key = Tuple[str, str]


def t_quantile(degrees: float) -> float:
    """Of that many degrees of freedom, or of the next lower number in the table."""
    return T_QUANTILES[max(n for n in T_QUANTILES if n <= degrees + 1e-6)]


class Figure(NamedTuple):
    """The figures of an entry by seed, and the digits that they are printed with."""
    by_seed: Dict[int, float]
    digits: int

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_seed.values())

    @property
    def error(self) -> Optional[float]:
        """Standard error of the mean; None for one seed."""
        values = self.by_seed.values()
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

    def __str__(self) -> str:
        if self.error is None:
            return f'{self.mean:.{self.digits}f} (1 seed)'
        seeds = f' ({len(self.by_seed)} seeds)' if len(self.by_seed) != 3 else ''
        return f'{self.mean:.{self.digits}f} ± {self.error:.{self.digits}f}{seeds}'


class Results:
    """Figures by cell.

    Args:
        scale: Of the experiments.
        folder: Of the JSON files.
        seeds: That may be there.
    """

    def __init__(self, scale: Scale, folder: Path, seeds: Sequence[int]) -> None:
        self.tables = {name: make(scale, seeds) for name, make in tables_of(scale).items()}
        cells = {cell.name: cell for table in self.tables.values() for entry in table.entries for cell in entry.cells}
        teacher = teacher_cell(scale)
        if teacher is not None:
            cells[teacher.name] = teacher
        results = {name: read_result(folder / f'{name}.json') for name in cells}
        self.cells = {name: result for name, result in results.items()
                      if result is not None and result['definition'] == definition(cells[name])}
        self.stale = [name for name, result in results.items() if result is not None and name not in self.cells]

    def figure(self, entry: Entry) -> Optional[Figure]:
        """Of the cells that are there; None without any."""
        by_seed = {
            cell.seed: self.cells[cell.name][entry.key] for cell in entry.cells
            if entry.key in self.cells.get(cell.name, {})}
        return Figure(by_seed, entry.digits) if by_seed else None

    def mixed_seeds(self, name: str) -> List[str]:
        """Seeds of a table, of each column of table 2, whose figures are of students of different teachers."""
        teachers: Dict[str, Set[str]] = {}
        for entry in self.tables[name].entries:
            for cell in entry.cells:
                if 'teacher' in self.cells.get(cell.name, {}):
                    place = f'{cell.seed}' + (f' at {entry.column}' if name == 'table2' else '')
                    teachers.setdefault(place, set()).add(self.cells[cell.name]['teacher'])
        return [place for place, found in teachers.items() if len(found) > 1]

    def figures(self, table: Table) -> Dict[Key, Figure]:
        """Figures by row and column."""
        found = {(entry.row, entry.column): self.figure(entry) for entry in table.entries}
        return {key: figure for key, figure in found.items() if figure is not None}


class Gap(NamedTuple):
    """A difference, and half of its 95 % interval; not a number where nothing is known of the noise."""
    value: float
    margin: float

    def verdict(self) -> str:
        """Whether it is above 0, where there is a margin."""
        if abs(self.value) > self.margin:
            return 'holds' if self.value > 0 else '**does not hold, the other way round**'
        return f'not to be told from the noise, leaning {"this way" if self.value > 0 else "the other way"}'

    def text(self, digits: int) -> str:
        margin = f' ± {self.margin:.{digits}f}' if math.isfinite(self.margin) else ''
        return f'{self.value:+.{digits}f}{margin}'


class Noise(NamedTuple):
    """Variance of a figure from seed to seed, and its degrees of freedom."""
    variance: float
    degrees: int


def measure_noise(figures: Sequence[Figure], paired: bool) -> Noise:
    """That of figures that are alike, by least squares; not a number where all have but one seed.

    Args:
        figures: Each has a mean of its own.
        paired: Each seed has an effect of its own too, the same on all figures (a randomised block design).
    """
    observed = [(i, seed, value) for i, figure in enumerate(figures) for seed, value in figure.by_seed.items()]
    blocks = sorted({seed for _, seed, _ in observed}) if paired else []
    values = np.array([value for *_, value in observed])
    design = np.array([
        [float(i == row) for row in range(len(figures))] + [float(seed == block) for block in blocks]
        for i, seed, _ in observed])
    residuals = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    degrees = len(values) - int(np.linalg.matrix_rank(design))
    return Noise(float(residuals @ residuals) / degrees if degrees else math.nan, degrees)


def measure(table: Table, figures: Dict[Key, Figure], factors: Dict[Key, float]) -> Gap:
    """A sum of a table's means with factors, by Welch's t.

    Figures that are alike are compared by the seeds that they share.
    """
    alike: Dict[str, Dict[Key, Figure]] = {}
    for entry in table.entries:
        key = (entry.row, entry.column)
        if key in figures:
            alike.setdefault(entry.noise, {})[key] = figures[key]
    value, parts = 0., []
    for group in alike.values():
        used = {key: factor for key, factor in factors.items() if key in group}
        if not used:
            continue
        shared = set.intersection(*(set(group[key].by_seed) for key in used))
        paired = math.isclose(sum(used.values()), 0., abs_tol=1e-9) and bool(shared)
        noise = measure_noise(list(group.values()), paired)
        variance = 0.
        for key, factor in used.items():
            by_seed = group[key].by_seed
            values = [by_seed[seed] for seed in shared] if paired else list(by_seed.values())
            value += factor * statistics.mean(values)
            variance += factor ** 2 * noise.variance / len(values)
        parts.append(Noise(variance, noise.degrees))
    total = sum(part.variance for part in parts)
    if not total > 1e-12:  # nothing is known, or the figures are the same in all seeds
        return Gap(value, math.nan)
    degrees = total ** 2 / sum(part.variance ** 2 / part.degrees for part in parts)  # Welch and Satterthwaite
    return Gap(value, t_quantile(degrees) * math.sqrt(total))


def judge(table: Table, figures: Dict[Key, Figure]) -> List[str]:
    """The claims, held against the figures, as far as their noise is known."""
    lines = []
    for claim in table.claims:
        if claim.higher in figures and claim.lower in figures:
            gap = measure(table, figures, {claim.higher: 1., claim.lower: -1.})
            if math.isfinite(gap.margin):
                lines.append(f'- {claim.text}: {gap.verdict()} ({gap.text(figures[claim.higher].digits)}).')
    return lines


def judge_growth(table: Table, figures: Dict[Key, Figure]) -> List[str]:
    """Whether DearKD is further above each other method at the smallest size than at the largest."""
    dearkd, lines = METHODS['dearkd'], []
    for other in METHODS.values():
        columns = [column for row, column in figures if row == dearkd and (other, column) in figures]
        if other == dearkd or len(columns) < 2:
            continue
        first, last = columns[0], columns[-1]
        gap = measure(table, figures, {
            (dearkd, first): 1., (other, first): -1., (dearkd, last): -1., (other, last): 1.})
        if not math.isfinite(gap.margin):
            continue
        listed = ', '.join(f'{figures[dearkd, c].mean - figures[other, c].mean:+.1f} at {c}' for c in columns)
        lines.append(f'- In points, DearKD is further above "{other}" at {first} than at {last}: {gap.verdict()}'
                     f' ({gap.text(1)}; {listed}).')
    return lines


def markdown(table: Table, figures: Dict[Key, Figure]) -> List[str]:
    """The table, with the paper's figures in brackets, and the differences from a reference in a last column."""
    columns = list(dict.fromkeys(entry.column for entry in table.entries))
    paper = {(entry.row, entry.column): entry.paper for entry in table.entries}
    reference = (table.reference, columns[0])
    header = [*columns, f'against {table.reference}, ± 95 %'] if reference in figures else columns
    lines = ['| | ' + ' | '.join(header) + ' |', '| --- ' * (len(header) + 1) + '|']
    for row in dict.fromkeys(entry.row for entry in table.entries):
        cells = []
        for column in columns:
            figure, published = figures.get((row, column)), paper.get((row, column))
            cells.append((str(figure) if figure else '') + (f' [{published:g}]' if published is not None else ''))
        if reference in figures:
            key = (row, columns[0])
            known = key in figures and key != reference
            cells.append(measure(table, figures, {key: 1., reference: -1.}).text(1) if known else '')
        lines.append(f'| {row} | ' + ' | '.join(cells) + ' |')
    return lines


def plot_table2(figures: Dict[Key, Figure]) -> bytes:
    """Top-1 over the share of the images, a line for each method."""
    figure, ((axes,),) = new_figure(size=(6, 3.6))
    ticks = sorted({float(column.split()[0]) for _, column in figures})
    for method, color in zip(METHODS.values(), ('tab:gray', 'tab:green', 'tab:blue')):
        points = [(float(column.split()[0]), value) for (row, column), value in figures.items() if row == method]
        axes.errorbar(
            [share for share, _ in points], [value.mean for _, value in points],
            [value.error or math.nan for _, value in points], marker='o', capsize=3, color=color, label=method)
    axes.set(xscale='log', xticks=ticks, xticklabels=[f'{tick:g} %' for tick in ticks],
             ylabel='top-1, %, ± standard error', xlabel='training images')
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return render(figure)


def plot_table7(figures: Dict[Key, Figure]) -> bytes:
    """Top-1 over the length of stage I, a line for each kind of stage II."""
    figure, ((axes,),) = new_figure(size=(6, 3.2))
    for kind in ('anneal', 'ce'):
        points = [(float(row.split()[0]), value) for (row, column), value in figures.items()
                  if column == kind or row == '100 %']  # which has no stage II
        axes.errorbar(
            [x for x, _ in points], [value.mean for _, value in points],
            [value.error or math.nan for _, value in points], marker='o', capsize=3, label=f'stage II: {kind}')
    axes.set(xlabel='stage I, % of the epochs', ylabel='top-1, %, ± standard error')
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return render(figure)


PLOTS = {'table2': plot_table2, 'table7': plot_table7}


def layer_means(history: DistanceHistory, epoch: int) -> List[float]:
    """Attention distance of each layer in patches, a mean over its heads."""
    return [statistics.mean(heads) for _, heads in sorted(history.epochs[epoch].items())]


def describe_distances(history: DistanceHistory, moments: Dict[str, int]) -> str:
    """Those of some epochs."""
    return '; '.join(
        f'after {moment} ' + ', '.join(f'{distance:.2f}' for distance in layer_means(history, epoch))
        for moment, epoch in moments.items() if epoch in history.epochs)


def write_figure4(
        scale: Scale,
        found: Results,
        results: Path,
        folder: Path,
        root: Path,
        seeds: Sequence[int],
) -> List[str]:
    """Attention distance over the epochs, of the runs that recorded it, and how it changes in stage II."""
    lines, pictures, verdicts = [], [], []
    ends = {'stage50_ce': round(scale.epochs / 2), 'dearkd': round(scale.epochs * 5 / 6)}  # of stage I
    moments = {
        'the first epoch': 0, **{f'epoch {end}': end - 1 for end in ends.values()}, 'the last': scale.epochs - 1}
    changes: Dict[int, List[str]] = {end: [] for end in ends.values()}
    for name, label in FIGURE4.items():
        cells = {seed: f'{name}-{scale.ablation_fraction:g}-seed{seed}' for seed in seeds}
        histories = {
            seed: read_log(results / f'{cell}.distances.csv') for seed, cell in cells.items() if cell in found.cells}
        complete = {
            seed: history for seed, history in histories.items()
            if history is not None and set(moments.values()) <= set(history.epochs)}
        if not complete:
            continue
        first = complete[min(complete)]
        for end, told in changes.items():
            change = Figure({
                seed: statistics.mean(layer_means(history, scale.epochs - 1))
                - statistics.mean(layer_means(history, end - 1)) for seed, history in complete.items()}, 3)
            told.append(f'{label} {change}')
            if ends.get(name) == end and change.error is not None:
                gap = Gap(change.mean, t_quantile(len(complete) - 1) * change.error)
                verdicts.append(
                    f'- {label}: the distance grows after stage I: {gap.verdict()} ({gap.text(3)} patches).')
        lines.append(f'- {label}, patches by layer (seed {min(complete)}): {describe_distances(first, moments)}.')
        picture = folder / f'figure4-{name}.png'
        write_bytes(picture, render(plot_over_epochs(first, ends.get(name))))
        pictures += [f'![Attention distance of {label}]({picture.relative_to(root).as_posix()})', '']
    if not lines:
        return []
    return [
        *lines,
        *(f'- Change from epoch {end} to the last, a mean over the layers: {", ".join(told)}.'
          for end, told in changes.items()), *verdicts, '', *pictures]


def describe_runs(scale: Scale, found: Results, results: Path) -> List[str]:
    """What all figures have in common."""
    cells = found.cells.values()
    hours = sum(cell['seconds'] * cell.get('threads', 1) for cell in cells) / 3600
    teacher = found.cells.get('teacher', {}).get('top1')
    agreements = [
        found.cells[cell.name]['teacher_agreement'] for entry in found.tables['table2'].entries for cell in entry.cells
        if 'teacher_agreement' in found.cells.get(cell.name, {})]
    text = (
        f'Student: `{scale.student}`, {scale.epochs} epochs at every size; recipe: `{scale.recipe}`.'
        + (f' Teacher: a CNN with {teacher:.1f} % top-1.' if teacher else ''))
    if agreements:
        shares = dict.fromkeys(f'{100 * share:.0f}' for share in (min(agreements), max(agreements)))
        text += (f' That of table 2 finds the label of {" to ".join(shares)} % of the augmented images that it teaches'
                 ' its students on.')
    teachers = Counter(cell['teacher'] for cell in cells if 'teacher' in cell)
    if len(teachers) > 1:
        kept = weights_hash(results / 'teacher')
        text += ' The recipe was run more than once, and not always to the same weights: ' + ', '.join(
            f'{count} figures are of students of teacher {name}{", which is kept" if name == kept else ""}'
            for name, count in teachers.most_common()) + '. A table says where students of one seed differ in it.'
    return [
        f'Made by `python reproduction/report.py --scale {scale.name}` from the {len(cells)} files in'
        f' `reproduction/results/{scale.name}`, each of which holds its command, seed and commits'
        f' (`python reproduction/run.py all --scale {scale.name}`; {hours:.1f} hours of one core).', '',
        text, '',
        'Figures are top-1 in percent after the last epoch, a mean over three seeds unless another number is given, ±'
        ' its standard error; where not all images are used, a seed is also another choice of them. In square brackets:'
        ' the paper\'s figure, on ImageNet.', '',
        'A claim holds, or does not, where 0 is outside of the 95 % interval of the difference (Welch\'s t); where'
        ' there is no difference, that is so by chance for one in 20. The deviation from seed to seed is taken as the'
        ' same for all figures of a table (in table 2, of a column), but for those with the hidden loss, which vary'
        ' less: they have their own. So have synthetic and real images in tables 5 and 6. Figures of the same deviation'
        ' are compared by the seeds that they share, what a seed decides (images, their order, initial weights) being'
        ' taken as worth the same to all of them (a randomised block design).', '',
        *([f'Left out, as made by another definition: {", ".join(found.stale)}.', ''] if found.stale else [])]


def write_report(scale: Scale, results: Path, seeds: Sequence[int], output: Path) -> None:
    """The report, and its plots in `reproduction/plots` beside it, from what is there."""
    found, pictures = Results(scale, results, seeds), output.parent / 'reproduction' / 'plots'
    if scale.name != 'small':
        pictures /= scale.name
    lines = ['# Results', '', *describe_runs(scale, found, results)]
    for name, table in found.tables.items():
        mixed = found.mixed_seeds(name)
        heading = [f'## {table.title}', '', table.note, ''] + (
            [f'**Not all students of seed {", ".join(mixed)} have the same teacher.**', ''] if mixed else [])
        if name == 'figure4':
            figure4 = write_figure4(scale, found, results, pictures, output.parent, seeds)
            lines += [*heading, *figure4] if figure4 else []
            continue
        figures = found.figures(table)
        if not figures:
            continue
        verdicts = judge(table, figures) + (judge_growth(table, figures) if name == 'table2' else [])
        lines += [*heading, *markdown(table, figures), '', *verdicts, *([''] if verdicts else [])]
        if name in PLOTS:
            picture = pictures / f'{name}.png'
            write_bytes(picture, PLOTS[name](figures))
            lines += [f'![{table.title}]({picture.relative_to(output.parent).as_posix()})', '']
    write_bytes(output, ('\n'.join(lines).rstrip() + '\n').encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--scale', default='small', choices=list(SCALES))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--results', type=Path)
    parser.add_argument('--output', type=Path, help='RESULTS.md, or RESULTS-SCALE.md for another scale than small')
    args = parser.parse_args()
    scale = SCALES[args.scale]
    output = args.output or ROOT / ('RESULTS.md' if scale.name == 'small' else f'RESULTS-{scale.name}.md')
    write_report(scale, args.results or ROOT / 'reproduction' / 'results' / scale.name, args.seeds, output)
    print(output)


if __name__ == '__main__':
    main()
