"""The scripts behind `make demo`, in small."""
import os
import shlex

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


@pytest.mark.slow
def test_report(out):
    """The demo's commands with fewer epochs, then its table and picture."""
    script = (ROOT / 'examples' / 'digits.sh').read_text()
    script = script.replace('--track', '--epochs 2 --track').replace('--epochs 15', '--epochs 1')
    commands = [line for line in script.replace('\\\n', ' ').splitlines() if line.startswith('python')]
    assert len(commands) == 5
    for command in commands[1:]:
        command = command.partition(' > ')[0].removesuffix('&').replace('$OUT', str(out))
        result = run_python(*shlex.split(command)[1:])
        assert result.returncode == 0, result.stderr
    table = [line for line in result.stdout.splitlines() if line.startswith('|')]
    assert [row.split('|')[1].strip() for row in table[2:]] == ['CNN teacher', 'plain ViT', 'DearKD student']
    assert [row.split('|')[3].strip() for row in table[2:]] == ['1,257', '125', '125']
    assert (out / 'digits.png').stat().st_size > 10_000
