import inspect
import itertools
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask

import timm_dearkd  # noqa: F401
from distill_hooks import DearKDTask, TwoStageSchedule
from timm_dearkd.engine import tracking
from timm_dearkd.engine.tracking import TeacherTimer, Tracker, check_available, mhca_stats, scalars

CPU = torch.device('cpu')


class RecordingWandb(ModuleType):
    """Stands in for W&B and its run."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__('wandb')
        self.calls = []

    def init(self, **kwargs):
        self.calls.append(('init', kwargs))
        return self

    def log(self, values, step):
        self.calls.append(('log', values, step))

    def finish(self, exit_code):
        self.calls.append(('finish', exit_code))


@pytest.fixture
def fake_wandb(monkeypatch):
    module = RecordingWandb()
    monkeypatch.setitem(sys.modules, 'wandb', module)
    return module


def read_events(folder):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()['scalars']}


def test_tensorboard_file(tmp_path):
    pytest.importorskip('tensorboard')
    with Tracker(str(tmp_path), tensorboard=True) as tracker:
        assert tracker.enabled
        tracker.log({'train/loss': 2.5, 'alpha/block1': 1.}, step=50)
        tracker.log({'train/loss': 2.}, step=100)
        tracker.log({'eval/top1': 12.5}, step=100)
    assert [path.name for path in tmp_path.iterdir()] == ['tensorboard']
    assert read_events(tmp_path / 'tensorboard') == {
        'train/loss': [(50, 2.5), (100, 2.)], 'alpha/block1': [(50, 1.)], 'eval/top1': [(100, 12.5)]}


def test_a_resumed_run_overwrites_what_came_after_its_checkpoint(tmp_path):
    pytest.importorskip('tensorboard')
    with Tracker(str(tmp_path), tensorboard=True) as tracker:
        for step in (10, 20, 30, 40):
            tracker.log({'loss': step}, step)
    events, = (tmp_path / 'tensorboard').iterdir()
    events.rename(events.with_name('events.out.tfevents.0000000000'))  # TensorBoard reads in the order of the names
    with Tracker(str(tmp_path), tensorboard=True, first_step=21) as tracker:
        tracker.log({'loss': -30.}, 30)
    assert read_events(tmp_path / 'tensorboard') == {'loss': [(10, 10.), (20, 20.), (30, -30.)]}


def test_wandb_gets_the_arguments_and_the_steps(tmp_path, fake_wandb):
    settings = dict(project='p', name='n', config={'lr': 0.1}, tags=['a'], resume='must', id='abc')
    with Tracker(str(tmp_path), wandb=settings) as tracker:
        assert tracker.enabled
        tracker.log({'loss': 1.}, step=7)
    with pytest.raises(RuntimeError), Tracker('elsewhere', wandb={'dir': 'here'}):
        raise RuntimeError
    assert fake_wandb.calls == [
        ('init', dict(settings, dir=str(tmp_path))), ('log', {'loss': 1.}, 7), ('finish', 0),
        ('init', {'dir': 'here'}), ('finish', 1),
    ]
    assert not list(tmp_path.iterdir())


def test_wandb_that_starts_no_run_is_one_line(tmp_path, fake_wandb, monkeypatch):
    def fail(**kwargs):
        raise fake_wandb.Error('No API key configured.\nUse `wandb login`.')

    monkeypatch.setattr(fake_wandb, 'init', fail)
    with pytest.raises(ValueError, match='No API key configured. Use `wandb login`.*WANDB_MODE=offline') as error:
        Tracker(str(tmp_path), wandb={})
    assert '\n' not in str(error.value)


def test_real_wandb(tmp_path, monkeypatch):
    import wandb
    monkeypatch.setenv('WANDB_SILENT', 'true')
    settings = dict(project='p', name='n', config={'lr': 0.1}, tags=['a'], resume=None, id=None)
    inspect.signature(wandb.init).bind(**settings)
    with Tracker(str(tmp_path), wandb=dict(settings, mode='offline')) as tracker:
        for values, step in (({'loss': 1.}, 5), ({'top1': 2.}, 5), ({'loss': 3.}, 9)):
            tracker.log(values, step)
            assert wandb.run.step == step
    assert wandb.run is None
    assert list((tmp_path / 'wandb').glob('offline-run-*/*.wandb'))


@pytest.mark.parametrize('package,modules', [
    ('tensorboard', {'tensorboard': None, 'torch.utils.tensorboard': None}),
    ('wandb', {'wandb': None}),
    ('wandb', {'wandb': ModuleType('wandb')}),  # a folder ./wandb imports as such
])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, modules):
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    message = f'^--log-{package} needs the {package} package: pip install {package}.$'
    with pytest.raises(ValueError, match=message):
        check_available(**{package: True})
    with pytest.raises(ValueError, match=message):
        Tracker(str(tmp_path), tensorboard=package == 'tensorboard', wandb={} if package == 'wandb' else None)
    assert not list(tmp_path.iterdir())


def test_neither_is_no_work(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.importlib, 'import_module', None)
    check_available()
    with Tracker(str(tmp_path)) as tracker:
        assert not tracker.enabled
        tracker.log({'loss': 1.}, step=1)
    assert not list(tmp_path.iterdir())


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 100.

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class TaskOfSleepers(nn.Module):
    """A teacher that takes two seconds and a student that takes three."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.teacher = nn.Identity()
        self.teacher.forward = lambda: clock.sleep(2.)

    def forward(self, with_teacher=True):
        if with_teacher:
            self.teacher()
        self.clock.sleep(3.)


