import csv
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import numpy as np
import pytest
import torch
from forked import ForkedProcess
from PIL import Image

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test asks the real Hub; without it, the client tries for long
os.environ['OMP_NUM_THREADS'] = '1'  # of the processes that tests start
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py is a script of the repository


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_flush_denormal(True)


@pytest.fixture(autouse=True)
def _logging():
    """Scripts that run in this process set up logging, on a stream that is closed when the test is over."""
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory) -> Path:
    """Three classes of coloured 40x40 noise, 16 images each for training and 4 for validation."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 16), ('validation', 4)):
        for channel, name in enumerate(('blue sky', 'grass', 'rust')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (40, 40, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 120
                Image.fromarray(pixels).save(folder / f'{i}.png')
    return root


def environment_of_commands() -> Dict[str, str]:
    """The variables of Python commands."""
    return {**os.environ, 'PYTHONPATH': str(ROOT)}


def read_at_import() -> Dict[str, str]:
    """What huggingface_hub and torch.compile look at when they are imported, and not again."""
    return {name: value for name, value in os.environ.items() if name.startswith(('HF_', 'CXX'))}


AT_IMPORT = read_at_import()


def start_python(*args, **kwargs) -> subprocess.Popen:
    """Start a Python command in a process, and a process group, of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)], env=environment_of_commands(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **{'cwd': ROOT, **kwargs})


def run_process(*args, **kwargs) -> subprocess.CompletedProcess:
    """Run a Python command, as a user would."""
    process = start_python(*args, **kwargs)
    try:
        out, err = process.communicate(timeout=500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_forked(*args, fresh=(), cwd=ROOT, **environment):
    """Start a Python command in a process, and a process group, that need not import torch: see `forked`."""
    return ForkedProcess([str(arg) for arg in args], {**environment_of_commands(), **environment}, cwd, fresh)


def run_python(*args, **kwargs) -> subprocess.CompletedProcess:
    """`run_process` in a tenth of the time, for scripts and modules that nothing is special about: see `forked`."""
    if args[0] == '-c' or set(kwargs) - {'cwd'} or read_at_import() != AT_IMPORT or not hasattr(os, 'fork'):
        return run_process(*args, **kwargs)
    return run_forked(*args, **kwargs)


def run_forked(*args, **kwargs) -> subprocess.CompletedProcess:
    """Run what `start_forked` starts."""
    process = start_forked(*args, **kwargs)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_ranks(*args) -> subprocess.CompletedProcess:
    """Run a script or module in two processes with the variables that torchrun sets, and join what they write."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    group = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    processes = [start_forked(*args, **group, RANK=rank, LOCAL_RANK=rank) for rank in ('0', '1')]
    outs, errs = zip(*(process.communicate() for process in processes))
    status = next((process.returncode for process in processes if process.returncode), 0)
    return subprocess.CompletedProcess(processes[0].args, status, ''.join(outs), ''.join(errs))


SMALL = (
    '--model', 'test_dearkd', '--img-size', '32', '--batch-size', '8', '--epochs', '2', '--opt', 'adamw',
    '--lr', '1e-3', '--warmup-epochs', '0', '--workers', '0', '--device', 'cpu',
)


def read_summary(folder: Path) -> List[Dict[str, str]]:
    """Return the rows of a run's `summary.csv`."""
    with (folder / 'summary.csv').open(newline='') as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope='session')
def train_cli(image_folder):
    """train.py on the image folder with a small DearKD student, and further arguments."""
    def run(*args, data=image_folder, small=True, start=run_python, launcher=(), **kwargs):
        return start(*launcher, ROOT / 'train.py', data, *(SMALL if small else ()), *args, **kwargs)
    return run


@pytest.fixture(scope='session')
def cnn(train_cli, tmp_path_factory) -> Path:
    """The folder of a small CNN that train.py trained on the images."""
    out = tmp_path_factory.mktemp('teacher')
    result = train_cli('--model', 'test_resnet', '--output', out, '--experiment', 'cnn', '--epochs', '1')
    assert result.returncode == 0, result.stderr
    return out / 'cnn'
