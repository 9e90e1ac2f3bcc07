import json
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.task import ClassificationTask

from distill_hooks import DearKDTask, LogitTask, Teacher, TokenTask, TwoStageSchedule, load_class_map
from timm_dearkd.engine.device import Precision
from timm_dearkd.engine.interrupt import Interrupted
from timm_dearkd.engine.loop import Stepper, Trainer
from timm_dearkd.engine.output import AtomicCheckpointSaver, resume_run
from timm_dearkd.engine.recorder import Recorder, print_results
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


class Answers(torch.nn.Module):
    """A teacher that knows the label, which the images show, and gives some class for each."""
    num_classes, in_chans = 3, 3

    def __init__(self, given):
        super().__init__()
        self.register_buffer('logits', torch.eye(3)[given])

    def forward(self, x):
        return self.logits[x.mean((1, 2, 3)).round().long() % 3]


class Batches(list):
    """Batches of an epoch, which may be continued."""
    first = 0

    def set_epoch(self, epoch, first):
        self.first = first

    def __iter__(self):
        return iter(self[self.first:])


def make_recorder(folder, kind, given):
    """A recorder of a small run with that teacher."""
    torch.manual_seed(0)
    name = 'deit_tiny_distilled_patch16_224'
    student = timm.create_model(name, num_classes=3, img_size=32, depth=1, embed_dim=24)
    teacher = Teacher(Answers(given))
    if kind == 'dearkd':
        task = DearKDTask(student, teacher, TwoStageSchedule(2, beta=0.), verbose=False)
    else:
        task = dict(logit=LogitTask, token=TokenTask)[kind](
            student, teacher, criterion=torch.nn.CrossEntropyLoss(), verbose=False)
    task.answers.class_names = ['cat', 'Dog', 'emu']
    labels = torch.arange(24) % 3
    images = labels.view(-1, 1, 1, 1).expand(-1, 3, 32, 32).float()
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=1e-6)
    trainer = Trainer(
        task, Batches(zip(images.split(4), labels.split(4))), Stepper(task, optimizer, on_host=True),
        Precision(torch.device('cpu')))
    saver = AtomicCheckpointSaver(
        student, optimizer, task=task, checkpoint_dir=folder, recovery_dir=folder, max_history=1)
    return Recorder(trainer, folder, saver, Tracker(folder), lambda folder, state: None, 4)


@pytest.mark.parametrize('kind', ['dearkd', 'logit', 'token'])
def test_a_teacher_in_another_order_is_told_after_the_first_epoch(tmp_path, caplog, kind):
    """With the map that mends it, also if the epoch was interrupted; not if the order is right."""
    for name, given in (('right', [0, 1, 2]), ('wrong', [1, 0, 2])):
        folder = str(tmp_path / name)
        (tmp_path / name).mkdir()
        recorder = make_recorder(folder, kind, given)
        recorder.trainer.on_update = lambda epoch, update, last, recorder=recorder: recorder.on_update(
            SimpleNamespace(signum=15) if update == 4 else None, epoch, update, last)
        with pytest.raises(Interrupted):
            recorder.trainer.train_epoch(0)
        recorder = make_recorder(folder, kind, given)
        trainer = recorder.trainer
        start = resume_run(
            f'{folder}/recovery-0-4.pth.tar', trainer.task, dict(model='visiontransformerdistilled', opt=''),
            trainer.step.optimizer, trainer.precision, images_per_update=4)
        recorder.resume_answers(start)
        losses = trainer.train_epoch(start.epoch, start.update, start.meter)
        assert recorder.answers.read().sum() == 24
        recorder.on_epoch(0, losses, {}, None, lr=0.1)
        assert losses['teacher_agreement'] == pytest.approx(1. if name == 'right' else 1 / 3)
        told = [r.getMessage() for r in caplog.records if 'in another order' in r.getMessage()]
        assert len(told) == (name == 'wrong') and recorder.answers.read() is None
    assert "class 'cat' looks like its class 1, class 'Dog' looks like its class 0." in told[0]
    assert 'the label of 100.0 % of the images, now of 33.3 %' in told[0]
    path = tmp_path / 'wrong' / 'kd_class_map.txt'
    assert f'--kd-class-map {path}' in told[0] and path.read_text() == '1 cat\n0 Dog\n2 emu\n'
    mended = Teacher(Answers(given), class_map=load_class_map(str(path)))
    images, labels = recorder.trainer.loader[0]
    assert mended(images)[0].argmax(1).equal(labels)
