"""Write RESULTS.md and its plots out of the files in reproduction/results: `python reproduction/report.py`."""
import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from reproduction.cells import SCALES, TABLES, Entry, Scale, Table  # noqa: E402
from timm_dearkd.analysis.attention_distance import DistanceHistory, plot_over_epochs, read_log  # noqa: E402
from timm_dearkd.analysis.figures import new_figure, render  # noqa: E402
from timm_dearkd.engine.output import write_bytes  # noqa: E402


class Figure(NamedTuple):
    """Mean over seeds, standard error of it (None for one seed), and how many seeds."""
    mean: float
    error: Optional[float]
    count: int

    def __str__(self) -> str:
        digits = 3 if self.mean < 10 else 1
        spread = f' ± {self.error:.{digits}f}' if self.error is not None else ''
        return f'{self.mean:.{digits}f}{spread}' + ('' if self.count > 1 else ' (one seed)')


class Results:
    """Figures of cells by name."""

    def __init__(self, folder: Path) -> None:
        self.cells = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob('*.json'))}

    def figure(self, entry: Entry) -> Optional[Figure]:
        """Of the cells that are there; None without any."""
        key = 'distance' if entry.column == 'distance' else 'top1'
        values = [self.cells[cell.name][key] for cell in entry.cells if cell.name in self.cells]
        if not values:
            return None
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return Figure(statistics.mean(values), error, len(values))

    def table(self, table: Table) -> Dict[str, Dict[str, Figure]]:
        """Figures by row and column."""
        rows: Dict[str, Dict[str, Figure]] = {}
        for entry in table.entries:
            figure = self.figure(entry)
            if figure:
                rows.setdefault(entry.row, {})[entry.column] = figure
        return rows


def markdown(table: Table, figures: Dict[str, Dict[str, Figure]]) -> List[str]:
    """The table, with the paper's figures in brackets."""
    columns = list(dict.fromkeys(entry.column for entry in table.entries))
    paper = {(entry.row, entry.column): entry.paper for entry in table.entries}
    lines = ['| | ' + ' | '.join(columns) + ' |', '| --- ' * (len(columns) + 1) + '|']
    for row in dict.fromkeys(entry.row for entry in table.entries):
        cells = []
        for column in columns:
            figure, ours = figures.get(row, {}).get(column), paper.get((row, column))
            cells.append((str(figure) if figure else '') + (f' [{ours:g}]' if ours is not None else ''))
        lines.append(f'| {row} | ' + ' | '.join(cells) + ' |')
    return lines


def compare(higher: Optional[Figure], lower: Optional[Figure], what: str) -> List[str]:
    """Whether a figure is above another one: yes, no, or not to be told from the spread of the seeds."""
    if higher is None or lower is None:
        return []
    gap = higher.mean - lower.mean
    errors = [figure.error for figure in (higher, lower) if figure.error is not None]
    spread = math.hypot(*errors) if len(errors) == 2 else None
    verdict = 'holds' if gap > 0 else '**does not hold**'
    if spread is None or abs(gap) < 2 * spread:
        verdict = f'{"leans that way" if gap > 0 else "leans the other way"}, within the spread of the seeds'
    return [f'- {what}: {verdict} ({gap:+.2f}{f" ± {spread:.2f}" if spread is not None else ""}).']


def claims(name: str, figures: Dict[str, Dict[str, Figure]]) -> List[str]:
    """What the paper says, held against the figures."""
    def of(row: str, column: str = 'top-1') -> Optional[Figure]:
        return figures.get(row, {}).get(column)

    lines: List[str] = []
    if name == 'table2':
        columns = list(dict.fromkeys(column for row in figures.values() for column in row))
        vit, hard, dearkd = 'ViT', 'ViT, hard-label distillation', 'DearKD'
        for column in columns:
            lines += compare(of(hard, column), of(vit, column), f'{column}: hard labels above the plain ViT')
            lines += compare(of(dearkd, column), of(hard, column), f'{column}: DearKD above hard labels')
        for fewer, more in zip(columns, columns[1:]):
            if float(more.split()[0]) <= 2.5 * float(fewer.split()[0]):
                lines += compare(
                    of(dearkd, fewer), of(vit, more), f'DearKD on {fewer} of the images above the plain ViT on {more}')
        gaps = [(column, of(dearkd, column), of(vit, column)) for column in columns]
        known = [(column, a.mean - b.mean) for column, a, b in gaps if a and b]
        if len(known) > 1:
            listed = ', '.join(f'{gap:+.1f} at {column}' for column, gap in known)
            grows = all(first[1] >= second[1] for first, second in zip(known, known[1:]))
            verdict = 'holds' if grows else '**not throughout**'
            lines.append(f'- The gap between DearKD and the ViT grows as data shrinks: {verdict} ({listed}).')
    elif name == 'table1':
        rows = ['ViT', '+ MHCA', '+ hard labels, pooled tokens', '+ hard labels + hidden loss',
                '+ hard labels + hidden loss + MHCA', 'all, in two stages (DearKD)']
        vit, mhca, hard, hidden, both, two = map(of, rows)
        lines += compare(mhca, vit, 'MHCA alone helps')
        lines += compare(hard, vit, 'hard labels help')
        lines += compare(hard, hidden, 'the hidden loss without MHCA hurts')
        lines += compare(both, hidden, 'MHCA and the hidden loss above the hidden loss alone')
        lines += compare(both, hard, 'MHCA and the hidden loss above hard labels alone')
        lines += compare(two, both, 'two stages above one')
    elif name in ('table5', 'table6'):
        column = 'top-1' if name == 'table5' else 'distance'
        none, adi, intra = (of(row, column) for row in ('DeepInversion', 'ADI', 'DF-DearKD (intra-divergence)'))
        lines += compare(adi, none, 'ADI above DeepInversion')
        lines += compare(intra, adi, 'intra-divergence above ADI')
        if name == 'table5':
            lines += compare(of('as many real images'), intra, 'as many real images above intra-divergence')
    elif name == 'table7':
        kind, row = max(
            ((kind, row) for row in figures for kind in figures[row]), key=lambda at: figures[at[1]][at[0]].mean)
        lines.append(f'- Best: stage I of {row} of the epochs, then `{kind}` (the paper: 83 %, `anneal`).')
    elif name == 'choices' and 'default' in figures:
        default = figures['default']['top-1']
        for row in figures:
            if row != 'default' and abs(figures[row]['top-1'].mean - default.mean) >= 1:
                lines.append(f'- {row}: {figures[row]["top-1"].mean - default.mean:+.1f} against the default.')
    return lines


