"""Warnings about the length of a run."""
import re

import pytest

from timm_dearkd.engine.schedule import warn_of_short_run
from timm_dearkd.train import _parse_args


@pytest.mark.parametrize('flags,epochs,is_dearkd,message', [
    ((), 300, True, '--opt sgd, the default'),
    ((), 300, False, ''),
    (('--opt', 'adamw'), 30, True, 'The run has 600 updates, too few for a ViT.*takes 141'),
    (('--opt', 'adamw'), 50, True, ''),
    (('--opt', 'adamw', '--warmup-epochs', '60'), 50, True, 'All of the 50 epochs are warm-up'),
])
def test_short_runs_and_sgd_name_the_recipe(flags, epochs, is_dearkd, message, caplog):
    """Of 600 images, with 20 updates per epoch."""
    warn_of_short_run(_parse_args(['DIR', *flags])[0], epochs, 20, 600, is_dearkd)
    assert len(caplog.records) == bool(message)
    if message:
        assert re.search(message, caplog.text)
        assert ('-c small_folder' in caplog.text) == ('warm-up' not in message)
