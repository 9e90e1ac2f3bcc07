"""The parts of the script, called as functions."""
import contextlib
from argparse import Namespace
from unittest.mock import MagicMock

import pytest
from torch.utils.data import ChainDataset

from timm_dearkd import train
from timm_dearkd.engine.device import Ranks
from timm_dearkd.engine.loop import Validator
from timm_dearkd.engine.output import Position


@pytest.mark.parametrize('world_size,dataset,asks', [
    (1, [], True), (1, ChainDataset([]), True), (2, [], True), (2, ChainDataset([]), False)])
def test_processes_ask_for_signals_only_where_they_evaluate_in_step(world_size, dataset, asks, monkeypatch):
    """To ask is to wait for all others, and of a stream one may have more batches than another."""
    ranks, recorder = Ranks(world_size=world_size), MagicMock(saver=None)
    validator = Validator(None, Namespace(dataset=dataset), None, ranks)
    monkeypatch.setattr(train, 'StopRequest', lambda ranks: contextlib.nullcontext('stop'))
    train.fit(Namespace(seed=0, eval_metric='top1'), MagicMock(ranks=ranks), validator, recorder, Position(), range(0))
    assert (validator.on_batch is not None) == asks
    if asks:
        validator.on_batch()
        recorder.on_eval_batch.assert_called_once_with('stop')
