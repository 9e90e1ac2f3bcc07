"""Run cells in parallel processes, skip finished cells and resume unfinished ones."""
import argparse
import fcntl
import hashlib
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
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, TextIO

from reproduction.cells import (
    ROOT,
    Cell,
    CellError,
    Scale,
    definition,
    image_arguments,
    read_recipe,
    teacher_cell,
)
from reproduction.prepare import files_hash, validation_folder
from reproduction.results import (
    FIGURES,
    READERS,
    TEACHER_FILES,
    is_current,
    own_models,
    read_result,
    weights_hash,
)
from timm_dearkd.files import write_bytes, write_text

ALONE = ('merge', 'diversity')  # programs that one process runs


def git_commit() -> str:
    """Return the commit of the code, with a '+' if there are uncommitted changes; '' outside of a clone."""
    def git(*args: str) -> str:
        return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    if not shutil.which('git'):
        return ''
    changed = git('status', '--porcelain', '--untracked-files=no', '--', ':!reproduction/results')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')


def count_processes(launcher: Sequence[str]) -> int:
    """Return the number of processes that a launcher starts: torchrun's by its arguments, Python's is 1.

    Raises:
        ValueError: If the number is not given, or the launcher is unknown.
    """
    if 'torchrun' not in map(os.path.basename, launcher) and 'torch.distributed.run' not in launcher:
        if 'python' in os.path.basename(launcher[0]):
            return 1
        raise ValueError(
            f'--launcher {shlex.join(launcher)} is not supported, expected torchrun. Use torchrun, or omit --launcher.')
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--nnodes', default='1')
    parser.add_argument('--nproc_per_node', '--nproc-per-node', default='1')
    args, _ = parser.parse_known_args(launcher)
    if not (args.nnodes.isdecimal() and args.nproc_per_node.isdecimal()):
        raise ValueError(
            f'--launcher has --nnodes {args.nnodes} and --nproc_per_node {args.nproc_per_node}, expected two numbers.')
    return int(args.nnodes) * int(args.nproc_per_node)


def is_taught(cell: Cell) -> bool:
    """Return whether the result of a cell depends on the teacher."""
    return any(need.name == 'teacher' or is_taught(need) for need in cell.needs)


