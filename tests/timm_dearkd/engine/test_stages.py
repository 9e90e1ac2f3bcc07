import pytest

from distill_hooks import TwoStageSchedule
from timm_dearkd.engine.checkpoints import Position
from timm_dearkd.engine.distillation import log_changed_stages
from timm_dearkd.train import _parse_args


@pytest.mark.parametrize('before, now, position, level, message', [
    # a finished run of 10 epochs, 8 of them in stage I, gets more
    (['--epochs', '10'], ['--epochs', '24'], Position(10), 'WARNING',
     'in stage II at epoch 9. With --epochs 24, stage I lasts 20 epochs (was 8), so epochs 10 to 19 are in stage I'
     ' again. To keep the stages, set --dearkd-stage1-epochs 8.'),
    (['--epochs', '10'], ['--epochs', '10', '--dearkd-stage1-epochs', '10'], Position(8, 3), 'WARNING',
     'in stage II at epoch 8. With --dearkd-stage1-epochs 10, stage I lasts 10 epochs (was 8), so epochs 8 to 9'),
    (['--epochs', '10'], ['--epochs', '12'], Position(10), 'INFO', 'With --epochs 12, stage I lasts 10 epochs (was 8)'),
    (['--epochs', '10'], ['--epochs', '24'], Position(8), 'INFO', 'stage I lasts 20 epochs (was 8). To keep'),
    (['--epochs', '24'], ['--epochs', '10'], Position(2), 'INFO', 'With --epochs 10, stage I lasts 8 epochs (was 20).'),
    (['--epochs', '10'], ['--epochs', '24', '--dearkd-stage1-epochs', '8'], Position(10), '', ''),
])
def test_stages_that_change_when_a_run_is_resumed(before, now, position, level, message, caplog):
    teacher = ['DIR', '--kd-model-name', 'test_resnet']
    options, args = vars(_parse_args([*teacher, *before])[0]), _parse_args([*teacher, *now])[0]
    caplog.set_level('INFO')
    stage1_epochs = TwoStageSchedule(args.epochs, args.dearkd_stage1_epochs).stage1_epochs
    log_changed_stages(args, stage1_epochs, position._replace(options=options), position.epoch)
    assert [record.levelname for record in caplog.records] == [level] * bool(level)
    assert message in caplog.text
    if '(was 20)' in message:  # which 10 epochs have no room for
        assert 'To keep' not in caplog.text
