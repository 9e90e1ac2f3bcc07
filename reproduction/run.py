"""Run the paper's experiments: `python reproduction/run.py table2 --scale small --jobs 2`.

Every figure is one train.py command. What is there is skipped, what is half done goes on, and each result is kept as
JSON with its command, seed and commit. `python reproduction/report.py` makes RESULTS.md out of those files.
"""
import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Dict, List, Optional, Set

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from reproduction.cells import SCALES, TABLES, Cell, Scale, teacher_cell  # noqa: E402
from reproduction.fashion_mnist import write_fashion_mnist  # noqa: E402
from timm_dearkd.engine.output import write_bytes  # noqa: E402

RESULTS = ROOT / 'reproduction' / 'results'


def git_commit() -> str:
    """The commit that the code is of, with a '+' if files differ from it; '' outside of a clone."""
    def git(*args: str) -> str:
        return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git('status', '--porcelain', '--untracked-files=no', '--', ':!reproduction/results')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')


class Driver:
    """Runs cells in parallel processes.

    Args:
        scale: Size of the experiments.
        data: Folder of the data sets.
        work: Folder of the runs.
        results: Folder of the JSON files.
        jobs: Cells at a time. Each gets its share of the cores.
    """

    def __init__(self, scale: Scale, data: Path, work: Path, results: Path, jobs: int) -> None:
        self.scale, self.data, self.work, self.results, self.jobs = scale, data, work, results, jobs
        self.processes: Set[subprocess.Popen] = set()
        self.stopping = False
        self.images_per_second: List[float] = []  # of the cells of this run
        self.commit = git_commit()

    def result_path(self, name: str) -> Path:
        return self.results / f'{name}.json'

    def command(self, cell: Cell) -> List[str]:
        """Arguments of Python that run a cell, or go on with it."""
        teacher = self.scale.teacher_name or str(self.work / 'teacher')
        argv = [arg.replace('{teacher}', teacher).replace('{runs}', str(self.work)) for arg in cell.argv]
        if cell.program == 'data_free':
            folder = str(self.work / cell.name)
            return ['-m', 'timm_dearkd.data_free', folder, *argv, '--seed', str(cell.seed), '--resume']
        data = self.work / cell.data[1:] if cell.data.startswith('/') else self.data / cell.data
        return [
            'train.py', str(data), *argv, '--seed', str(cell.seed), '--output', str(self.work), '--experiment',
            cell.name, '--resume', 'auto']

    def execute(self, name: str, command: List[str]) -> Optional[str]:
        """Run a command with its output in a log. Returns what went wrong, if anything."""
        env = dict(os.environ, OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // self.jobs)))
        path = self.work / f'{name}.log'
        start = time.monotonic()
        with open(path, 'a') as log:
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=log, stderr=log)
            self.processes.add(process)
            status = process.wait()
            self.processes.discard(process)
        seconds = self.seconds(name) + time.monotonic() - start
        write_bytes(self.seconds_path(name), f'{seconds:.1f}'.encode())
        if status and not self.stopping:
            return f'status {status}: {(path.read_text().strip().splitlines() or [""])[-1]}'
        return 'stopped' if status else None

    def seconds_path(self, name: str) -> Path:
        return self.work / f'{name}.seconds'

    def seconds(self, name: str) -> float:
        """What a cell has taken so far, in however many goes."""
        path = self.seconds_path(name)
        return float(path.read_text()) if path.exists() else 0.

    def run_cell(self, cell: Cell) -> Optional[str]:
        """Run a cell and keep its figures. Returns what went wrong, if anything."""
        if self.stopping:
            return 'stopped'
        self.work.mkdir(parents=True, exist_ok=True)
        command = self.command(cell)
        collect = self.image_figures if cell.program == 'data_free' else self.student_figures
        problem = self.execute(cell.name, command)
        if problem:
            return problem
        figures = collect(cell)
        if figures is None:
            return 'stopped'
        seconds = max(self.seconds(cell.name), 1.)
        self.images_per_second.append(cell.images / seconds)
        result = dict(
            name=cell.name, command=' '.join(['python', *command]), seed=cell.seed, commit=self.commit,
            **figures, seconds=round(seconds))
        write_bytes(self.result_path(cell.name), json.dumps(result, indent=1).encode())
        return None

    def student_figures(self, cell: Cell) -> Dict[str, Any]:
        """Top-1 after the last epoch, which is the figure, and on the way; and how often the teacher found the label.

        Attention distances are kept in a file beside the result.
        """
        folder = self.work / cell.name
        with open(folder / 'summary.csv', newline='') as f:
            rows = list(csv.DictReader(f))
        evaluated = {int(row['epoch']) + 1: float(row['eval_top1']) for row in rows if row['eval_top1']}
        distances = folder / 'attention_distance.csv'
        if distances.exists():
            write_bytes(self.results / f'{cell.name}.distances.csv', distances.read_bytes())
        agreement = [row['train_teacher_agreement'] for row in rows if row.get('train_teacher_agreement')]
        return dict(
            top1=evaluated[max(evaluated)], top1_by_epoch=evaluated,
            **(dict(teacher_agreement=float(agreement[-1])) if agreement else {}))

    def image_figures(self, cell: Cell) -> Optional[Dict[str, Any]]:
        """How sure the CNN is of the images, and how far apart those of a class are; the real ones come beside them."""
        folder = self.work / cell.name
        validation = folder / 'validation'
        if not validation.exists():
            validation.symlink_to((self.data / cell.data / 'validation').resolve())
        teacher = self.scale.teacher_name or str(self.work / 'teacher')
        if self.execute(cell.name, [
                '-m', 'timm_dearkd.analysis', 'diversity', str(folder), '--model', teacher, '--output',
                str(folder / 'diversity.json')]):
            return None
        distance, = json.loads((folder / 'diversity.json').read_text())['folders'].values()
        images = json.loads((folder / 'manifest.json').read_text())['images']
        sure = 100 * sum(image['teacher_prob'] > 0.5 for image in images) / len(images)
        return dict(distance=distance['mean'], sure=sure, images=len(images))

    def stop(self, signum: int, *_: Any) -> None:
        """Let the cells that run write their checkpoints, and begin no other."""
        self.stopping = True
        for process in list(self.processes):
            process.send_signal(signal.SIGTERM)

    def time_left(self, cells: List[Cell]) -> str:
        if not self.images_per_second:
            return ''
        rate = sum(self.images_per_second) / len(self.images_per_second) * self.jobs
        minutes = round(sum(cell.images for cell in cells) / rate / 60)
        return f', about {minutes // 60}:{minutes % 60:02} h left'

    def run(self, cells: List[Cell]) -> bool:
        """Run what has no result yet. Returns whether all cells have one in the end."""
        todo = {cell.name: cell for cell in cells if not self.result_path(cell.name).exists()}
        print(f'{len(cells)} cells, {len(cells) - len(todo)} of them done', flush=True)
        waiting, running, failed = dict(todo), {}, {}  # type: ignore[var-annotated]
        futures: Dict[Future, Cell] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            while (waiting or futures) and not (self.stopping and not futures):
                for name, cell in list(waiting.items()):
                    unmet = [need for need in cell.needs if need in todo and not self.result_path(need).exists()]
                    if any(need in failed for need in unmet):
                        failed[name] = f'needs {", ".join(unmet)}'
                        del waiting[name]
                    elif not unmet and len(futures) < self.jobs:
                        futures[pool.submit(self.run_cell, cell)] = running[name] = waiting.pop(name)
                done, _ = wait(futures, return_when=FIRST_COMPLETED) if futures else (set(), None)
                for future in done:
                    cell = futures.pop(future)
                    del running[cell.name]
                    problem = future.result()
                    if problem:
                        failed[cell.name] = problem
                        print(f'{cell.name}: {problem}', flush=True)
                        continue
                    result = json.loads(self.result_path(cell.name).read_text())
                    figure = f'{result["top1"]:.2f} %' if 'top1' in result else f'distance {result["distance"]:.3f}'
                    left = [*waiting.values(), *running.values()]
                    print(f'{cell.name}: {figure} ({len(left)} cells{self.time_left(left)})', flush=True)
        return not failed and not waiting


