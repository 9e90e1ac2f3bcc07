import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py is a script of the repository


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_flush_denormal(True)


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


def run_python(*args) -> subprocess.CompletedProcess:
    """Run a Python command in a process of its own, as a user would."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope='session')
def train_cli(image_folder):
    """train.py on the image folder with a small DearKD student, and further arguments."""
    def run(*args, data=image_folder, small=True):
        defaults = [
            '--model', 'test_dearkd', '--img-size', '32', '--batch-size', '8', '--epochs', '2', '--opt', 'adamw',
            '--lr', '1e-3', '--warmup-epochs', '0', '--workers', '0', '--device', 'cpu',
        ] if small else []
        return run_python(ROOT / 'train.py', data, *defaults, *args)
    return run
