"""Runs that are stopped, killed and resumed, against the run that never was."""
import contextlib
import csv
import importlib
import os
import resource
import shutil
import signal
import time

import pytest
import torch
from conftest import SMALL, start_forked

EXACT = (
    '--epochs', '3', '--dearkd-stage1-epochs', '1', '--mixup', '0.5', '--cutmix', '0.5', '--aa', 'rand-m9-mstd0.5-inc1',
    '--reprob', '0.5', '--drop', '0.1', '--drop-path', '0.2', '--dearkd-rpe-drop', '0.1', '--model-ema',
    '--model-ema-decay', '0.8', '--sched-on-updates', '--log-interval', '4', '--checkpoint-hist', '1', '--affine-aug',
    'edge', '--dearkd-labels', 'teacher',
)


@pytest.fixture(scope='module')
def exact_cli(train_cli, cnn):
    """train.py with all that draws random numbers."""
    def run(*args, **kwargs):
        return train_cli('--kd-model-name', f'local-dir:{cnn}', *EXACT, *args, **kwargs)
    return run


@pytest.fixture(scope='module')
def whole(exact_cli, tmp_path_factory):
    """The run that goes through."""
    out = tmp_path_factory.mktemp('whole')
    result = exact_cli('--output', out, '--experiment', 'run')
    assert result.returncode == 0, result.stderr
    return out / 'run'


def load(folder):
    return torch.load(folder / 'last.pth.tar', weights_only=False)


def flatten(state):
    if isinstance(state, dict):
        return [item for key in sorted(state, key=str) for item in flatten(state[key])]
    if isinstance(state, (list, tuple)):
        return [item for value in state for item in flatten(value)]
    return [state]


def assert_same_run(folder, whole):
    """The same weights, averages, optimizer and summary, bit for bit."""
    ours, theirs = load(folder), load(whole)
    for key in ('epoch', 'state_dict', 'state_dict_ema', 'task_state', 'task_state_ema', 'optimizer', 'rng_states'):
        a, b = flatten(ours[key]), flatten(theirs[key])
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert x.equal(y) if isinstance(x, torch.Tensor) else x == y, key
    assert (folder / 'summary.csv').read_text() == (whole / 'summary.csv').read_text()


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize('workers', ['0', '2'])
def test_resuming_an_epoch_is_exact(workers, exact_cli, whole, tmp_path):
    """Stopped after epochs 1 and 2, within the stages and between them."""
    for args in (['--stop-epoch', '1'], ['--stop-epoch', '2'], []):
        result = exact_cli(
            '--workers', workers, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto', *args)
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / 'run', whole)


@pytest.mark.slow
@pytest.mark.parametrize('workers', ['0', '2'])
def test_sigkill_at_any_moment(workers, exact_cli, whole, tmp_path):
    """Killed within each epoch, the run goes on from the last recovery checkpoint, exactly."""
    command = (
        '--workers', workers, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto', '--recovery-interval',
        '2')
    for name in ('recovery-0-4', 'recovery-1-2', 'recovery-2-4'):
        process = exact_cli(*command, start=start_forked)
        wait_for(tmp_path / 'run' / f'{name}.pth.tar', process)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    (tmp_path / 'run' / 'tmp.pth.tar').write_bytes(b'half a checkpoint')
    result = exact_cli(*command)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / 'run', whole)


