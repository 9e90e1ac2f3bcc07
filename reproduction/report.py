"""Write RESULTS.md and its plots from the files in reproduction/results: `python reproduction/report.py`."""
import argparse
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from reproduction.cells import METHODS, SCALES, TABLE2, Scale  # noqa: E402
from reproduction.choices import DECISIONS  # noqa: E402
from reproduction.data_free import WEIGHT_DECISIONS  # noqa: E402
from reproduction.figure4 import Figure4  # noqa: E402
from reproduction.results import RESULTS, Figure, Results, weights_hash  # noqa: E402
from reproduction.significance import Finding, judge, measure, table_of  # noqa: E402
from reproduction.table import Key, Table  # noqa: E402
from reproduction.tables import CHOOSING  # noqa: E402
from timm_dearkd.analysis.figures import new_figure, render  # noqa: E402
from timm_dearkd.commands import run_command  # noqa: E402
from timm_dearkd.files import write_bytes, write_text  # noqa: E402

STATISTICS = (
    '- `±` is the half-width of the 95 % confidence interval: in cells, in differences and in plots. A table of one'
    ' seed has none.',
    '- Figures are means over seeds. A seed sets the initial weights, the order of the images and, if a student has a'
    ' part of the images, which part. Square brackets hold the paper\'s figure, on ImageNet.',
    '- A claim of the paper is an order of figures in one of its tables. It is *reproduced* if the interval of the'
    ' difference lies above 0, *contradicted* if it lies below 0, and *inconclusive* otherwise. Our own comparisons are'
    ' *confirmed* instead of reproduced. If there is no true difference, 1 of 20 claims is still reproduced or'
    ' contradicted by chance.',
    '- Standard deviations are pooled over a table; in table 2 and for colour images, over a column. Students with the'
    ' hidden loss vary less and are pooled separately. So are CNNs, synthetic images by fill, and real images. One'
    ' figure can therefore have different intervals in two tables.',
    '- Differences use Welch\'s t. Figures with the same pooled deviation are compared on the seeds that they share (a'
    ' randomised block design). A mean in a claim can therefore differ from the table\'s.',
)


def markdown(table: Table, figures: Dict[Key, Figure]) -> List[str]:
    """Return the lines of a table, with the paper's figures in brackets and differences from the reference row."""
    paper = {(entry.row, entry.column): entry.paper for entry in table.entries}
    plain = {(entry.row, entry.column) for entry in table.entries if not entry.interval}
    shown = [key for key, value in paper.items() if key in figures or value is not None]  # others have not been run
    columns = list(dict.fromkeys(column for _, column in shown))
    reference = (table.reference, columns[0])
    numbers = Counter(len(figure.by_seed) for figure in figures.values())
    usual = numbers.most_common(1)[0][0]
    header = [*columns, f'difference from {table.reference}'] if reference in figures else columns
    lines = [f'Seeds: {usual}{", unless a cell has another number" if len(numbers) > 1 else ""}.', '',
             '| | ' + ' | '.join(header) + ' |', '| --- ' * (len(header) + 1) + '|']
    for row in dict.fromkeys(row for row, _ in shown):
        cells = []
        for key in ((row, column) for column in columns):
            parts = []
            if key in figures:
                seeds = len(figures[key].by_seed)
                estimate = measure(table, figures, {key: 1.})
                estimate = estimate._replace(margin=math.nan) if key in plain else estimate
                parts = [estimate.text(figures[key].digits, '')]
                parts += [f'({seeds} seed{"s" * (seeds > 1)})'] if seeds != usual else []
            cells.append(' '.join(parts + ([f'[{paper[key]:g}]'] if paper.get(key) is not None else [])))
        if reference in figures:
            key = (row, columns[0])
            known = key in figures and key != reference
            cells.append(measure(table, figures, {key: 1., reference: -1.}).text(1) if known else '')
        lines.append(f'| {row} | ' + ' | '.join(cells) + ' |')
    return lines


def plot_lines(
        table: Table,
        figures: Dict[Key, Figure],
        lines: Dict[str, Dict[Key, float]],
        size: Tuple[float, float],
        colors: Sequence[Optional[str]],
        **options: Any,
) -> bytes:
    """Plot top-1 with its 95 % confidence interval, one line per label, at the x of each figure."""
    figure, ((axes,),) = new_figure(size=size)
    for (label, places), color in zip(lines.items(), colors):
        known = {x: measure(table, figures, {key: 1.}) for key, x in places.items() if key in figures}
        if not known:
            continue
        axes.errorbar(
            list(known), [point.value for point in known.values()], [point.margin for point in known.values()],
            marker='o', capsize=3, color=color, label=label)
    axes.set(ylabel='top-1 (%) with 95 % CI', **options)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return render(figure)


