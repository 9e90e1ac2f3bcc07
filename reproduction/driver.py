"""Run cells in parallel processes: what is there is skipped, what is half done goes on."""
import argparse
import fcntl
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Set, TextIO

from reproduction.cells import ROOT, Cell, CellError, Scale, definition, read_recipe, teacher_cell
from reproduction.prepare import validation_folder
from reproduction.results import FIGURES, READERS, TEACHER_FILES, read_result, weights_hash
from timm_dearkd.files import write_bytes

__all__ = ['Driver', 'count_processes', 'git_commit', 'is_taught']


def git_commit() -> str:
    """The commit that the code is of, with a '+' if files differ from it; '' outside of a clone."""
    def git(*args: str) -> str:
        return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    if not shutil.which('git'):
        return ''
    changed = git('status', '--porcelain', '--untracked-files=no', '--', ':!reproduction/results')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')


def count_processes(launcher: Sequence[str]) -> int:
    """How many torchrun starts, by its arguments; Python starts 1.

    Raises:
        ValueError: They give no number, or it is another launcher.
    """
    if 'torchrun' not in map(os.path.basename, launcher) and 'torch.distributed.run' not in launcher:
        if 'python' in os.path.basename(launcher[0]):
            return 1
        raise ValueError(
            f'--launcher {shlex.join(launcher)}: how many processes that starts is only known of torchrun. Take it, or'
            ' leave --launcher out.')
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--nnodes', default='1')
    parser.add_argument('--nproc_per_node', '--nproc-per-node', default='1')
    args, _ = parser.parse_known_args(launcher)
    if not (args.nnodes.isdecimal() and args.nproc_per_node.isdecimal()):
        raise ValueError(
            f'--launcher has {args.nnodes} nodes and {args.nproc_per_node} processes on each, expected two numbers.')
    return int(args.nnodes) * int(args.nproc_per_node)


def is_taught(cell: Cell) -> bool:
    """Whether its figure depends on the teacher."""
    return any(need.name == 'teacher' or is_taught(need) for need in cell.needs)