def test_teacher_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tracking, 'time', clock)
    task = TaskOfSleepers(clock)
    timer = TeacherTimer(task, CPU)
    assert timer.seconds() == 0.
    task()
    task()
    assert timer.seconds() == pytest.approx(4.)
    assert timer.seconds() == 0.
    task(with_teacher=False)
    assert timer.seconds() == 0.


def test_teacher_time_on_a_device_needs_few_events_and_no_wait(monkeypatch):
    """Events finish when the device says so; nothing but a query asks it."""
    clock, done, made = Clock(), [True], []

    class Event:
        def __init__(self, device, enable_timing):
            assert (device, enable_timing) == (torch.device('cuda:1'), True)
            made.append(self)

        def record(self, stream):
            assert stream == 'stream of cuda:1'
            self.time = clock.now

        def query(self):
            return done[0]

        def elapsed_time(self, end):
            assert done[0]
            return 1000. * (end.time - self.time)

    monkeypatch.setattr(torch, 'Event', Event)
    monkeypatch.setattr(torch.accelerator, 'current_stream', lambda device: f'stream of {device}')
    task = TaskOfSleepers(clock)
    timer = TeacherTimer(task, torch.device('cuda:1'))
    for _ in range(50):
        task()
    assert timer.seconds() == pytest.approx(100.)
    assert len(made) <= 4
    done[0] = False
    task()
    task()
    assert timer.seconds() == 0.
    done[0] = True
    assert timer.seconds() == pytest.approx(4.)


def make_task(kind):
    if kind is TokenDistillationTask:
        student = timm.create_model(
            'deit_tiny_distilled_patch16_224', depth=1, embed_dim=12, num_classes=3, img_size=32)
    else:
        student = timm.create_model('test_dearkd', num_classes=3, img_size=32)
    teacher = timm.create_model('test_resnet', num_classes=3)
    if kind is ClassificationTask:
        return kind(student, verbose=False)
    if kind is DearKDTask:
        return kind(student, teacher, TwoStageSchedule(4, 2), hooks=['2'], verbose=False)
    return kind(student, teacher, criterion=nn.CrossEntropyLoss(), verbose=False)


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind', [
    ClassificationTask, DearKDTask, LogitDistillationTask, FeatureDistillationTask, TokenDistillationTask])
def test_the_teacher_of_every_task_is_seen(monkeypatch, kind, compiled):
    """The clock ticks each time it is read, which a forward of the teacher does twice."""
    monkeypatch.setattr(tracking, 'time', SimpleNamespace(perf_counter=itertools.count().__next__))
    task = make_task(kind)
    timer = TeacherTimer(task, CPU)
    if compiled:
        task.compile(backend='eager')
    batch = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    for _ in range(3):
        task(*batch)
    assert timer.seconds() == pytest.approx(0. if kind is ClassificationTask else 3.)
    if kind is DearKDTask:
        task.set_epoch(3)
        task(*batch)
        assert timer.seconds() == 0.


def test_mhca_stats_by_hand():
    model = timm.create_model('test_dearkd', num_classes=3)
    expected = {}
    rng = np.random.default_rng(0)
    for i in range(4):
        rpe = model.blocks[i].attn.rpe
        alpha, delta = rng.normal(size=2), rng.normal(size=(2, 2))
        with torch.no_grad():
            rpe.alpha.copy_(torch.from_numpy(alpha))
            rpe.delta.copy_(torch.from_numpy(delta))
        expected[f'alpha/block{i + 1}'] = alpha.sum() / 2
        expected[f'delta/block{i + 1}'] = np.sqrt(delta[:, 0] ** 2 + delta[:, 1] ** 2).sum() / 2
    for wrapped in (model, torch.compile(model), nn.DataParallel(model), nn.DataParallel(torch.compile(model))):
        stats = mhca_stats(wrapped)
        assert all(value.shape == () and not value.requires_grad for value in stats.values())
        assert scalars(stats) == pytest.approx(expected, rel=1e-5)


def test_mhca_stats_wait_for_nothing():
    """Tensors without data show any attempt to read them."""
    stats = mhca_stats(timm.create_model('test_dearkd', num_classes=3).to('meta'))
    assert len(stats) == 8 and all(value.is_meta for value in stats.values())


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet', 'test_efficientnet'])
def test_models_without_mhca_have_no_stats(name):
    assert mhca_stats(timm.create_model(name)) == {}
    assert scalars({}) == {}