def plot_table2(table: Table, figures: Dict[Key, Figure]) -> bytes:
    """Plot top-1 over the share of the images, one line per method."""
    shares = {column: float(column.split()[0]) for _, column in figures}
    colors = dict(vit='tab:gray', hard='tab:green', dearkd='tab:blue', soft='tab:orange')
    lines = {TABLE2[name]: {(TABLE2[name], column): share for column, share in shares.items()} for name in colors}
    return plot_lines(
        table, figures, lines, (6, 3.6), list(colors.values()), xscale='log',
        xticks=sorted(shares.values()), xticklabels=[f'{tick:g} %' for tick in sorted(shares.values())],
        xlabel='share of the training images')


def plot_table7(table: Table, figures: Dict[Key, Figure]) -> bytes:
    """Plot top-1 over the length of stage I, one line per kind of stage II."""
    lines = {f'stage II: {kind}': {
        (row, column): float(row.split()[0]) for row, column in figures
        if column == kind or row == '100 %'} for kind in ('anneal', 'ce')}  # 100 % has no stage II
    return plot_lines(table, figures, lines, (6, 3.2), (None, None), xlabel='stage I (% of the epochs)')


PLOTS = {'table2': plot_table2, 'table7': plot_table7}


def describe_teacher(scale: Scale, found: Results, results: Path) -> str:
    """Return the set-up's line on the teacher, its accuracy and its versions."""
    teacher, cells = found.cells.get('teacher', {}).get('top1'), found.cells.values()
    text = f'`{scale.teacher_name}`.' if scale.teacher_name else 'a CNN, trained on all training images.'
    if teacher:
        text = text.replace('CNN', f'CNN with {teacher:.1f} % top-1')
    agreements = [
        found.cells[cell.name]['teacher_agreement'] for entry in found.tables['table2'].entries for cell in entry.cells
        if entry.row == METHODS['hard'] and 'teacher_agreement' in found.cells.get(cell.name, {})]
    if agreements:
        shares = dict.fromkeys(f'{100 * share:.0f}' for share in (min(agreements), max(agreements)))
        text += f' It predicts the label of {" to ".join(shares)} % of the augmented images in table 2 (hard labels).'
    teachers = Counter(cell['teacher'] for cell in cells if {'teacher', 'top1'} <= set(cell))
    kept = weights_hash(results / 'teacher')
    usual = kept if kept in teachers else max(teachers, key=lambda name: teachers[name], default='')
    for name, count in ((name, count) for name, count in teachers.items() if name != usual):
        titles = [table.title for key, table in found.tables.items()
                  if name in set().union(*found.teachers(key).values())]
        text += (f' Other weights of the same recipe ({name}) taught {count} student{"s" * (count > 1)}, in: '
                 f'{", ".join(titles)}.')
    return text


def describe_setup(scale: Scale, found: Results, results: Path) -> List[str]:
    """Return the lines of the set-up."""
    cells = found.cells.values()
    hours = sum(cell['seconds'] * cell.get('threads', 1) for cell in cells) / 3600
    changed = sum(any(commit.endswith('+') for commit in cell.get('commits', ())) for cell in cells)
    return [
        '## Set-up', '',
        f'- Data: `{scale.data}`, {scale.num_train:,} training and {scale.num_eval:,} test images. Figures are top-1 in'
        ' percent on the test images after the last epoch, unless a table says otherwise.',
        f'- Student: `{scale.student}`, {scale.epochs} epochs for any number of images, recipe `{scale.recipe}`.',
        f'- Teacher: {describe_teacher(scale, found, results)}',
        *STATISTICS,
        f'- Command: `python reproduction/run.py all --scale {scale.name}` ({hours:.1f} hours of one core).'
        f' `python reproduction/report.py --scale {scale.name}` writes this file from the {len(cells)} files in'
        f' `reproduction/results/{scale.name}`. Each has its command, seed and commits.',
        *([f'- {changed} files have a "+" after a commit: the code had uncommitted changes.'] if changed else []),
        *([f'- Skipped, because their definition or their CNN has changed: {", ".join(found.stale)}.']
          if found.stale else []), '']


def describe_teachers(found: Results, name: str) -> List[str]:
    """Return a line with the teachers of a table's students, if there are several."""
    groups = found.teachers(name)
    if len(set().union(*groups.values())) < 2:
        return []
    teachers = '; '.join(f'{place}: {", ".join(sorted(names))}' for place, names in groups.items())
    return [f'Not all students have the same teacher ({teachers}).', '']


def describe_decisions(found: Results) -> List[str]:
    """Return a table of the choices: options with their figures, the value taken and the reason."""
    lines = []
    for decision in (*DECISIONS, *WEIGHT_DECISIONS):
        table = found.tables.get(decision.table)
        figures = found.figures(table) if table else {}
        options = [f'{option}: {figures[row, decision.column].mean:.1f}' for option, row in decision.options.items()
                   if (row, decision.column) in figures]
        if options:
            lines.append(f'| {decision.what} | {"; ".join(options)} | {decision.taken} | {decision.why} |')
    header = ['| choice | options and top-1 | taken | why |', '| --- | --- | --- | --- |']
    return [*header, *lines, ''] if lines else []


