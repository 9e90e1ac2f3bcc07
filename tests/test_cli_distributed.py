"""train.py in two processes on the CPU, against one with twice the batch.

torchrun starts them where signals or the end of a process matter, `run_ranks` elsewhere.
"""
import json
import os
import signal
import time

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL, read_summary, run_python, run_ranks, start_python

import timm_dearkd  # noqa: F401

TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')


@pytest.fixture(scope='module')
def command(cnn):
    """Augmented, in three stages of two epochs each: teacher and features, annealed, on its own."""
    return (
        '--kd-model-name', f'local-dir:{cnn}', '--epochs', '4', '--dearkd-stage1-epochs', '2', '--scale', '0.5', '1',
        '--aa', 'rand-m9', '--log-interval', '3', '--model-ema', '--model-ema-decay', '0.8',
    )


def weights(folder):
    checkpoint = torch.load(folder / 'last.pth.tar', weights_only=False)
    return {f'{key}.{name}': value for key in ('state_dict', 'state_dict_ema')
            for name, value in checkpoint[key].items()}


def assert_close(folder, other):
    """Losses and metrics of all epochs, and the weights, up to rounding."""
    table, others = read_summary(folder), read_summary(other)
    assert len(table) == len(others) > 1
    for row, reference in zip(table, others):
        for key, value in row.items():
            assert bool(value) == bool(reference[key])
            if value:
                assert float(value) == pytest.approx(float(reference[key]), rel=2e-4, abs=1e-6), key
    ours, theirs = weights(folder), weights(other)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-4, rtol=1e-2, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('stage2', ['anneal', 'ce'])
def test_two_processes_are_one_with_twice_the_batch(stage2, train_cli, command, tmp_path):
    """Across the stage change, with an average of weights and clipped gradients."""
    for name, args in (
        ('one', dict(args=['-b', '8'])), ('two', dict(args=['-b', '4'], start=run_ranks))):
        result = train_cli(
            *command, '--dearkd-stage2', stage2, '--clip-grad', '1', '--opt', 'sgd', '--lr', '0.005', *args.pop('args'),
            '--output', tmp_path, '--experiment', name, **args)
        assert result.returncode == 0, result.stderr
    assert_close(tmp_path / 'two', tmp_path / 'one')
    assert [row['train_stage'] for row in read_summary(tmp_path / 'two')] == ['1', '1', '2', '2']
    assert result.stdout.count('--result') == 1 and result.stderr.count('Training for 4 epochs') == 1
    model = timm.create_model(f'local-dir:{tmp_path / "two"}', pretrained=True)
    assert model.num_classes == 3


def test_accumulation_in_two_processes(train_cli, command, tmp_path):
    for name, args in (('one', dict(args=['-b', '12'])), (
            'two', dict(args=['-b', '2', '--grad-accum-steps', '3'], start=run_ranks))):
        result = train_cli(  # the features' deviation would be that of the first batch, before any is added up
            *command, '--epochs', '2', '--dearkd-stage1-epochs', '1', '--opt', 'sgd', '--lr', '0.005',
            '--no-dearkd-normalize-features', '--dearkd-beta', '1', *args.pop('args'), '--output', tmp_path,
            '--experiment', name, **args)
        assert result.returncode == 0, result.stderr
    assert_close(tmp_path / 'two', tmp_path / 'one')


@pytest.mark.slow
def test_resuming_with_another_number_of_processes(train_cli, command, tmp_path):
    """Two processes, stopped within an epoch by SIGTERM; then one; then two again."""
    common = ('--opt', 'sgd', '--lr', '0.005', '--output', tmp_path, '--resume', 'auto', '--experiment')
    result = train_cli(*command, *common, 'one', '-b', '8')
    assert result.returncode == 0, result.stderr
    process = train_cli(
        *command, *common, 'changing', '-b', '4', '--recovery-interval', '2', launcher=TORCHRUN, start=start_python)
    while not (tmp_path / 'changing' / 'recovery-1-2.pth.tar').exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert err.count('Interrupted by SIGTERM') == 2, err
    epoch, update = sorted(p.name for p in (tmp_path / 'changing').glob('recovery-*'))[-1].split('-')[1:]
    assert (epoch, update) > ('1', '2')
    for args in (dict(args=['-b', '8', '--stop-epoch', '3']), dict(args=['-b', '4'], start=run_ranks)):
        result = train_cli(*command, *common, 'changing', *args.pop('args'), **args)
        assert result.returncode == 0, result.stderr
    assert_close(tmp_path / 'changing', tmp_path / 'one')


def test_several_sizes_in_two_processes(train_cli, tmp_path):
    """As many updates as there are, for the processes share the images; and one of them looks at a third size."""
    result = train_cli(
        '--model', 'test_dearkd', '--img-size', '64', '--train-img-sizes', '32', '48', '--epochs', '2',
        '--val-interval', '2', '--track-attention-distance', '--log-interval', '1', '-b', '4', '--output', tmp_path,
        '--experiment', 'x', start=run_ranks)
    assert result.returncode == 0, result.stderr
    assert '[   6/6 (100%)]' in result.stderr


