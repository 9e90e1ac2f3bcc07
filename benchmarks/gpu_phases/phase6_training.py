"""Phase 6: train.py on a folder of JPEGs over both stages, stopped and resumed."""
import csv
import logging
import math
import multiprocessing
import os
import re
import runpy
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import timm
import torch
from PIL import Image

from .check import Check, at_most, die_with_parent

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 4
LAST_EPOCH = 1
# From a process that has imported everything, and has not touched the GPU; it runs the script as `python` would
CONTEXT: Any = multiprocessing.get_context('fork')


def make_images(folder: Path, side: int, per_class: int) -> None:
    """Classes of smooth noise as JPEG files, with a colour each."""
    rng = np.random.default_rng(0)
    for split, count in (('train', per_class), ('validation', max(2, per_class // 8))):
        for label in range(CLASSES):
            place = folder / split / f'class{label}'
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (8, 8, 3), dtype=np.uint8)
                pixels[..., label % 3] += 20 * (label + 1) // 2
                Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(
                    place / f'{i}.jpg', quality=90)


class Runs:
    """Runs of train.py with the same options, each in a process and an output folder of its own.

    Args:
        check: The phase.
        folder: Where images, weights and runs go.
    """

    def __init__(self, check: Check, folder: Path) -> None:
        self.check = check
        self.folder = folder
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a process that has started OpenMP's threads must not fork
        toy = check.toy
        self.updates = 3 if toy else 12
        self.batch_size = 4 if toy else 64
        make_images(folder / 'images', 40 if toy else 256, self.updates * self.batch_size // CLASSES)
        teacher = 'test_resnet' if toy else 'regnety_032'
        torch.manual_seed(0)
        torch.save(timm.create_model(teacher, num_classes=CLASSES).state_dict(), folder / 'teacher.pth')
        (folder / 'unpinned.yaml').write_text('pin_mem: false\n')
        (folder / 'pinned.yaml').write_text('pin_mem: true\n')
        student = ('test_dearkd', '--img-size', '32') if toy else ('dearkd_tiny_patch16_224',)
        self.options = [
            str(folder / 'images'), '--model', *student, '--kd-model-name', teacher, '--kd-teacher-checkpoint',
            str(folder / 'teacher.pth'), '--device', check.device_type, '--batch-size', str(self.batch_size),
            '--epochs', str(LAST_EPOCH + 1), '--dearkd-stage1-epochs', '1', '--warmup-epochs', '0', '--opt', 'adamw',
            '--lr', '1e-4', '--workers', '0' if toy else '8', '--output', str(folder / 'runs'), '--amp',
            '--channels-last', '--drop-path', '0.1', '--mixup', '0.8', '--cutmix', '1', '--reprob', '0.25',
            '--aa', 'rand-m9-mstd0.5-inc1', '--model-ema', '--model-ema-decay', '0.9', '--log-interval', '1',
        ]

    def run_folder(self, name: str) -> Path:
        return self.folder / 'runs' / name

    def log(self, name: str) -> Path:
        return self.folder / f'{name}.log'

    def run(self, name: str, *options: str, dtype: str = 'bfloat16', stop: bool = False) -> None:
        """Run to the end, or until SIGTERM stops it within the last epoch.

        Raises:
            RuntimeError: If it ends with another status than it should, with the end of its output.
        """
        argv = [*self.options, '--experiment', name, '--amp-dtype', dtype, *options]
        process = CONTEXT.Process(target=_train, args=(argv, self.log(name), self.threads, stop))
        process.start()
        process.join()
        if process.exitcode != (128 + signal.SIGTERM if stop else 0):
            raise RuntimeError(f'train.py ended with status {process.exitcode}: {self.tail(name)}')

    def tail(self, name: str) -> str:
        return ' / '.join(self.log(name).read_text(errors='replace').strip().splitlines()[-3:])

    def losses(self, name: str) -> List[float]:
        """All figures of summary.csv."""
        with open(self.run_folder(name) / 'summary.csv', newline='') as f:
            return [float(value) for row in csv.DictReader(f) for value in row.values() if value]

    def images_per_second(self, name: str) -> float:
        """Median speed of the updates of the last epoch after the first one, which may compile."""
        text = self.log(name).read_text(errors='replace')
        found = [float(speed) for speed in re.findall(rf'Train: {LAST_EPOCH} .* ([\d.]+) img/s', text)]
        return statistics.median(found[1:]) if len(found) > 1 else math.nan


class _Stop(logging.Handler):
    """Sends SIGTERM to this process at the first log line of the last epoch: from outside, it could come too late."""

    def emit(self, record: logging.LogRecord) -> None:
        if re.search(rf'Train: {LAST_EPOCH} .*\[ *1/', record.getMessage()):
            os.kill(os.getpid(), signal.SIGTERM)


def _train(argv: List[str], log: Path, threads: int, stop: bool) -> None:
    """Run `python train.py ARGV` in this process, with the output appended to a file."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.default_int_handler)
    die_with_parent()
    logging.disable(logging.NOTSET)
    with open(log, 'ab') as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    torch.set_num_threads(threads)
    if stop:
        logging.getLogger('timm_dearkd.engine.loop').addHandler(_Stop())
    sys.argv[:] = ['train.py', *argv]
    runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')


def run(check: Check) -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(check, Path(folder))
        seconds = 0. if check.toy else 15.  # of a run, until one was timed
        start = time.monotonic()
        with check.part('bfloat16'):
            runs.run('whole', '--save-images')
            write_finite(check, runs, 'whole', 'bfloat16')
        if not check.toy:
            seconds = time.monotonic() - start
        if check.has_time('stopped by SIGTERM and resumed', 1.3 * seconds):
            with check.part('stopped by SIGTERM and resumed'):
                stop_and_resume(check, runs)
        if check.has_time('deterministic', 1.5 * seconds):
            with check.part('deterministic'):
                deterministic(check, runs)
        if check.toy:
            for name in ('float16', 'compiled'):
                check.skip(name, 'the toy size runs train.py five times')
        elif check.has_time('float16', seconds):
            with check.part('float16'):
                runs.run('float16', dtype='float16')
                write_finite(check, runs, 'float16', 'float16')
        if not check.is_cuda:
            check.skip('pinned memory', 'a CPU has no use for it')
        elif check.has_time('pinned memory', 2 * seconds):
            with check.part('pinned memory'):
                pinned_memory(check, runs)
        if not check.toy and check.has_time('compiled', 2.5 * seconds):
            with check.part('compiled'):
                runs.run('compiled', '--torchcompile', check.backend)
                write_finite(check, runs, 'compiled', 'bfloat16, compiled')


def write_finite(check: Check, runs: Runs, name: str, label: str) -> None:
    """Write a row with the number of figures in summary.csv that are not finite."""
    figures = runs.losses(name)
    check.row(
        f'figures of summary.csv that are not finite, {label}', sum(not math.isfinite(x) for x in figures),
        f'of {len(figures)}', at_most(0), images_per_second=runs.images_per_second(name))


def pinned_memory(check: Check, runs: Runs) -> None:
    speeds = {}
    for name in ('unpinned', 'pinned'):
        runs.run(name, '-c', str(runs.folder / f'{name}.yaml'))
        speeds[name] = runs.images_per_second(name)
    check.row('train.py, pinned memory', speeds['pinned'] / speeds['unpinned'], 'x not pinned', **speeds)


def deterministic(check: Check, runs: Runs) -> None:
    """Two runs of stage I with `--deterministic`."""
    for name in ('deterministic', 'repeated'):
        runs.run(name, '--deterministic', '--stop-epoch', '1')
    first, second = (
        torch.load(runs.run_folder(name) / 'last.pth.tar', map_location='cpu', weights_only=False)['state_dict']
        for name in ('deterministic', 'repeated'))
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    check.row('tensors that differ between two --deterministic runs', len(differing), f'of {len(first)}', at_most(0))


def stop_and_resume(check: Check, runs: Runs) -> None:
    """Stop a run within its last epoch, resume it, and compare with the run that was not stopped."""
    runs.run('resumed', '--save-images', stop=True)
    check.data('stopped', checkpoints=sorted(path.name for path in runs.run_folder('resumed').glob('*.pth.tar')))
    runs.run('resumed', '--save-images', '--resume', 'auto')
    whole, resumed = runs.run_folder('whole'), runs.run_folder('resumed')
    differing = [
        update for update in range(1, runs.updates + 1)
        if read_batch(whole, update) is None or read_batch(whole, update) != read_batch(resumed, update)]
    check.row(
        'batches that differ after resuming', len(differing), f'of {runs.updates}', at_most(0), updates=differing)
    first, second = (torch.load(place / 'last.pth.tar', map_location='cpu', weights_only=False)
                     for place in (whole, resumed))
    states = compare_states(first['rng_states'], second['rng_states'])
    check.row(
        'states of random generators that differ after resuming', sum(not equal for equal in states.values()),
        f'of {len(states)}', at_most(0), states=states)
    check.row(
        'largest difference of a weight after resuming', largest_difference(first['state_dict'], second['state_dict']),
        expected='0 on a CPU')


def read_batch(folder: Path, update: int) -> Optional[bytes]:
    """The picture of a batch of the last epoch, as --save-images wrote it."""
    path = folder / f'train-batch-{update}.jpg'
    return path.read_bytes() if path.exists() else None


def compare_states(first: Any, second: Any) -> Dict[str, bool]:
    """Whether each generator has the same state in two checkpoints."""
    return {name: _equal(first[0][name], second[0].get(name)) for name in first[0]}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def largest_difference(first: Dict[str, torch.Tensor], second: Dict[str, torch.Tensor]) -> float:
    return torch.stack([(first[name].double() - second[name].double()).abs().max() for name in first]).max().item()