@pytest.mark.parametrize('signum,to_group', [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_signals_end_the_run_at_a_checkpoint(signum, to_group, exact_cli, whole, tmp_path):
    """Sent to the process, or to its loader's processes too; the run goes on exactly."""
    command = ('--workers', '2', '--output', tmp_path, '--experiment', 'run', '--resume', 'auto')
    process = exact_cli(*command, start=start_forked)
    wait_for(tmp_path / 'run' / 'last.pth.tar', process)
    (os.killpg if to_group else os.kill)(process.pid, signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and 'Traceback' not in err
    assert f'Interrupted by {signal.Signals(signum).name}' in err.splitlines()[-1]
    assert len(list((tmp_path / 'run').glob('recovery-*.pth.tar'))) == 1
    result = exact_cli(*command)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / 'run', whole)


def test_labels_that_are_kept(exact_cli, whole, tmp_path):
    """A run that writes the teacher's labels, killed and resumed within stage I, and one that reads them."""
    command = ('--kd-label-cache', tmp_path / 'labels', '--output', tmp_path, '--experiment')
    process = exact_cli(*command, 'writes', '--recovery-interval', '1', start=start_forked)
    wait_for(tmp_path / 'writes' / 'recovery-0-2.pth.tar', process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    for name, args in (('writes', ['--resume', 'auto']), ('reads', ['--workers', '2', '--amp-dtype', 'bfloat16'])):
        result = exact_cli(*command, name, *args)
        assert result.returncode == 0, result.stderr
        assert_same_run(tmp_path / name, whole)
    # 6 batches of 8 in three epochs. The first batch is checked
    line, = (line for line in result.stderr.splitlines() if line.startswith('Labels of the teacher'))
    assert line.startswith('Labels of the teacher: 136 read (94 %), 8 computed.')


def test_a_signal_in_the_evaluation(exact_cli, whole, tmp_path):
    """It is left at once; the epoch goes on with it, exactly."""
    command = (
        '-vb', '1', '--recovery-interval', '6', '--output', tmp_path, '--experiment', 'run', '--resume', 'auto')
    process = exact_cli(*command, start=start_forked)
    wait_for(tmp_path / 'run' / 'recovery-0-6.pth.tar', process)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and 'recovery-0-6.pth.tar' in err.splitlines()[-1], err
    assert exact_cli(*command).returncode == 0
    ours, theirs = load(tmp_path / 'run')['state_dict'], load(whole)['state_dict']
    assert all(value.equal(theirs[name]) for name, value in ours.items())


def half_written(folder):
    """Temporary files of checkpoints, each with its time."""
    found = set()
    for pattern in ('tmp*', 'recovery_tmp*'):
        for path in folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                found.add((path, path.stat().st_mtime_ns))
    return found


@pytest.mark.slow
def test_killed_while_writing(exact_cli, whole, tmp_path):
    """Whatever was being written, what is there is whole."""
    command = ('--output', tmp_path, '--experiment', 'run', '--resume', 'auto', '--recovery-interval', '1')
    for count in range(6):
        process = exact_cli(*command, start=start_forked)
        seen, end = half_written(tmp_path / 'run'), time.monotonic() + 60
        while not half_written(tmp_path / 'run') - seen and time.monotonic() < end and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(0.003 * count)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for path in (tmp_path / 'run').glob('*.pth.tar'):
            if 'tmp' not in path.name:
                torch.load(path, weights_only=False)
    result = exact_cli(*command)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / 'run', whole)


@pytest.mark.slow
def test_a_full_disk(exact_cli, whole, tmp_path):
    """A file size limit below that of a checkpoint: one line, and the run goes on when there is room."""
    command = ('--output', tmp_path, '--experiment', 'run', '--resume', 'auto')
    assert exact_cli(*command, '--stop-epoch', '1').returncode == 0
    limit = (tmp_path / 'run' / 'last.pth.tar').stat().st_size // 2
    result = exact_cli(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert 'Could not write a checkpoint' in result.stderr.splitlines()[-1]
    assert not list((tmp_path / 'run').glob('*tmp*'))
    assert load(tmp_path / 'run')['epoch'] == 0
    result = exact_cli(*command)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / 'run', whole)


def test_a_loss_that_is_not_finite(train_cli, tmp_path):
    """At a learning rate that is far too high. The checkpoints hold finite weights."""
    command = ('--opt', 'sgd', '--lr', '1e30', '--epochs', '3', '--output', tmp_path, '--experiment')
    result = train_cli(*command, 'stop')
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert 'The loss is not finite at epoch' in line and 'loss: nan' in line and 'learning rate 1.000e+30' in line
    result = train_cli(*command, 'skip', '--skip-nan-steps', '99')
    assert result.returncode == 0, result.stderr
    weights = load(tmp_path / 'skip')['state_dict'].values()
    assert all(w.isfinite().all() for w in weights if w.is_floating_point())


@pytest.mark.parametrize('change,message', [
    ('model', '--model test_dearkd'),
    ('teacher', 'another teacher'),
    ('hooks', 'other hooks'),
    ('untaught', 'is a run with a teacher, this one has none. Add --kd-model-name'),
    ('none', 'trained without DearKD'),
    ('truncated', 'cannot be read. It may be truncated'),
    ('pickle', 'cannot be read'),
])
def test_checkpoints_that_do_not_fit(change, message, train_cli, exact_cli, cnn, whole, tmp_path):
    path = whole / 'last.pth.tar'
    args = ['--epochs', '9', '--output', tmp_path, '--experiment', 'run', '--resume', path]
    if change == 'model':
        result = exact_cli(*args, '--model', 'dearkd_nano_patch4_32')
    elif change == 'teacher':
        teacher = tmp_path / 'teacher.pth'
        state = torch.load(cnn / 'last.pth.tar', weights_only=False)['state_dict']
        torch.save({k: v * 2 if k == 'conv1.0.weight' else v for k, v in state.items()}, teacher)
        result = exact_cli(*args, '--kd-model-name', 'test_resnet', '--kd-teacher-checkpoint', teacher)
    elif change == 'untaught':
        result = exact_cli(*args, '--kd-model-name', '')
    elif change == 'hooks':
        result = exact_cli(*args, '--dearkd-hooks', '4:layer1')
    else:
        other = tmp_path / 'other.pth.tar'
        if change == 'none':
            state = torch.load(path, weights_only=False)
            torch.save({k: v for k, v in state.items() if not k.startswith('task_state')}, other)
        elif change == 'truncated':
            other.write_bytes(path.read_bytes()[:20000])
        else:
            torch.save(dict(state_dict=torch.nn.Linear(2, 2)), other)
        result = exact_cli(*args[:-1], other)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / 'run').exists()


def test_other_options_are_named_when_a_run_goes_on(train_cli, image_folder, tmp_path):
    """Other data, too, which is the slip of a forgotten --experiment; not those that change nothing."""
    other = tmp_path / 'other'
    shutil.copytree(image_folder, other)
    command = ('--output', tmp_path, '--experiment', 'run', '--resume', 'auto', '--model', 'test_resnet')
    for args, data, told in (
            (['--stop-epoch', '1'], image_folder, ''),
            (['--workers', '1'], image_folder, ''),
            (['--lr', '2e-3'], other, f'other options: data {image_folder} → {other}, lr 0.001 → 0.002.')):
        result = train_cli(*command, *args, data=data)
        assert result.returncode == 0, result.stderr
        assert told in result.stderr and bool(told) == ('other options' in result.stderr)


def test_other_options_of_the_optimizer_are_taken(train_cli, tmp_path):
    """What the log says of them is what the groups have, and the record."""
    command = (
        '--model', 'test_resnet', '--epochs', '2', '--output', tmp_path, '--experiment', 'run', '--resume', 'auto')
    result = train_cli(*command, '--stop-epoch', '1', '--weight-decay', '0.05', '--lr', '1e-3')
    assert result.returncode == 0, result.stderr
    moments = load(tmp_path / 'run')['optimizer']['state']
    result = train_cli(
        *command, '--weight-decay', '0.5', '--opt-betas', '0.5', '0.6', '--opt-eps', '1e-3', '--lr', '1e-3')
    assert result.returncode == 0 and 'weight_decay 0.05 → 0.5' in result.stderr, result.stderr
    optimizer = load(tmp_path / 'run')['optimizer']
    assert {group['weight_decay'] for group in optimizer['param_groups']} == {0., 0.5}
    assert all((group['betas'], group['eps']) == ((0.5, 0.6), 1e-3) for group in optimizer['param_groups'])
    assert all(optimizer['state'][key]['step'] == 2 * state['step'] for key, state in moments.items())


def test_a_run_is_not_begun_over_another(train_cli, tmp_path):
    """Unless its folder has no checkpoint, because it was stopped before the first."""
    command = ('--epochs', '1', '--output', tmp_path, '--experiment', 'run')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'tmp.pth.tar').touch()  # a first one that was not written to its end
    assert train_cli(*command, '--resume', 'auto').returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
    shutil.copytree(tmp_path / 'run', tmp_path / 'other')
    for resume in ([], ['--resume', tmp_path / 'other' / 'last.pth.tar']):
        result = train_cli(*command, *resume)
        assert result.returncode == 2 and 'holds a run. Resume it with' in result.stderr.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in (tmp_path / 'run').iterdir()} == before


def test_more_epochs_than_before_can_lead_back_to_stage_1(whole, cnn, image_folder, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / 'run')
    train = importlib.import_module('train')
    train.prepare([str(arg) for arg in (
        image_folder, *SMALL, *EXACT, '--kd-model-name', cnn, '--output', tmp_path, '--experiment', 'run', '--resume',
        'auto', '--epochs', '9', '--dearkd-stage1-epochs', '7')])
    assert 'in stage II at epoch 2. With --dearkd-stage1-epochs 7, stage I lasts 7 epochs (was 1)' in caplog.text


def test_a_plateau_is_remembered(train_cli, tmp_path):
    command = (
        '--sched', 'plateau', '--patience-epochs', '0', '--decay-rate', '0.5', '--lr', '1e-7', '--epochs', '4',
        '--output', tmp_path, '--experiment')
    assert train_cli(*command, 'whole').returncode == 0
    for args in (['--stop-epoch', '2'], ['--resume', 'auto']):
        assert train_cli(*command, 'parts', *args).returncode == 0
    rates = [[row['lr'] for row in csv.DictReader((tmp_path / name / 'summary.csv').open())]
             for name in ('whole', 'parts')]
    assert rates[0] == rates[1] and len(set(rates[0])) > 1
