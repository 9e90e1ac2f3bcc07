import csv
import json
import math

import pytest
import timm
import torch
from timm.task import ClassificationTask
from timm.utils import update_summary

from distill_hooks import DearKDTask, TwoStageSchedule
from timm_dearkd.engine.checkpoints import AtomicCheckpointSaver
from timm_dearkd.engine.loop import Stepper, Trainer
from timm_dearkd.engine.process import Precision
from timm_dearkd.engine.recorder import Recorder, print_results
from timm_dearkd.engine.run_folder import trim_table
from timm_dearkd.engine.tracking import Tracker


def test_an_evaluation_that_is_not_finite_is_never_the_best(tmp_path, capsys):
    """Nor does it keep a later one from being so."""
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3))
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    trainer = Trainer(task, [None], Stepper(task, optimizer), Precision(torch.device('cpu')))
    saver = AtomicCheckpointSaver(
        task, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path), decreasing=True, max_history=2)
    exported = []
    recorder = Recorder(
        trainer, str(tmp_path), saver, Tracker(str(tmp_path)), lambda folder, state: exported.append(epoch), 4)
    for epoch, metric in enumerate((math.nan, 1., math.nan, 0.5, math.inf)):
        recorder.on_epoch(epoch, dict(loss=1.), dict(loss=metric, top1=1., top5=1.), metric, lr=0.1)
    assert (saver.best_metric, saver.best_epoch) == (0.5, 3) and exported == [1, 3]
    assert {path.name for path in tmp_path.glob('checkpoint-*')} == {'checkpoint-1.pth.tar', 'checkpoint-3.pth.tar'}
    for metric, best in (('loss', 3), ('top1', 4)):
        print_results(recorder.results, metric)
        assert json.loads(capsys.readouterr().out.partition('\n')[2])[-1]['epoch'] == best


def test_the_best_epochs_are_those_that_were_evaluated(capsys):
    """An epoch's training loss says nothing beside another's validation loss."""
    results = [
        dict(epoch=0, train=dict(loss=1.)),
        dict(epoch=1, train=dict(loss=.9), validation=dict(loss=2., top1=30.)),
        dict(epoch=2, train=dict(loss=.8)),
        dict(epoch=3, train=dict(loss=.7), validation=dict(loss=3., top1=40.)),
    ]
    for metric, best in (('loss', 1), ('top1', 3)):
        print_results(results, metric)
        mark, _, text = capsys.readouterr().out.partition('\n')
        assert mark == '--result' and json.loads(text)[-1]['epoch'] == best and len(json.loads(text)) == 2
    alone = [(0.5, .1), (0.75, .2), (1., .4), (1., .3)]  # alpha and loss, without validation: of the last alpha alone
    print_results([dict(epoch=i, train=dict(stage=2, alpha=a, loss=loss)) for i, (a, loss) in enumerate(alone)], 'loss')
    assert [r['epoch'] for r in json.loads(capsys.readouterr().out.partition('\n')[2])] == [2, 3]
    print_results([dict(epoch=0, train=dict(loss=1.)), dict(epoch=1, train=dict(loss=.5))], 'loss')
    assert json.loads(capsys.readouterr().out.partition('\n')[2])[-1]['epoch'] == 1


def test_the_table_of_an_older_run_gains_the_new_columns(tmp_path, caplog):
    """A run from before the teacher was evaluated is resumed: no value moves to another column, and no row is lost."""
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3))
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    trainer = Trainer(task, [None], Stepper(task, optimizer), Precision(torch.device('cpu')))
    saver = AtomicCheckpointSaver(task, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    table = tmp_path / 'summary.csv'
    update_summary(0, dict(loss=2.), dict(loss=1., top1=40., top5=90.), str(table), lr=0.1)  # timm's columns
    header = table.read_text().splitlines()[0]
    recorder = Recorder(trainer, str(tmp_path), saver, Tracker(str(tmp_path)), lambda folder, state: None, 4)
    recorder.on_epoch(1, dict(loss=1.5), dict(loss=0.9, top1=50., top5=91.), 50., lr=0.1)
    assert table.read_text().splitlines()[0] == header
    recorder.teacher_top1 = 80.
    recorder.on_epoch(2, dict(loss=1.), dict(loss=0.5, top1=60., top5=92.), 60., lr=0.05)
    trim_table(str(table), 3)
    rows = list(csv.DictReader(table.open(newline='')))
    assert [row['eval_top1'] for row in rows] == ['40.0', '50.0', '60.0']
    assert [row['lr'] for row in rows] == ['0.1', '0.1', '0.05']
    assert [row['eval_teacher_top1'] for row in rows] == ['', '', '80.0']
    caplog.set_level('INFO')
    recorder.compare_with_teacher()
    assert 'teacher 80.00 %, student 60.00 %' in caplog.text


@pytest.mark.parametrize('labels,scale', [({}, 1.), (dict(labels='teacher', soft_temperature=4.), 0.3)])
def test_a_student_that_has_not_learned_in_stage_1_is_warned_of_once(labels, scale, tmp_path, caplog):
    """The label loss of guessing among three classes is log 3 = 1.0986. With soft labels, the first epoch's counts."""
    student, cnn = (timm.create_model(name, num_classes=3) for name in ('test_dearkd', 'test_resnet'))
    task = DearKDTask(student, cnn, TwoStageSchedule(6, 4), hooks=['2'], verbose=False, **labels)
    (tmp_path / 'summary.csv').write_text('epoch,train_ce_loss\n0,0.33\n')
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    trainer = Trainer(task, [None], Stepper(task, optimizer), Precision(torch.device('cpu')))
    recorder = Recorder(trainer, str(tmp_path), None, Tracker(str(tmp_path)), lambda folder, state: None, 4)
    for last, count in ((1.05, 1), (0.9, 0)):
        caplog.clear()
        for epoch in range(6):
            loss = scale * (last if epoch == 3 else 1.09)
            recorder.on_epoch(epoch, dict(loss=loss, ce_loss=loss), {}, loss, lr=0.1)
        assert caplog.text.count('hardly learned') == count