def summarise(scale: Scale, claims: Dict[str, List[Finding]]) -> List[str]:
    """Return the first lines of the report: the paper's claims and their verdicts."""
    verdicts = Counter(finding.verdict.strip('*') for group in claims.values() for finding in group)
    if not verdicts:
        return []
    return [
        f'Of {sum(verdicts.values())} claims of the paper, {verdicts["reproduced"]} are reproduced,'
        f' {verdicts["contradicted"]} contradicted and {verdicts["inconclusive"]} inconclusive at scale `{scale.name}`'
        f' (`{scale.data}`).', '', *table_of(claims), '']


def write_section(
        name: str,
        found: Results,
        pictures: Path,
        root: Path,
        figure4: Figure4,
) -> Tuple[List[str], List[Finding]]:
    """Return the lines of a table's section, and its claims. Writes its plots."""
    table = found.tables[name]
    figures = found.figures(table)
    if not (figure4.runs if name == 'figure4' else figures):
        return [], []
    if name == 'figure4':
        findings, lines, plots = figure4.findings(), figure4.changes(), figure4.plots(pictures, root, ['dearkd'])
    else:
        findings, lines, plots = judge(table, figures), [*markdown(table, figures), ''], []
        if name in PLOTS:
            picture = pictures / f'{name}.png'
            write_bytes(picture, PLOTS[name](table, figures))
            plots = [f'![{table.title}]({picture.relative_to(root).as_posix()})', '']
    ours = [finding for finding in findings if not finding.of_paper]
    heading = f'{"###" if name in CHOOSING else "##"} {table.title}'
    return [heading, '', table.note, '', *describe_teachers(found, name), *lines,
            *([*table_of({'': ours}, 'our comparison'), ''] if ours else []), *plots], findings


def update_readme(readme: Path, found: Results) -> None:
    """Write the complete rows of table 2, without the paper's figures, between the marks in README.md."""
    table = found.tables['table2']
    lines = [line for line in markdown(table, found.figures(table)) if line.startswith('|') and '|  |' not in line]
    rows = [re.sub(r' \[[\d.]+\]', '', line) for line in lines]
    begin, end = '<!-- results: begin -->\n', '<!-- results: end -->'
    before, rest = readme.read_text(encoding='utf-8').split(begin)
    write_text(readme, before + begin + '\n'.join(rows) + '\n' + end + rest.split(end)[1])


def write_report(scale: Scale, results: Path, seeds: Sequence[int], output: Path) -> None:
    """Write the report from the results, and its plots into `reproduction/plots` beside it.

    Raises:
        ValueError: If there are no results.
    """
    found, pictures = Results(scale, results, seeds), output.parent / 'reproduction' / 'plots'
    if not found.cells:
        raise ValueError(f'{results} holds no results of scale {scale.name}. Run reproduction/run.py first.')
    if scale.name != 'small':
        pictures /= scale.name
    figure4, claims = Figure4(scale, found, results), {}
    body: List[str] = []
    appendix: List[str] = describe_decisions(found)
    for name, table in found.tables.items():
        lines, findings = write_section(name, found, pictures, output.parent, figure4)
        claims[f'**{table.title}**'] = [finding for finding in findings if finding.of_paper]
        if name in CHOOSING:
            appendix += lines
        else:
            body += lines
    if appendix:
        body += ['## Appendix: choices', '', *appendix]
    if figure4.runs:
        body += ['## Appendix: attention distance by layer', '', *figure4.distances(),
                 *figure4.plots(pictures, output.parent, [name for name in figure4.runs if name != 'dearkd'])]
    text = ['# Results', '', *summarise(scale, claims), *describe_setup(scale, found, results), *body]
    write_text(output, '\n'.join(text).rstrip() + '\n')


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--scale', default='small', choices=list(SCALES), help='default: small')
    parser.add_argument('--photos', metavar='NAME', help='name of the folder of the table photos (default: stamps)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='seeds to read (default: 0 1 2)')
    parser.add_argument('--results', type=Path, help='folder of the results (default: reproduction/results/SCALE)')
    parser.add_argument('--output', type=Path, help='file to write (default: RESULTS.md, or RESULTS-SCALE.md)')
    args = parser.parse_args(argv)
    scale = SCALES[args.scale]
    if args.photos and not scale.photos:
        parser.error(f'--photos is for scales with the table photos, and --scale {scale.name} has none. Remove it.')
    if args.photos:
        scale = replace(scale, photos=args.photos)
    output = args.output or ROOT / ('RESULTS.md' if scale.name == 'small' else f'RESULTS-{scale.name}.md')
    results = args.results or RESULTS / scale.name
    write_report(scale, results, args.seeds, output)
    if output == ROOT / 'RESULTS.md':
        update_readme(ROOT / 'README.md', Results(scale, results, args.seeds))
    print(output)


if __name__ == '__main__':
    run_command('report.py', main)
