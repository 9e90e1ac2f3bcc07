"""Table of several runs, and plots of their accuracy and losses by epoch."""
import argparse
from typing import Any, List, Sequence

from timm_dearkd.files import write_bytes, write_table

from .figures import escape_label, new_figure, plot_series, render, shade_stage2
from .inputs import add_output_arguments, output_files
from .runs import Run, distinct_names, open_run, readable

COLUMNS = ('run', 'model', 'teacher', 'state', 'metric', 'best', 'at epoch', 'last')


def compare_table(runs: Sequence[Run]) -> List[List[str]]:
    """Return a row for each run; values that it does not have yet are empty."""
    rows = []
    for name, run in zip(distinct_names(runs), runs):
        best, last = run.best(), run.last()
        rows.append([
            name, str(run.args.get('model') or ''), str(run.args.get('kd_model_name') or ''), run.state, run.metric,
            f'{best[1]:.4g}' if best else '', str(best[0]) if best else '', f'{last[1]:.4g}' if last else ''])
    return rows


def drawn_columns(runs: Sequence[Run], columns: Sequence[str] = ()) -> List[str]:
    """Return the columns of summary.csv to draw: `columns`, else accuracy and losses.

    Raises:
        ValueError: If no run has one of `columns`.
    """
    found = list(dict.fromkeys(column for run in runs for column in run.columns))
    for column in columns:
        if column not in found:
            raise ValueError(f'--columns: no run has {column!r}. Available: {", ".join(found)}.')
    return list(columns) or [c for c in ('eval_top1', 'eval_loss') if c in found] + [
        c for c in found if c.startswith('train_') and c.endswith('loss')]


def plot_column(axes: Any, runs: Sequence[Run], column: str) -> None:
    """Draw a line for each run that has the column. Shade stage II of a single run."""
    for i, (name, run) in enumerate(zip(distinct_names(runs), runs)):
        epochs, values = run.series(column)
        if epochs:
            plot_series(axes, epochs, values, color=f'C{i % 10}', label=escape_label(name) if len(runs) > 1 else None)
    if len(runs) == 1:
        first, last = (int(runs[0].rows[place]['epoch']) for place in (0, -1))
        shade_stage2(axes, runs[0].stage2_start, first, last)
    axes.set(title=escape_label(readable(column)), xlabel='epoch')
    axes.grid(alpha=0.3)


def plot_runs(runs: Sequence[Run], columns: Sequence[str]) -> Any:
    """Plot columns of summary.csv: a panel for each column, a line for each run.

    Args:
        runs: The runs.
        columns: At least one name, see `drawn_columns`.
    """
    width = min(3, len(columns))
    height = -(-len(columns) // width)
    figure, axes = new_figure(height, width, (4 * width, 3 * height))
    for ax in axes.flat[len(columns):]:
        ax.axis('off')
    for ax, column in zip(axes.flat, columns):
        plot_column(ax, runs, column)
    handles = {
        label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc='outside upper center', ncols=3, frameon=False)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the tool."""
    add = parser.add_argument
    add('runs', nargs='+', metavar='RUN', help='output folders of train.py')
    add('--columns', nargs='+', default=[], metavar='NAME',
        help='columns of summary.csv to draw (default: accuracy, losses)')
    add_output_arguments(parser, 'compare')


def run(args: argparse.Namespace) -> None:
    """Print and write a table of the runs; write all epochs as CSV, and a plot."""
    new_figure()
    runs = [open_run(folder) for folder in args.runs]
    files = output_files(args, 'compare', args.runs[0], '.csv', '_epochs.csv', '.png')
    columns = list(dict.fromkeys(column for run in runs for column in run.columns))
    wanted = drawn_columns(runs, args.columns)
    table = compare_table(runs)
    print('| ' + ' | '.join(COLUMNS) + ' |\n' + '| --- ' * len(COLUMNS) + '|')
    for row in table:
        print('| ' + ' | '.join(row) + ' |')
    epochs = [
        [name, *(values.get(column, '') for column in columns)]
        for name, run in zip(distinct_names(runs), runs) for values in run.rows]
    write_table(files[0], [COLUMNS, *table])
    write_table(files[1], [['run', *columns], *epochs])
    if wanted:
        write_bytes(files[2], render(plot_runs(runs, wanted)))
    written = ', '.join(map(str, files[:3 if wanted else 2]))
    print(f'\n{written}' + ('' if wanted else '. Nothing to draw: no run has an epoch yet.'))
