"""The scripts behind `make demo`, in small."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT, run_python

pytest.importorskip('matplotlib')
pytest.importorskip('sklearn')


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob('*.png')}


@pytest.fixture(scope='module')
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp('digits')
    result = run_python('examples/digits_data.py', out / 'data', '--seed', '3')
    assert result.returncode == 0, result.stderr
    return out


@pytest.mark.slow
def test_splits_are_disjoint_balanced_and_the_seeds_own(out):
    data = out / 'data'
    train, few, validation = (files(data / name) for name in ('train', 'train_10pct', 'validation'))
    assert len(train) + len(validation) == 1797 and not train & validation
    assert few < train and len(few) == len(train) // 10
    for split in (train, few, validation):
        counts = [sum(name.startswith(f'{digit}{os.sep}') for name in split) for digit in range(10)]
        assert min(counts) > 0.8 * len(split) / 10
    other = out / 'other'
    for seed, same in ((4, False), (3, True)):  # written anew over what it wrote before
        assert run_python('examples/digits_data.py', other, '--seed', seed).returncode == 0
        assert (files(other) == files(data)) == same


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / 'photo.jpg').write_bytes(b'precious')
    result = run_python('examples/digits_data.py', tmp_path)
    assert result.returncode == 2 and (tmp_path / 'photo.jpg').read_bytes() == b'precious'


@pytest.mark.integrations
def test_the_whole_script(tmp_path):
    """The demo with fewer epochs: its table and picture, and the folder of somebody else that it refuses."""
    env = dict(os.environ, PATH=f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}')
    script = (ROOT / 'examples' / 'digits.sh').read_text()
    assert script.count('--epochs 15') == 1  # the teacher's
    command = ['sh', '-c', script.replace('--epochs 15', '--epochs 3'), 'examples/digits.sh', tmp_path / 'out', '3',
               '--epochs', '2']
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table = [line for line in result.stdout.splitlines() if line.startswith('|') and line.count('|') == 6]
    assert [row.split('|')[1].strip() for row in table[2:]] == ['CNN teacher', 'plain ViT', 'DearKD student']
    assert [row.split('|')[3].strip() for row in table[2:]] == ['1,257', '125', '125']
    assert (tmp_path / 'out' / 'digits.png').stat().st_size > 10_000

    (tmp_path / 'mine' / 'student').mkdir(parents=True)
    command[4] = tmp_path / 'mine'
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 2 and (tmp_path / 'mine' / 'student').exists()
    assert 'runs of something else' in result.stderr


@pytest.mark.integrations
def test_the_whole_script_without_real_images(tmp_path):
    """The data-free demo with few images and steps: its table and its picture."""
    script = (ROOT / 'examples' / 'data_free_digits.sh').read_text()
    for long, short in (
            ('torchrun --standalone --nproc_per_node=2', 'python'), ('--epochs 40', '--epochs 1'),
            ('--val-interval 40', '--val-interval 1'),
            ('--epochs 20 --val-interval 20', '--epochs 1 --val-interval 1 --train-batches-per-epoch 2'),
            ('--num-images 480', '--num-images 120'), ('32:130:0.3', '32:3:0.3'),
            ('--num-images 3840', '--num-images 60 --images-per-class 3 --resolutions 32:3:0.005')):
        assert script.count(long) == 1
        script = script.replace(long, short)
    env = dict(os.environ, PATH=f'{os.path.dirname(sys.executable)}{os.pathsep}{os.environ["PATH"]}')
    command = ['sh', '-c', script, 'examples/data_free_digits.sh', tmp_path / 'out', '3']
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.split('|') for line in result.stdout.splitlines() if line.startswith('|')][-3:]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [
        ('DeepInversion', '120'), ('generator', '60'), ('real images', '480')]
    assert (tmp_path / 'out' / 'images.png').stat().st_size > 10_000
