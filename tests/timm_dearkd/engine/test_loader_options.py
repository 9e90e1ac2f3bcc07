import logging
import os

import pytest
import torch

from timm_dearkd.engine.data import build_datasets
from timm_dearkd.engine.loader import _loader_kwargs
from timm_dearkd.engine.options import resolve_args
from timm_dearkd.engine.process import SINGLE
from timm_dearkd.train import _parse_args


def build(*args):
    return build_datasets(_parse_args([*map(str, args), '--model', 'test_dearkd'])[0])


def test_the_share_that_is_logged_is_the_real_one(image_folder, caplog):
    caplog.set_level(logging.INFO)
    build(image_folder, '--train-fraction', '0.01')  # of 16 images a class
    assert 'Training on 3 images, 6.25 % of all.' in caplog.text


def test_a_folder_without_splits_is_taken_for_both_with_advice(image_folder, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(image_folder, 'photos', target_is_directory=True)
    os.symlink(image_folder / 'train', 'alone', target_is_directory=True)
    instead = 'Make alone/train and alone/validation.'
    for args, advice in (
            (['photos/train/'], 'Did you mean photos?'), ([image_folder / 'train'], f'Did you mean {image_folder}?'),
            (['alone'], instead), (['alone', '--dataset', 'image_folder'], instead)):
        caplog.clear()
        train_set, eval_set = build(*args)
        assert len(train_set) == len(eval_set) == 48 and caplog.text.strip().endswith(advice)


def test_options_of_streams_are_said_to_do_nothing(image_folder, caplog):
    build(image_folder, '--val-num-samples', '2', '--epoch-repeats', '3')
    assert '--val-num-samples is for streamed' in caplog.text and '--epoch-repeats is for streamed' in caplog.text
    assert '--train-num-samples' not in caplog.text


@pytest.mark.parametrize('flags,processes,expected', [
    ([], '1', 2), ([], '2', 1), ([], '8', 1), (['-j', '0'], '1', 0), (['-j', '3'], '1', 3), (['-j', '4'], '1', 4),
    (['--workers=4'], '2', 4)])
def test_default_workers_are_no_more_than_cores(flags, processes, expected, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1}, raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', processes)
    assert resolve_args(_parse_args(['DIR', *flags])[0]).workers == expected


@pytest.mark.parametrize('flags,on_cuda,on_cpu', [
    ([], True, False), (['--pin-mem'], True, True), (['--no-pin-mem'], False, False)])
def test_memory_is_pinned_on_cuda(flags, on_cuda, on_cpu):
    args = _parse_args(['DIR', *flags])[0]
    for device, pinned in (('cuda', on_cuda), ('cpu', on_cpu)):
        assert _loader_kwargs(args, torch.device(device), SINGLE)['pin_memory'] is pinned
