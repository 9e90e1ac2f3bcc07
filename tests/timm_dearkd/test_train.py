"""The parts of the script, called as functions."""
import contextlib
import copy
import json
import signal
from argparse import Namespace
from datetime import timedelta
from unittest.mock import MagicMock

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.utils import unwrap_model
from torch.utils.data import ChainDataset

from timm_dearkd import train
from timm_dearkd.engine.checkpoints import Position
from timm_dearkd.engine.loop import Validator
from timm_dearkd.engine.process import SINGLE, Interrupted, Ranks


@pytest.mark.parametrize('world_size,dataset,asks', [
    (1, [], True), (1, ChainDataset([]), True), (2, [], True), (2, ChainDataset([]), False)])
def test_processes_ask_for_signals_only_where_they_evaluate_in_step(world_size, dataset, asks, monkeypatch):
    """To ask is to wait for all others, and of a stream one may have more batches than another."""
    ranks, recorder = Ranks(world_size=world_size), MagicMock(saver=None)
    validator = Validator(None, Namespace(dataset=dataset), None, ranks)
    monkeypatch.setattr(train, 'StopRequest', lambda ranks: contextlib.nullcontext('stop'))
    trainer = MagicMock(ranks=ranks, task=MagicMock(teacher=None))
    args = Namespace(seed=0, eval_metric='top1', val_interval=1, save_epochs=[])
    train.fit(args, trainer, validator, recorder, Position(), range(0))
    assert (validator.on_batch is not None) == asks
    if asks:
        validator.on_batch()
        recorder.on_eval_batch.assert_called_once_with('stop')


def test_a_best_student_that_is_not_exported_is_before_the_first_step(tmp_path, monkeypatch):
    """As of a run that goes back to an earlier checkpoint."""
    torch.save(dict(state_dict=dict(weight=torch.ones(1))), tmp_path / 'model_best.pth.tar')
    recorder, trainer = MagicMock(folder=str(tmp_path), export_ema=False), MagicMock(ranks=SINGLE)
    trainer.train_epoch.side_effect = Interrupted(signal.SIGTERM)
    monkeypatch.setattr(train, 'StopRequest', lambda ranks: contextlib.nullcontext())
    with pytest.raises(Interrupted):
        train.fit(Namespace(seed=0, val_interval=1, save_epochs=[]), trainer, None, recorder, Position(), range(1))
    recorder.export.assert_called_once_with(str(tmp_path), dict(weight=torch.ones(1)))


@pytest.mark.parametrize('start, save_epochs, untimed', [
    (Position(), [1], 0), (Position(), [], 300), (Position(2, update=3), [4], 0)])
def test_the_expected_end_counts_epochs_and_evaluations(start, save_epochs, untimed, monkeypatch, caplog):
    """Against a clock on which an epoch takes 10 s and an evaluation 100 s."""
    clock, ends = [0.], []

    def advance(seconds, result):
        clock[0] += seconds
        return result

    monkeypatch.setattr(train.time, 'monotonic', lambda: clock[0])
    monkeypatch.setattr(train, 'StopRequest', lambda ranks: contextlib.nullcontext())
    monkeypatch.setattr(train, 'evaluate_epoch', lambda *args: advance(100, {}))
    monkeypatch.setattr(train, 'mean_lr', lambda optimizer: 0.)
    trainer, recorder = MagicMock(ranks=SINGLE, task=MagicMock(teacher=None)), MagicMock(saver=None)
    trainer.train_epoch.side_effect = lambda *args: advance(10, {'loss': 1.})
    recorder.on_epoch.side_effect = lambda epoch, *args: ends.append(clock[0])
    args = Namespace(seed=0, eval_metric='top1', val_interval=4, save_epochs=save_epochs)
    caplog.set_level('INFO')
    train.fit(args, trainer, MagicMock(), recorder, start, range(start.epoch, 10))
    message, = (line for line in caplog.messages if 'Expected end' in line)
    left = timedelta(seconds=ends[-1] - ends[bool(start.update)] - untimed)
    assert message.endswith(f', in {left}, plus 3 evaluations.' if untimed else f', in {left}.')


class Frozen(Namespace):
    """Options that cannot be set after their construction. Checkpoints store them as a plain `Namespace`."""

    def __init__(self, **options):
        self.__dict__.update(options)

    def __setattr__(self, name, value):
        raise AttributeError(f'{name} is set to {value!r}')

    def __delattr__(self, name):
        raise AttributeError(f'{name} is deleted')

    def __reduce_ex__(self, protocol):
        return Namespace, (), self.__dict__


def test_nothing_changes_the_options_after_resolve_args(image_folder, cnn, tmp_path, monkeypatch, capsys):
    """In a new run, a resumed one and an evaluation. All read what `resolve_args` has returned, and not a copy."""
    resolved, read = [], []

    def resolve(args, resolve_args=train.resolve_args):
        resolved.append(Frozen(**vars(resolve_args(args))))
        return resolved[-1]

    def watch(function):
        return lambda args, *rest: read.append((function.__name__, args)) or function(args, *rest)

    monkeypatch.setattr(train, 'resolve_args', resolve)
    for function in (train.build_datasets, train.build_recorder, train.fit, train.build_evaluation):
        monkeypatch.setattr(train, function.__name__, watch(function))
    run = [str(image_folder), '--model', 'test_dearkd', '--img-size', '32', '--batch-size', '24', '--opt', 'adamw',
           '--workers', '0', '--device', 'cpu', '--output', str(tmp_path), '--experiment', 'run', '--resume', 'auto']
    teacher = ['--kd-model-name', str(cnn), '--epochs', '2', '--warmup-epochs', '0', '--mixup', '0.8', '--model-ema']
    training = ['build_datasets', 'build_recorder', 'fit']
    for flags, expected in (
            ([*teacher, '--stop-epoch', '1'], training), (teacher, training),
            ([*teacher, '--val-split', '', '--experiment', 'blind', '--stop-epoch', '1'], training),
            (['--eval-only'], ['build_evaluation'])):
        resolved.clear(), read.clear()
        before = copy.deepcopy(vars(resolve(train._parse_args([*run, *flags])[0])))
        train.main([*run, *flags])
        assert vars(resolved[1]) == before and len(resolved) == 2
        assert [name for name, _ in read] == expected and all(args is resolved[1] for _, args in read)
    assert '"top1"' in capsys.readouterr().out


def test_evaluation_alone_takes_the_memory_format_and_the_compiler(image_folder, tmp_path, monkeypatch, capsys):
    """The figures are the same."""
    save_for_hf(timm.create_model('test_resnet', num_classes=3), tmp_path, safe_serialization=True)
    used, forward = set(), Validator._forward

    def watch(self, model, images):
        weight = unwrap_model(model).state_dict()['conv1.0.weight']
        used.add((weight.is_contiguous(memory_format=torch.channels_last), hasattr(model, '_orig_mod')))
        return forward(self, model, images)

    monkeypatch.setattr(Validator, '_forward', watch)
    command = [str(image_folder), '--eval-only', '--model', f'local-dir:{tmp_path}', '-j', '0', '--device', 'cpu']
    results = []
    for flags, expected in (([], (False, False)), (['--channels-last', '--torchcompile', 'eager'], (True, True))):
        used.clear()
        train.main([*command, *flags])
        assert used == {expected}
        results.append(json.loads(capsys.readouterr().out))
    assert results[0].pop('model') == results[1].pop('model') and results[0] == pytest.approx(results[1], rel=1e-4)
