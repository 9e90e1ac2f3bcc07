"""Write RESULTS.md and its plots out of the files in reproduction/results: `python reproduction/report.py`."""
import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from reproduction.cells import METHODS, SCALES, Scale  # noqa: E402
from reproduction.figure4 import write_figure4  # noqa: E402
from reproduction.results import RESULTS, Figure, Key, Results, weights_hash  # noqa: E402
from reproduction.significance import judge, judge_growth, measure  # noqa: E402
from reproduction.table import Table  # noqa: E402
from timm_dearkd.analysis.figures import new_figure, render  # noqa: E402
from timm_dearkd.commands import run_command  # noqa: E402
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


def describe_runs(scale: Scale, found: Results, results: Path) -> List[str]:
    """What all figures have in common."""
    cells = found.cells.values()
    hours = sum(cell['seconds'] * cell.get('threads', 1) for cell in cells) / 3600
    teacher = found.cells.get('teacher', {}).get('top1')
    agreements = [
        found.cells[cell.name]['teacher_agreement'] for entry in found.tables['table2'].entries for cell in entry.cells
        if entry.row == METHODS['hard'] and 'teacher_agreement' in found.cells.get(cell.name, {})]
    text = (
        f'Student: `{scale.student}`, {scale.epochs} epochs at every size; recipe: `{scale.recipe}`.'
        + (f' Teacher: a CNN with {teacher:.1f} % top-1.' if teacher else ''))
    if agreements:
        shares = dict.fromkeys(f'{100 * share:.0f}' for share in (min(agreements), max(agreements)))
        text += (f' That of table 2 finds the label of {" to ".join(shares)} % of the augmented images that it gives'
                 ' hard labels to.')
    teachers = Counter(cell['teacher'] for cell in cells if {'teacher', 'top1'} <= set(cell))
    if len(teachers) > 1:
        kept = weights_hash(results / 'teacher')
        text += ' It was trained more than once by the same recipe, and not always to the same weights: ' + ', '.join(
            f'teacher {name}{", which is kept," if name == kept else ""} has {count} of the students'
            for name, count in teachers.most_common()) + '. A table says where its students differ in it.'
    changed = sum(any(commit.endswith('+') for commit in cell.get('commits', ())) for cell in cells)
    if changed:
        text += f' {changed} files have a "+" behind their commit: the code had changes that were not committed.'
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


def describe_teachers(found: Results, name: str) -> List[str]:
    """Where the students of a table differ in it."""
    groups = found.teachers(name)
    if len(set().union(*groups.values())) < 2:
        return []
    told = '; '.join(f'{place}: {", ".join(sorted(names))}' for place, names in groups.items())
    return [f'Not all of these students have the same teacher. {told}.', '']


def write_report(scale: Scale, results: Path, seeds: Sequence[int], output: Path) -> None:
    """The report, and its plots in `reproduction/plots` beside it, from what is there.

    Raises:
        ValueError: Nothing is.
    """
    found, pictures = Results(scale, results, seeds), output.parent / 'reproduction' / 'plots'
    if not found.cells:
        raise ValueError(f'{results} holds no results of scale {scale.name}. Run reproduction/run.py first.')
    if scale.name != 'small':
        pictures /= scale.name
    lines = ['# Results', '', *describe_runs(scale, found, results)]
    for name, table in found.tables.items():
        heading = [f'## {table.title}', '', table.note, '', *describe_teachers(found, name)]
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


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--scale', default='small', choices=list(SCALES))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--results', type=Path)
    parser.add_argument('--output', type=Path, help='RESULTS.md, or RESULTS-SCALE.md for another scale than small')
    args = parser.parse_args(argv)
    scale = SCALES[args.scale]
    output = args.output or ROOT / ('RESULTS.md' if scale.name == 'small' else f'RESULTS-{scale.name}.md')
    write_report(scale, args.results or RESULTS / scale.name, args.seeds, output)
    print(output)


if __name__ == '__main__':
    run_command('report.py', main)