def test_a_plain_cnn_in_two_processes(train_cli, tmp_path):
    """BatchNorm statistics are averaged; validation counts each image once."""
    result = train_cli(
        '--model', 'test_resnet', '-b', '4', '-vb', '5', '--output', tmp_path, '--experiment', 'x',
        start=run_ranks)
    assert result.returncode == 0, result.stderr
    evaluation = train_cli(
        '--model', 'test_resnet', '-vb', '5', '--eval-only', '--initial-checkpoint', tmp_path / 'x' / 'last.pth.tar')
    metrics, last = json.loads(evaluation.stdout), read_summary(tmp_path / 'x')[-1]
    assert metrics['num_images'] == 12
    for key in ('top1', 'loss'):
        assert metrics[key] == pytest.approx(float(last[f'eval_{key}']), rel=1e-5)


@pytest.mark.parametrize('kind', ['logit', 'token'])
def test_timms_distillation_in_two_processes(kind, train_cli, cnn, tmp_path):
    """The teacher is checked before and after the first epoch, in both."""
    small = ['--img-size', '32', '--model-kwargs', 'depth=1', 'embed_dim=24']
    model = dict(logit=['test_resnet'], token=['deit_tiny_distilled_patch16_224', *small])[kind]
    result = train_cli(
        '--model', *model, '--kd-model-name', cnn, '--kd-distill-type', kind, '-b', '4', '--epochs', '1', '--output',
        tmp_path, '--experiment', 'x', start=run_ranks)
    assert result.returncode == 0, result.stderr
    row, = read_summary(tmp_path / 'x')
    assert 0 <= float(row['train_teacher_agreement']) <= 1 and float(row['eval_teacher_top1']) > 0


@pytest.mark.slow
def test_labels_that_are_kept(train_cli, command, tmp_path):
    """Each process has its own files. A wrong label of one stops both, and one process cannot read those of two."""
    labels = tmp_path / 'labels'

    def run(name, *args, start=run_ranks):
        return train_cli(
            *command, *args, '-b', '4', '--mixup', '0.5', '--reprob', '0.5', '--kd-label-cache', labels, '--output',
            tmp_path, '--experiment', name, start=start)

    for name in ('writes', 'reads'):
        result = run(name)
        assert result.returncode == 0, result.stderr
    assert 'Labels of the teacher: 136 read (94 %), 8 computed.' in result.stderr
    ours, theirs = weights(tmp_path / 'reads'), weights(tmp_path / 'writes')
    assert all(value.equal(theirs[name]) for name, value in ours.items())
    assert read_summary(tmp_path / 'reads') == read_summary(tmp_path / 'writes')
    assert sorted(path.name for path in labels.iterdir()) == [
        *(f'epoch{epoch:04}-rank{rank}.npy' for epoch in range(3) for rank in range(2)), 'labels.json']
    path = labels / 'epoch0000-rank1.npy'
    np.save(path, (np.load(path) + 1) % 3)
    result = run('wrong')
    assert result.returncode == 2 and result.stderr.count('of 8 labels are not the answers of the teacher') == 2
    result = run('one', start=run_python)
    assert result.returncode == 2 and 'processes 2 → 1. Name another folder' in result.stderr.splitlines()[-1]


def test_a_loss_that_is_not_finite_stops_both(train_cli, tmp_path):
    result = train_cli(
        '--opt', 'sgd', '--lr', '1e30', '--output', tmp_path, '--experiment', 'x', start=run_ranks)
    assert result.returncode != 0 and result.stderr.count('The loss is not finite') == 2


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason='lists threads as Linux does')
def test_no_thread_of_the_group_is_left_in_the_end(image_folder, cnn, tmp_path):
    """One that comes to need the interpreter when that is gone aborts the process of a run that was complete.

    Its teacher's classes are in another order, which both processes find together, and one tells.
    """
    class_map = tmp_path / 'map.txt'
    class_map.write_text('1\n2\n0\n')
    script = tmp_path / 'script.py'
    script.write_text(
        'import sys; from pathlib import Path; from timm_dearkd.train import run_script; run_script(sys.argv[1:])\n'
        'print("left:", *(p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")), flush=True)\n')
    result = run_python(
        *TORCHRUN, script, image_folder, *SMALL, '--epochs', '1', '--kd-model-name', f'local-dir:{cnn}', '--output',
        tmp_path, '--experiment', 'x', '--kd-class-map', class_map, '--no-aug', '--val-split', 'train')
    assert result.returncode == 0, result.stderr
    assert result.stderr.count('seem to be in another order') == 1
    assert (tmp_path / 'x' / 'kd_class_map.txt').read_text() == '0 blue sky\n1 grass\n2 rust\n'
    _, *left = result.stdout.split('left:')  # both processes write, and may do so on one line
    assert len(left) == 2 and 'gloo' not in ''.join(left)


SPY = """
import sys
from torch.nn.parallel import DistributedDataParallel
from timm_dearkd.train import main

wrap = DistributedDataParallel.__init__

def spy(self, *args, **kwargs):
    print('DDP', kwargs.get('gradient_as_bucket_view'))
    wrap(self, *args, **kwargs)

DistributedDataParallel.__init__ = spy
main(sys.argv[1:])
"""


def test_gradients_are_views_of_ddps_buckets(image_folder, tmp_path):
    """They are not copied."""
    result = run_ranks('-c', SPY, image_folder, *SMALL, '--output', tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith('DDP')]
    assert len(lines) >= 2 and set(lines) == {'DDP True'}