class Driver:
    """Runs cells in parallel processes.

    Args:
        scale: Size of the experiments.
        data: Folder of the data sets.
        work: Folder of the runs.
        results: Folder of the JSON files.
        jobs: Number of cells to run in parallel. Each gets an equal share of the cores.
        launcher: Command that starts a program: Python, or torchrun with its arguments.
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
        self.hashes: Dict[str, str] = {}
        self.stopping = False
        self.labels_read = self.labels_computed = 0
        self.cost = self.seconds = 0.  # of the cells that finished, for the estimate of the time left

    def result_path(self, name: str) -> Path:
        return self.results / f'{name}.json'

    def has_result(self, cell: Cell) -> bool:
        """Return whether there is a result of the cell with its current definition, models and photographs."""
        result = self.read_result(cell.name)
        photos = self.inputs(cell).get('photos')
        return result is not None and is_current(cell, result, self.read_result) and photos in (
            None, result.get('photos'))

    def read_result(self, name: str) -> Optional[Dict[str, Any]]:
        return read_result(self.result_path(name))

    def inputs(self, cell: Cell) -> Dict[str, Any]:
        """Return what a run depends on besides its definition: the teacher, other models and the user's photographs."""
        found = dict(
            teacher=self.teacher_weights() if is_taught(cell) else '',
            models={need.name: weights_hash(self.work / need.name) for need in own_models(cell)},
            photos=self.photos_hash(cell.data) if cell.data.startswith('photos/') else '')
        return {name: value for name, value in found.items() if value}

    def photos_hash(self, name: str) -> str:
        """Return the `files_hash` of a folder of photographs, as it was when the driver first looked."""
        if not self.hashes.get(name):  # the folder may not have been there
            self.hashes[name] = files_hash(self.data / name)
        return self.hashes[name]

    def is_same_run(self, cell: Cell, log: Dict[str, Any]) -> bool:
        """Return whether a record is of the cell with its current definition and inputs."""
        return log.get('definition') == definition(cell) and all(
            log.get(name, value) == value for name, value in self.inputs(cell).items())

    def read_log(self, cell: Cell) -> Dict[str, Any]:
        """Return the driver's record of a run."""
        path = self.work / f'{cell.name}.json'
        return json.loads(path.read_text()) if path.exists() else {}

    def has_output(self, cell: Cell) -> bool:
        """Return whether the output that other cells need exists, with the cell's current definition."""
        names = dict(data_free='manifest.json', merge='merged.json')
        name = names.get(cell.program, 'model_best.safetensors')
        return (self.work / cell.name / name).exists() and self.is_same_run(cell, self.read_log(cell))

    def has_figures(self, cell: Cell) -> bool:
        """Return whether the result of a model that other cells need is that of its weights."""
        if cell.program != 'train' or cell.name == 'teacher':
            return True
        return (self.read_result(cell.name) or {}).get('weights') == weights_hash(self.work / cell.name)

    def path(self, path: Path) -> str:
        """Return a path for a command, relative to the repository if it is inside."""
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)

    def teacher(self) -> str:
        return self.scale.teacher_name or self.path(self.work / 'teacher')

    def teacher_weights(self) -> str:
        """Return the `weights_hash` of the trained teacher; '' if the teacher is timm's."""
        return weights_hash(self.work / 'teacher')

    def command(self, cell: Cell) -> List[str]:
        """Return the launcher's arguments that run or resume a cell."""
        work, argv = self.path(self.work), list(cell.argv)
        for name, value in (('{runs}', work), ('{data}', self.path(self.data)), ('{teacher}', self.teacher())):
            argv = [arg.replace(name, value) for arg in argv]
        data = self.path(self.work / cell.data[1:] if cell.data.startswith('/') else self.data / cell.data)
        if cell.program == 'distill':
            return ['-m', 'timm_dearkd', 'distill', data, *argv, '--seed', str(cell.seed), '--output',
                    f'{work}/{cell.name}']
        if cell.program == 'data_free':
            return ['-m', 'timm_dearkd.data_free', f'{work}/{cell.name}', *argv, '--seed', str(cell.seed), '--resume']
        if cell.program == 'merge':
            return ['reproduction/merge.py', f'{work}/{cell.name}', *argv]
        if cell.program == 'diversity':
            return ['-m', 'timm_dearkd.analysis', 'diversity', data, *argv, '--seed', str(cell.seed), '--output',
                    f'{work}/{cell.name}/diversity.json', '--overwrite']
        return [
            'train.py', data, *argv, *self.accumulation(cell), *self.label_cache(cell, argv), '--seed', str(cell.seed),
            '--output', work, '--experiment', cell.name, '--resume', 'auto']

    def label_cache(self, cell: Cell, argv: Sequence[str]) -> List[str]:
        """Return the arguments for the teacher's labels, which cells with the same images and teacher share.

        Args:
            cell: A run of train.py.
            argv: Its arguments, without placeholders.
        """
        teacher = dict(zip(argv, argv[1:])).get('--kd-model-name')
        # the cache keeps hard labels, and is for DearKD
        is_soft = (read_recipe(cell) or {}).get('dearkd_soft_labels') or '--dearkd-soft-labels' in argv
        is_other = is_soft or '--kd-distill-type' in argv
        if not teacher or is_other or cell.data.startswith('/'):  # each student has synthetic images of its own
            return []
        parts = [
            cell.data, cell.seed, image_arguments(argv), read_recipe(cell), weights_hash(ROOT / teacher),
            count_processes(self.launcher)]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
        return ['--kd-label-cache', f'{self.path(self.work)}/labels/{key}']

    def accumulation(self, cell: Cell) -> List[str]:
        """Return the arguments that give several processes the batch size of one process.

        Raises:
            ValueError: If the accumulation steps cannot be divided among the processes.
        """
        num_processes = count_processes(self.launcher)
        if num_processes == 1:
            return []
        recipe = read_recipe(cell) or {}
        given = dict(zip(cell.argv, cell.argv[1:]))
        steps = int(given.get('--grad-accum-steps', recipe.get('grad_accum_steps', 1)))
        if steps % num_processes:
            raise ValueError(
                f'--launcher starts {num_processes} processes, but {cell.name} has {steps} accumulation steps. Start a'
                ' number of processes that divides them.')
        return ['--grad-accum-steps', str(steps // num_processes)]

    @contextmanager
    def locked(self, name: str) -> Iterator[TextIO]:
        """Open and lock the log of a cell. Programs that write to the log hold the lock while they run.

        Raises:
            CellError: If the driver is stopped while another driver holds the lock.
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
                        print(f'{name}: waiting for another process that runs it.', flush=True)
                    time.sleep(1)
            yield log

    def execute(self, command: Sequence[str], log: TextIO) -> None:
        """Run a command, and write its output to a log.

        Raises:
            CellError: If its status is not 0.
        """
        env = dict(os.environ, OMP_NUM_THREADS=str(self.threads))
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        self.processes.add(process)
        if self.stopping:  # the signal came before the process was registered
            process.send_signal(signal.SIGTERM)
        status = process.wait()
        self.processes.discard(process)
        if status:
            last = (Path(log.name).read_text(errors='replace').strip().splitlines() or [''])[-1]
            raise CellError('stopped' if self.stopping else f'status {status}: {last}')

    def restore_teacher(self) -> None:
        """Copy the teacher from the results to the folder of the runs, unless it is there."""
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
        """Run a cell, and write and return its result.

        Raises:
            CellError: If the command fails or writes no figures.
        """
        with self.locked(cell.name) as output:
            log, commit = self.read_log(cell), git_commit()
            if not self.is_same_run(cell, log):
                shutil.rmtree(self.work / cell.name, ignore_errors=True)
                log = dict(definition=definition(cell), commits=[], seconds=0.)
            log.update(self.inputs(cell))
            if commit not in log['commits']:
                log['commits'].append(commit)
            command, start = self.command(cell), time.monotonic()
            launcher = [sys.executable] if cell.program in ALONE else self.launcher
            try:
                self.write_log(cell, log)
                self.execute([*launcher, *command], output)
            finally:
                log['seconds'] += time.monotonic() - start
                self.write_log(cell, log)
            figures = READERS[cell.program](self.work / cell.name)
            self.keep_files(cell)
            result = dict(
                name=cell.name, command=self.shell_line(cell), seed=cell.seed, **log, **figures, threads=self.threads)
            result['seconds'] = max(1, round(log['seconds']))
            if cell.program == 'train':
                result['weights'] = weights_hash(self.work / cell.name)
            write_text(self.result_path(cell.name), json.dumps(result, indent=1))
            return result

    def keep_files(self, cell: Cell) -> None:
        """Copy attention distances and the teacher to the results; link real validation images to synthetic ones."""
        folder = self.work / cell.name
        distances = folder / 'attention_distance.csv'
        if distances.exists():
            write_bytes(self.results / f'{cell.name}.distances.csv', distances.read_bytes())
        for name in TEACHER_FILES if cell.name == 'teacher' else ():
            write_bytes(self.results / cell.name / name, (folder / name).read_bytes())
        if cell.program in ('data_free', 'merge'):
            link = folder / 'validation'
            link.unlink(missing_ok=True)
            link.symlink_to(validation_folder(self.data / cell.data))

    def shell_line(self, cell: Cell) -> str:
        """Return the command as a user would type it."""
        alone = self.launcher == [sys.executable] or cell.program in ALONE
        return shlex.join([*(['python'] if alone else self.launcher), *self.command(cell)])

    def write_log(self, cell: Cell, log: Dict[str, Any]) -> None:
        write_text(self.work / f'{cell.name}.json', json.dumps(log))

    def stop(self, signum: int, *_: Any) -> None:
        """Handle a signal: running cells write their checkpoints, and no other cell starts."""
        self.stopping = True
        for process in list(self.processes):
            process.send_signal(signal.SIGTERM)

    def time_left(self, cells: List[Cell]) -> str:
        if not self.cost:
            return ''
        minutes = round(sum(cell.cost for cell in cells) * self.seconds / self.cost / self.jobs / 60)
        return f', about {minutes // 60}:{minutes % 60:02} h left'

    def missing(self, cells: Sequence[Cell]) -> Dict[str, Cell]:
        """Return the cells without a result and their missing dependencies, in the order to run."""
        todo: Dict[str, Cell] = {}

        def add(cell: Cell) -> None:
            for need in cell.needs:
                if not (self.has_output(need) and self.has_figures(need)):
                    add(need)
            todo.setdefault(cell.name, cell)

        count = -1
        while len(todo) > count:  # a model that is trained again makes other results outdated
            count = len(todo)
            for cell in cells:
                if not self.has_result(cell) or any(need.name in todo for need in own_models(cell)):
                    add(cell)
        return todo

    def report(self, cell: Cell, future: Future, left: List[Cell]) -> str:
        """Print the result of a cell and the time left, or the problem, which is returned."""
        try:
            result = future.result()
        except Exception as e:  # the other cells continue
            problem = str(e) if isinstance(e, CellError) else f'{type(e).__name__}: {e}'
            print(f'{cell.name}: {problem}', flush=True)
            return problem
        self.cost, self.seconds = self.cost + cell.cost, self.seconds + result['seconds']
        self.labels_read += result.get('labels_read', 0)
        self.labels_computed += result.get('labels_computed', 0)
        figures = ', '.join(text.format(result[key]) for key, text in FIGURES.items() if key in result)
        print(f'{cell.name}: {figures} ({len(left)} cells{self.time_left(left)})', flush=True)
        return ''

    def run(self, cells: Sequence[Cell]) -> bool:
        """Run the cells without a result. Return whether all cells have a result in the end."""
        try:
            if any(map(is_taught, cells)):
                self.restore_teacher()
        except CellError:  # stopped while another driver holds the lock
            print('Stopped. Run the same command to resume.', file=sys.stderr)
            return False
        todo = self.missing(cells)
        self.labels_read = self.labels_computed = 0
        print(f'{len(cells)} cells, {sum(cell.name not in todo for cell in cells)} finished', flush=True)
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
                    problem = self.report(cell, future, [*waiting.values(), *futures.values()])
                    if problem:
                        failed[cell.name] = problem
                    else:
                        finished.add(cell.name)
        labels = self.labels_read + self.labels_computed
        if labels:
            print(f'The teacher labelled {self.labels_computed} of {labels} images. The other labels'
                  f' ({100 * self.labels_read / labels:.0f} %) were in {self.path(self.work)}/labels.', flush=True)
        for name, problem in failed.items():
            print(f'No result: {name}: {problem}', file=sys.stderr)
        if self.stopping:
            print('Stopped. Run the same command to resume.', file=sys.stderr)
        return not failed and not waiting
