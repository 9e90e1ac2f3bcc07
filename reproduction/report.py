"""Write RESULTS.md and its plots out of the files in reproduction/results: `python reproduction/report.py`."""
import argparse
import math
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from reproduction.cells import FIGURE4, METHODS, SCALES, Scale  # noqa: E402
from reproduction.results import RESULTS, Figure, Key, Results, weights_hash  # noqa: E402
from reproduction.significance import Gap, judge, judge_growth, measure, t_quantile  # noqa: E402
from reproduction.table import Table  # noqa: E402
from timm_dearkd.analysis.attention_distance import plot_over_epochs  # noqa: E402
from timm_dearkd.analysis.figures import new_figure, render  # noqa: E402
from timm_dearkd.distances import DistanceHistory, read_log  # noqa: E402
from timm_dearkd.files import write_bytes  # noqa: E402


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
) -> List[str]:
    """Attention distance over the epochs, of the runs that recorded it, and how it changes in stage II."""
    lines, pictures = [], []
    ends = {'stage50_ce': round(scale.epochs / 2), 'dearkd': round(scale.epochs * 5 / 6)}  # of stage I
    moments = {
        'the first epoch': 0, **{f'epoch {end}': end - 1 for end in ends.values()}, 'the last': scale.epochs - 1}
    taught = int(scale.hooks[0].split(':')[0])  # the block that learns from the CNN's features
    depths = {'all layers': None, f'the first {taught} layers, which the CNN teaches': taught}
    complete: Dict[str, Dict[int, DistanceHistory]] = {}
    for name, entry in zip(FIGURE4, found.tables['figure4'].entries):
        label = entry.row
        histories = {
            cell.seed: read_log(results / f'{cell.name}.distances.csv')
            for cell in entry.cells if cell.name in found.cells}
        histories = {
            seed: history for seed, history in histories.items()
            if history is not None and set(moments.values()) <= set(history.epochs)}
        if not histories:
            continue
        complete[name] = histories
        first = histories[min(histories)]
        lines.append(f'- {label}, patches by layer (seed {min(histories)}): {describe_distances(first, moments)}.')
        picture = folder / f'figure4-{name}.png'
        write_bytes(picture, render(plot_over_epochs(first, ends.get(name))))
        pictures += [f'![Attention distance of {label}]({picture.relative_to(root).as_posix()})', '']
    if not lines:
        return []

    def mean_at(name: str, epoch: int, depth: Optional[int]) -> Dict[int, float]:
        return {seed: statistics.mean(layer_means(history, epoch - 1)[:depth])
                for seed, history in complete.get(name, {}).items()}

    for name, end in ends.items():
        for layers, depth in depths.items():
            changes = {other: difference(mean_at(other, scale.epochs, depth), mean_at(other, end, depth))
                       for other in complete}
            told = ', '.join(f'{FIGURE4[other]} {change}' for other, change in changes.items())
            lines.append(f'- Change from epoch {end} to the last, a mean over {layers}: {told}.')
            lines += claim_above_zero(
                f'{FIGURE4[name]}: the distance grows after stage I, a mean over {layers}', changes.get(name))
    end = ends['stage50_ce']
    for layers, depth in depths.items():
        last = [mean_at(name, scale.epochs, depth) for name in ('stage50_ce', 'mhca_hidden')]
        lines += claim_above_zero(
            f'Without the CNN from epoch {end} on, the student looks further in the end than with it, to which it is'
            f' the same until then, a mean over {layers}', difference(*last))
    return [*lines, '', *pictures]


def difference(first: Dict[int, float], second: Dict[int, float]) -> Figure:
    """Of figures by seed, in patches."""
    return Figure({seed: first[seed] - second[seed] for seed in first.keys() & second.keys()}, 3)


def claim_above_zero(text: str, change: Optional[Figure]) -> List[str]:
    """A claim, held against a t-test of pairs; none without two of them."""
    if change is None or len(change.by_seed) < 2 or change.error is None:
        return []
    gap = Gap(change.mean, t_quantile(len(change.by_seed) - 1) * change.error)
    return [f'- {text}: {gap.verdict()} ({gap.text(3)} patches).']


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
            figure4 = write_figure4(scale, found, results, pictures, output.parent)
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
    write_report(scale, args.results or RESULTS / scale.name, args.seeds, output)
    print(output)


if __name__ == '__main__':
    main()