def collect_cells(scale: Scale, names: List[str], seeds: List[int]) -> List[Cell]:
    """The cells of some tables and what they need, each once."""
    known = {cell.name: cell for table in TABLES.values() for entry in table(scale, seeds).entries
             for cell in entry.cells}
    teacher = teacher_cell(scale)
    if teacher:
        known[teacher.name] = teacher
    wanted: Dict[str, Cell] = {}

    def add(name: str) -> None:
        for need in known[name].needs:
            add(need)
        wanted.setdefault(name, known[name])

    for name in names:
        for entry in TABLES[name](scale, seeds).entries:
            for cell in entry.cells:
                add(cell.name)
    return list(wanted.values())


def prepare_data(scale: Scale, data: Path) -> None:
    if scale.name == 'small':
        write_fashion_mnist(data / 'fashion_mnist')
    elif scale.name == 'smoke' and not (data / 'digits').exists():
        subprocess.run([sys.executable, 'examples/digits_data.py', str(data / 'digits')], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*TABLES, 'all']
    parser.add_argument('tables', nargs='+', choices=names, metavar='TABLE', help=', '.join(names))
    parser.add_argument('--scale', default='small', choices=list(SCALES))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=max(1, (os.cpu_count() or 1) // 2), help='cells at a time')
    parser.add_argument('--data', type=Path, default=Path('output/reproduction/data'), help='folder of the data sets')
    parser.add_argument('--work', type=Path, help='folder of the runs (output/reproduction/SCALE)')
    parser.add_argument('--results', type=Path, help='folder of the results (reproduction/results/SCALE)')
    parser.add_argument('--list', action='store_true', help='print the commands, and run none')
    args = parser.parse_args()

    scale = SCALES[args.scale]
    work = args.work or Path('output/reproduction') / scale.name
    driver = Driver(scale, args.data, work, args.results or RESULTS / scale.name, args.jobs)
    cells = collect_cells(scale, list(TABLES) if 'all' in args.tables else args.tables, args.seeds)
    if args.list:
        for cell in cells:
            print('python', *driver.command(cell))
        return
    prepare_data(scale, args.data)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, driver.stop)
    sys.exit(0 if driver.run(cells) else 1)


if __name__ == '__main__':
    main()