def plot_table2(figures: Dict[str, Dict[str, Figure]]) -> bytes:
    """Top-1 over the share of the images, a line for each method."""
    figure, ((axes,),) = new_figure(size=(6, 3.6))
    for i, (row, columns) in enumerate(figures.items()):
        shares = [float(column.split()[0]) for column in columns]
        axes.errorbar(
            shares, [value.mean for value in columns.values()], [value.error or 0. for value in columns.values()],
            marker='o', capsize=3, color=('tab:gray', 'tab:green', 'tab:blue')[i], label=row)
    ticks = sorted({float(column.split()[0]) for columns in figures.values() for column in columns})
    axes.set(xscale='log', xticks=ticks, xticklabels=[f'{tick:g} %' for tick in ticks], ylabel='top-1, %',
             xlabel='training images')
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return render(figure)


def plot_table7(figures: Dict[str, Dict[str, Figure]]) -> bytes:
    """Top-1 over the length of stage I, a line for each kind of stage II."""
    figure, ((axes,),) = new_figure(size=(6, 3.2))
    for kind in ('anneal', 'ce'):
        points = [(float(row.split()[0]), figures[row][kind]) for row in figures if kind in figures[row]]
        axes.errorbar(
            [x for x, _ in points], [value.mean for _, value in points], [value.error or 0. for _, value in points],
            marker='o', capsize=3, label=f'stage II: {kind}')
    axes.set(xlabel='stage I, % of the epochs', ylabel='top-1, %')
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return render(figure)


PLOTS = {'table2': plot_table2, 'table7': plot_table7}


def write_figure4(scale: Scale, results: Path, folder: Path) -> List[str]:
    """Attention distance over the epochs, of the runs that recorded it."""
    lines, pictures = [], []
    for name in ('vit', 'hard', 'dearkd'):
        path = results / f'{name}-{scale.ablation_fraction:g}-seed0.distances.csv'
        history = read_log(path)
        if history is None:
            continue
        stage1 = round(scale.epochs * 5 / 6) if name == 'dearkd' else None
        moments = {'after the first epoch': min(history.epochs), 'at the end': max(history.epochs)}
        if stage1 is not None and stage1 - 1 in history.epochs:
            moments = {'after the first epoch': min(history.epochs), 'after stage I': stage1 - 1,
                       'at the end': max(history.epochs)}
        means = [f'{mean_distance(history, epoch):.2f} {moment}' for moment, epoch in moments.items()]
        lines.append(f'- {name}: mean over layers and heads, in patches: {", ".join(means)}.')
        picture = folder / f'figure4-{name}.png'
        write_bytes(picture, render(plot_over_epochs(history, stage1)))
        pictures += [f'![Attention distance of {name}](reproduction/plots/{picture.name})', '']
    return [*lines, '', *pictures] if lines else []


def mean_distance(history: DistanceHistory, epoch: int) -> float:
    layers = history.epochs[epoch]
    return statistics.mean(distance for heads in layers.values() for distance in heads)


def write_report(scale: Scale, results: Path, seeds: Sequence[int], output: Path) -> None:
    """RESULTS.md, from what is there."""
    found, pictures = Results(results), output.parent / 'reproduction' / 'plots'
    hours = sum(cell['seconds'] for cell in found.cells.values()) / 3600
    teacher = found.cells.get('teacher', {}).get('top1')
    lines = [
        '# Results', '',
        f'Made by `python reproduction/report.py --scale {scale.name}` from the {len(found.cells)} files in'
        f' `reproduction/results/{scale.name}`, each of which holds its command, seed and commit'
        f' (`python reproduction/run.py all --scale {scale.name}`; {hours:.1f} hours of one core in all).', '',
        f'Student: `{scale.student}`, {scale.epochs} epochs. '
        + (f'Teacher: {teacher:.1f} % top-1. ' if teacher else '')
        + 'Figures are top-1 in percent after the last epoch, ± the standard error over seeds; the paper\'s, on'
        ' ImageNet, in square brackets. "Holds" and "does not hold" are said where a difference is above twice its'
        ' standard error.', '']
    for name, make in TABLES.items():
        table = make(scale, seeds)
        if name == 'figure4':
            figure4 = write_figure4(scale, results, pictures)
            lines += [f'## {table.title}', '', *figure4] if figure4 else []
            continue
        figures = found.table(table)
        if not figures:
            continue
        lines += [f'## {table.title}', '', *markdown(table, figures), '', *claims(name, figures), '']
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
    parser.add_argument('--output', type=Path, default=ROOT / 'RESULTS.md')
    args = parser.parse_args()
    scale = SCALES[args.scale]
    write_report(scale, args.results or ROOT / 'reproduction' / 'results' / scale.name, args.seeds, args.output)
    print(args.output)


if __name__ == '__main__':
    main()