class Driver:
    """Runs cells in parallel processes.

    Args:
        scale: Size of the experiments.
        data: Folder of the data sets.
        work: Folder of the runs.
        results: Folder of the JSON files.
        jobs: Cells at a time. Each gets its share of the cores.
        launcher: What starts a program: Python, or torchrun with its arguments.
    """

    def __init__(
            self,
            scale: Scale,
            data: Path,
            work: Path,
            results: Path,
            jobs: int,
            launcher: Sequence[str] = (sys.executable,),
    ) -> None:
        self.scale, self.jobs, self.launcher = scale, jobs, list(launcher)
        self.data, self.work, self.results = data.resolve(), work.resolve(), results.resolve()
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.processes: Set[subprocess.Popen] = set()
        self.stopping = False
        self.cost = self.seconds = 0.  # of the cells of this session

    def result_path(self, name: str) -> Path:
        return self.results / f'{name}.json'

    def has_result(self, cell: Cell) -> bool:
        """Whether there is one, and it is of the cell as it is defined now."""
        result = read_result(self.result_path(cell.name))
        return result is not None and result['definition'] == definition(cell)

    def read_log(self, cell: Cell) -> Dict[str, Any]:
        """What is known of a run so far."""
        path = self.work / f'{cell.name}.json'
        return json.loads(path.read_text()) if path.exists() else {}

    def has_output(self, cell: Cell) -> bool:
        """Whether there is what other cells need of it, of the cell as it is defined now."""
        name, log = 'manifest.json' if cell.program == 'data_free' else 'model_best.safetensors', self.read_log(cell)
        teacher = self.teacher_weights() if is_taught(cell) else ''
        return (self.work / cell.name / name).exists() and (
            log.get('definition'), log.get('teacher', '')) == (definition(cell), teacher)

    def path(self, path: Path) -> str:
        """As it is named in commands: relative to the repository, if it is in there."""
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)

    def teacher(self) -> str:
        return self.scale.teacher_name or self.path(self.work / 'teacher')

    def teacher_weights(self) -> str:
        """`weights_hash` of the trained teacher; '' where it is timm's."""
        return weights_hash(self.work / 'teacher')

    def command(self, cell: Cell) -> List[str]:
        """Arguments of Python, or of what launches it, that run a cell, or go on with it."""
        work, argv = self.path(self.work), list(cell.argv)
        for name, value in (('{runs}', work), ('{data}', self.path(self.data)), ('{teacher}', self.teacher())):
            argv = [arg.replace(name, value) for arg in argv]
        data = self.path(self.work / cell.data[1:] if cell.data.startswith('/') else self.data / cell.data)
        if cell.program == 'data_free':
            return ['-m', 'timm_dearkd.data_free', f'{work}/{cell.name}', *argv, '--seed', str(cell.seed), '--resume']
        if cell.program == 'diversity':
            return ['-m', 'timm_dearkd.analysis', 'diversity', data, *argv, '--seed', str(cell.seed), '--output',
                    f'{work}/{cell.name}/diversity.json', '--overwrite']
        return [
            'train.py', data, *argv, *self.accumulation(cell), '--seed', str(cell.seed), '--output', work,
            '--experiment', cell.name, '--resume', 'auto']

    def accumulation(self, cell: Cell) -> List[str]:
        """Arguments by which several processes have the batch of one.

        Raises:
            ValueError: They can not.
        """
        num_processes = count_processes(self.launcher)
        if num_processes == 1:
            return []
        recipe = read_recipe(cell) or {}
        given = dict(zip(cell.argv, cell.argv[1:]))
        steps = int(given.get('--grad-accum-steps', recipe.get('grad_accum_steps', 1)))
        if steps % num_processes:
            raise ValueError(
                f'{num_processes} processes can not share the {steps} accumulation steps of {cell.name}. Start as'
                ' many as divide them.')
        return ['--grad-accum-steps', str(steps // num_processes)]

    @contextmanager
    def locked(self, name: str) -> Iterator[TextIO]:
        """The log of a cell, which one driver at a time has; the programs that write to it keep it while they run.

        Raises:
            CellError: Asked to stop while another has it.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with open(self.work / f'{name}.log', 'a') as log:
            for attempt in itertools.count():
                if self.stopping:
                    raise CellError('stopped')
                try:
                    fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not attempt:
                        print(f'{name}: another process works on it. Waiting for it.', flush=True)
                    time.sleep(1)
            yield log

    def execute(self, command: Sequence[str], log: TextIO) -> None:
        """Run a command with its output in a log.

        Raises:
            CellError: It ends with another status than 0.
        """
        env = dict(os.environ, OMP_NUM_THREADS=str(self.threads))
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        self.processes.add(process)
        if self.stopping:  # the signal came between
            process.send_signal(signal.SIGTERM)
        status = process.wait()
        self.processes.discard(process)
        if status:
            last = (Path(log.name).read_text(errors='replace').strip().splitlines() or [''])[-1]
            raise CellError('stopped' if self.stopping else f'status {status}: {last}')

    def restore_teacher(self) -> None:
        """Bring the teacher that is kept with the results to the folder of the runs, unless it is there."""
        cell, kept = teacher_cell(self.scale), self.results / 'teacher'
        if cell is None or not self.has_result(cell) or not all((kept / name).exists() for name in TEACHER_FILES):
            return
        with self.locked(cell.name):
            if self.has_output(cell) and weights_hash(kept) == self.teacher_weights():
                return
            shutil.rmtree(self.work / cell.name, ignore_errors=True)
            shutil.copytree(kept, self.work / cell.name)
            self.write_log(cell, dict(definition=definition(cell), commits=[], seconds=0.))

    def run_cell(self, cell: Cell) -> Dict[str, Any]:
        """Run a cell and keep its figures, which are returned.

        Raises:
            CellError: There are none.
        """
        with self.locked(cell.name) as output:
            log, commit = self.read_log(cell), git_commit()
            teacher = self.teacher_weights() if is_taught(cell) else ''
            if (log.get('definition'), log.get('teacher', teacher)) != (definition(cell), teacher):  # of another run
                shutil.rmtree(self.work / cell.name, ignore_errors=True)
                log = dict(definition=definition(cell), commits=[], seconds=0.)
            if teacher:
                log['teacher'] = teacher
            if commit not in log['commits']:
                log['commits'].append(commit)
            command, start = self.command(cell), time.monotonic()
            try:
                self.write_log(cell, log)
                self.execute([*([sys.executable] if cell.program == 'diversity' else self.launcher), *command], output)
            finally:
                log['seconds'] += time.monotonic() - start
                self.write_log(cell, log)
            figures = READERS[cell.program](self.work / cell.name)
            self.keep_files(cell)
            result = dict(
                name=cell.name, command=self.shell_line(cell), seed=cell.seed, **log, **figures, threads=self.threads)
            result['seconds'] = max(1, round(log['seconds']))
            write_bytes(self.result_path(cell.name), json.dumps(result, indent=1).encode())
            return result

    def keep_files(self, cell: Cell) -> None:
        """Attention distances, and the teacher, go beside the results; real validation images beside synthetic ones."""
        folder = self.work / cell.name
        distances = folder / 'attention_distance.csv'
        if distances.exists():
            write_bytes(self.results / f'{cell.name}.distances.csv', distances.read_bytes())
        for name in TEACHER_FILES if cell.name == 'teacher' else ():
            write_bytes(self.results / cell.name / name, (folder / name).read_bytes())
        if cell.program == 'data_free':
            link = folder / 'validation'
            link.unlink(missing_ok=True)
            link.symlink_to(validation_folder(self.data / cell.data))

    def shell_line(self, cell: Cell) -> str:
        """The command as a user would give it."""
        alone = self.launcher == [sys.executable] or cell.program == 'diversity'
        return shlex.join([*(['python'] if alone else self.launcher), *self.command(cell)])

    def write_log(self, cell: Cell, log: Dict[str, Any]) -> None:
        write_bytes(self.work / f'{cell.name}.json', json.dumps(log).encode())

    def stop(self, signum: int, *_: Any) -> None:
        """Let the cells that run write their checkpoints, and begin no other."""
        self.stopping = True
        for process in list(self.processes):
            process.send_signal(signal.SIGTERM)

    def time_left(self, cells: List[Cell]) -> str:
        if not self.cost:
            return ''
        minutes = round(sum(cell.cost for cell in cells) * self.seconds / self.cost / self.jobs / 60)
        return f', about {minutes // 60}:{minutes % 60:02} h left'

    def missing(self, cells: Sequence[Cell]) -> Dict[str, Cell]:
        """The cells without a result, and those whose output they need and that is not there, in order."""
        todo: Dict[str, Cell] = {}

        def add(cell: Cell) -> None:
            for need in cell.needs:
                if not self.has_output(need):
                    add(need)
            todo.setdefault(cell.name, cell)

        for cell in cells:
            if not self.has_result(cell):
                add(cell)
        return todo

    def run(self, cells: Sequence[Cell]) -> bool:
        """Run what has no result yet. Returns whether all cells have one in the end."""
        try:
            if any(map(is_taught, cells)):
                self.restore_teacher()
        except CellError:  # asked to stop while another driver has it
            print('Stopped. The same command goes on.', file=sys.stderr)
            return False
        todo = self.missing(cells)
        print(f'{len(cells)} cells, {sum(cell.name not in todo for cell in cells)} of them done', flush=True)
        waiting, failed = dict(todo), {}  # type: ignore[var-annotated]
        futures: Dict[Future, Cell] = {}
        finished: Set[str] = set()
        with ThreadPoolExecutor(self.jobs) as pool:
            while futures or (waiting and not self.stopping):
                for name, cell in list(waiting.items()):
                    unmet = [need.name for need in cell.needs if need.name in todo and need.name not in finished]
                    if any(need in failed for need in unmet):
                        failed[name] = f'needs {", ".join(unmet)}'
                        del waiting[name]
                    elif not unmet and len(futures) < self.jobs and not self.stopping:
                        futures[pool.submit(self.run_cell, cell)] = waiting.pop(name)
                for future in wait(futures, return_when=FIRST_COMPLETED).done if futures else ():
                    cell = futures.pop(future)
                    finished.add(cell.name)
                    try:
                        result = future.result()
                    except Exception as e:  # of one cell; the others go on
                        finished.discard(cell.name)
                        failed[cell.name] = str(e) if isinstance(e, CellError) else f'{type(e).__name__}: {e}'
                        print(f'{cell.name}: {failed[cell.name]}', flush=True)
                        continue
                    self.cost, self.seconds = self.cost + cell.cost, self.seconds + result['seconds']
                    figure, = (text.format(result[key]) for key, text in FIGURES.items() if key in result)
                    left = [*waiting.values(), *futures.values()]
                    print(f'{cell.name}: {figure} ({len(left)} cells{self.time_left(left)})', flush=True)
        for name, problem in failed.items():
            print(f'No result: {name}: {problem}', file=sys.stderr)
        if self.stopping:
            print('Stopped. The same command goes on.', file=sys.stderr)
        return not failed and not waiting
