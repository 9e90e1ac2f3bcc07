"""Run the paper's experiments: `python reproduction/run.py table2 --scale small --jobs 2`.

Each figure is one train.py or data_free command. Finished commands are skipped, and unfinished ones are resumed. Each
result is a JSON file with its command, seed and commits. `python reproduction/report.py` writes RESULTS.md from them.
"""
import argparse
import fnmatch
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Dict, List, Sequence

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from distill_hooks.errors import one_line  # noqa: E402
from reproduction.cells import SCALES, Cell  # noqa: E402
from reproduction.driver import Driver  # noqa: E402
from reproduction.prepare import prepare_data  # noqa: E402
from reproduction.results import RESULTS  # noqa: E402
from reproduction.tables import TABLES, collect_cells, tables_of  # noqa: E402


def select_cells(cells: Sequence[Cell], patterns: Sequence[str]) -> List[Cell]:
    """Return the cells whose names match shell patterns, in the order of the patterns.

    Raises:
        ValueError: If a pattern matches no cell.
    """
    selected: Dict[str, Cell] = {}
    for pattern in patterns:
        found = {cell.name: cell for cell in cells if fnmatch.fnmatchcase(cell.name, pattern)}
        if not found:
            raise ValueError(f'--only {pattern} matches none of the {len(cells)} cells. --list prints their commands.')
        selected.update(found)
    return list(selected.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TABLES, 'all']
    parser.add_argument('tables', nargs='+', choices=names, metavar='TABLE', help=', '.join(names))
    parser.add_argument('--scale', default='small', choices=list(SCALES), help='default: small')
    parser.add_argument('--only', nargs='+', metavar='CELL', help='run these cells only, such as "stage50_*"')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='seeds to run (default: 0 1 2)')
    parser.add_argument('--jobs', type=int, default=max(1, (os.cpu_count() or 1) // 2),
                        help='cells to run in parallel (default: half of the cores)')
    parser.add_argument('--launcher', help='command that starts a cell: "torchrun --nproc_per_node 8" (with --jobs 1)')
    parser.add_argument('--data', type=Path, default=ROOT / 'output/reproduction/data',
                        help='folder of the data sets (default: output/reproduction/data)')
    parser.add_argument('--photos', type=Path, metavar='FOLDER',
                        help='image folder of the table photos (default: the stamps of Tux Paint)')
    parser.add_argument('--work', type=Path, help='folder of the runs (default: output/reproduction/SCALE)')
    parser.add_argument('--results', type=Path, help='folder of the results (default: reproduction/results/SCALE)')
    parser.add_argument('--list', action='store_true', help='print the commands without running them')
    args = parser.parse_args()

    scale = SCALES[args.scale]
    if args.photos and not scale.photos:
        parser.error(f'--photos is for scales with the table photos, and --scale {scale.name} has none. Remove it.')
    if args.photos:
        scale = replace(scale, photos=args.photos.resolve().name)
    tables = list(tables_of(scale)) if 'all' in args.tables else args.tables
    missing = [name for name in tables if name not in tables_of(scale)]
    if missing:
        parser.error(f'Scale {scale.name} has no {", ".join(missing)}. It has {", ".join(tables_of(scale))}.')
    work = args.work or ROOT / 'output/reproduction' / scale.name
    cells = collect_cells(scale, tables, args.seeds)
    try:
        launcher = shlex.split(args.launcher or '') or [sys.executable]
        driver = Driver(scale, args.data, work, args.results or RESULTS / scale.name, max(1, args.jobs), launcher)
        cells = select_cells(cells, args.only or ['*'])
        lines = [driver.shell_line(cell) for cell in cells]
        if args.list:
            print('\n'.join(lines))
            return
        if args.photos:  # the folder tells whether results are of its images
            prepare_data(scale, args.data, [cell for cell in cells if cell.data.startswith('photos/')], args.photos)
        prepare_data(scale, args.data, [*driver.missing(cells).values()], args.photos)
    except (OSError, ValueError, subprocess.CalledProcessError) as e:
        parser.error(one_line(e, limit=None))
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, driver.stop)
    sys.exit(0 if driver.run(cells) else 1)


if __name__ == '__main__':
    main()
