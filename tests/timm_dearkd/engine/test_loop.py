import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import NativeScaler

from timm_dearkd.engine.loop import LossMeter, Stepper, Trainer, Validator
from timm_dearkd.engine.process import Precision, TrainingError

CPU = torch.device('cpu')


def batches(sizes):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n) % 3) for n in sizes]


def make():
    torch.manual_seed(0)
    return timm.create_model('test_vit', num_classes=3, img_size=32, dynamic_img_size=False)


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('clip_grad', [None, 0.01])
def test_gradient_accumulation_is_the_bigger_batch(clip_grad, scaled):
    """Two steps, the last one of two batches only, beside plain PyTorch on the concatenated batches."""
    parts = batches([4, 4, 4, 4, 4])
    model = make()
    task = ClassificationTask(model, criterion_kwargs=dict(smoothing=0.))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    updates, scaler = [], NativeScaler('cpu') if scaled else None
    trainer = Trainer(task, parts, Stepper(task, optimizer, scaler, clip_grad), Precision(CPU), grad_accum_steps=3)
    trainer.on_update = lambda epoch, update, last: updates.append((update, last))
    losses = trainer.train_epoch(0)

    plain = make().train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    total = 0.
    for group in (parts[:3], parts[3:]):
        images, labels = (torch.cat(part) for part in zip(*group))
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(images), labels)
        loss.backward()
        if clip_grad:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_grad)
        optimizer.step()
        total += loss.item() * len(images)
    assert updates == [(1, False), (2, True)]
    assert losses['loss'] == pytest.approx(total / 20, rel=1e-5)
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-4)


def test_losses_are_weighted_by_samples():
    meter = LossMeter()
    meter.update(dict(loss=torch.tensor(1.), part=torch.tensor(4.)), 3)
    meter.update(dict(loss=torch.tensor(5.), part=torch.tensor(0.)), 1)
    assert meter.means() == dict(loss=2., part=3.)
    assert LossMeter().means() == {}


def test_no_synchronisation_between_log_lines():
    """Nothing in the loop asks for a tensor's value but at the log interval."""
    counts = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func.__name__ in ('item', 'tolist', '__float__', '__bool__', '__int__', 'cpu', 'numpy'):
                counts.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    class Task(ClassificationTask):
        def forward(self, input, target):
            result = super().forward(input, target)
            return {name: value.as_subclass(Watched) for name, value in result.items()}

    model = make()
    task = Task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(task, batches([2] * 6), Stepper(task, optimizer), Precision(CPU), log_interval=3)
    trainer.train_epoch(0)
    lines = 3  # the run's first update, and one for every three: the means, and the first that were not finite
    assert len(counts) == 2 * lines + 1  # and the means of the epoch


def test_validate_is_the_accuracy_over_all_samples():
    model = make().train()
    parts = batches([4, 4, 3])
    task = ClassificationTask(model)
    metrics = Validator(task, parts, Precision(CPU))(model)
    assert model.training
    images, labels = (torch.cat(part) for part in zip(*parts))
    with torch.no_grad():
        logits = model.eval()(images)
    assert metrics['top1'] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), rel=1e-5)
    assert metrics['top5'] == 100.
    assert metrics['loss'] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_lookahead_is_synchronised_at_the_end_of_an_epoch():
    task = ClassificationTask(make())
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'lookahead_sgd', lr=0.1)
    slow = {}
    sync = optimizer.sync_lookahead
    optimizer.sync_lookahead = lambda: (sync(), slow.update(done=True))
    Trainer(task, batches([2] * 2), Stepper(task, optimizer), Precision(CPU)).train_epoch(0)
    assert slow


def test_second_order_optimizers():
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3))
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'adahessian', lr=0.1)
    before = [p.clone() for p in task.trainable_module.parameters()]
    Trainer(task, batches([2]), Stepper(task, optimizer), Precision(CPU)).train_epoch(0)
    assert not all(p.equal(q) for p, q in zip(task.trainable_module.parameters(), before))


def test_precision():
    model = make()
    with Precision(CPU, torch.bfloat16).autocast():
        assert model(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16
    with Precision(CPU).autocast():
        assert model(torch.randn(1, 3, 32, 32)).dtype == torch.float32
    assert Precision(CPU, torch.float16).scaler is None
    assert Precision(torch.device('cuda'), torch.bfloat16).scaler is None


class Poisoned(ClassificationTask):
    """Its loss is not finite in some batches, counted from 1."""

    def __init__(self, model, batches, value=float('nan')):
        super().__init__(model, criterion_kwargs=dict(smoothing=0.))
        self.batches, self.value, self.count = batches, value, 0

    def forward(self, input, target):
        self.count += 1
        result = super().forward(input, target)
        if self.count in self.batches:
            result['loss'] = result['loss'] * self.value
        return result


OPTIMIZERS = {
    'fused': lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    'plain': lambda p: torch.optim.AdamW(p, lr=0.01),
    'fused momentum': lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    'momentum': lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    'stateless': lambda p: torch.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('make_optimizer', OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_no_step_is_taken_with_a_loss_that_is_not_finite(make_optimizer, value, caplog):
    """The weights are those of a training without the batches, and the mean is over the others."""
    parts = batches([4] * 5)

    def train(task, data, **kwargs):
        optimizer = make_optimizer(task.trainable_module.parameters())
        trainer = Trainer(task, data, Stepper(task, optimizer), Precision(CPU), **kwargs)
        return trainer.train_epoch(0), trainer

    poisoned, plain = Poisoned(make(), (2, 4), value), Poisoned(make(), ())
    losses, trainer = train(poisoned, parts, skip_nan_steps=2)
    expected, _ = train(plain, parts[::2])
    assert losses['loss'] == pytest.approx(expected['loss'], rel=1e-6) and trainer.num_skipped == 2
    for p, q in zip(poisoned.trainable_module.parameters(), plain.trainable_module.parameters()):
        assert p.equal(q)
    assert 'step 2 of 5' in caplog.text and f'loss: {value}' in caplog.text


def test_a_meter_that_goes_on_in_another_stage_begins_anew():
    meter, of_stage1 = LossMeter(), LossMeter()
    of_stage1.update(dict(loss=torch.tensor(9.), hidden_loss=torch.tensor(8.)), 4)
    meter.load_state_dict(of_stage1.state_dict(), CPU)
    meter.update(dict(loss=torch.tensor(2.)), 4)
    assert meter.means() == dict(loss=2.)


def test_a_loss_that_is_not_finite_stops_the_run():
    """With the step, the losses and the learning rate, at the log interval; the weights are those before."""
    task, plain = Poisoned(make(), (3,)), Poisoned(make(), ())
    for t in (task, plain):
        optimizer = torch.optim.SGD(t.trainable_module.parameters(), lr=0.25)
        trainer = Trainer(t, batches([4] * (6 if t is task else 2)), Stepper(t, optimizer), Precision(CPU))
        if t is plain:
            trainer.train_epoch(0)
            continue
        trainer.log_interval = 3
        message = r'epoch 0, step 3 of 6 \(loss: nan; learning rate 2.500e-01\).*--skip-nan-steps'
        with pytest.raises(TrainingError, match=message):
            trainer.train_epoch(0)
    assert all(p.equal(q) for p, q in zip(task.parameters(), plain.parameters()))


def test_one_bad_batch_of_an_accumulation_spoils_its_update():
    task, plain = Poisoned(make(), (2,)), Poisoned(make(), ())
    for t, parts in ((task, batches([4] * 4)), (plain, batches([4] * 4)[2:])):
        optimizer = torch.optim.SGD(t.trainable_module.parameters(), lr=0.1)
        Trainer(t, parts, Stepper(t, optimizer), Precision(CPU), grad_accum_steps=2, skip_nan_steps=1).train_epoch(0)
    assert all(p.equal(q) for p, q in zip(task.parameters(), plain.parameters()))


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('accumulated', [1, 2])
def test_running_statistics_do_not_take_in_what_is_not_finite(accumulated, scaled):
    """Those of BatchNorm, and their average, are those of a training without the batches, bit for bit."""
    images = [(torch.where(torch.tensor(i == 2), float('inf'), x), y) for i, (x, y) in enumerate(batches([4] * 6))]
    without = [batch for i, batch in enumerate(images) if i // accumulated != 2 // accumulated]
    states = []
    for data in (images, without):
        torch.manual_seed(0)
        task = ClassificationTask(timm.create_model('test_resnet', num_classes=3))
        task.setup_ema(decay=0.5)
        optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
        scaler = NativeScaler('cpu') if scaled else None
        Trainer(task, data, Stepper(task, optimizer, scaler), Precision(CPU), grad_accum_steps=accumulated,
                skip_nan_steps=1).train_epoch(0)
        states.append((task.trainable_module.state_dict(), task.trainable_module_ema.state_dict()))
    (ours, average), (theirs, _) = states
    assert all(value.isfinite().all() for value in average.values() if value.is_floating_point())
    for name, value in ours.items():
        if not name.endswith('num_batches_tracked'):
            torch.testing.assert_close(value, theirs[name], rtol=1e-5 if scaled else 0., atol=1e-7 if scaled else 0.)


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float('nan')


class NanGradientTask(ClassificationTask):
    """With a finite loss."""
    def forward(self, images, target):
        result = super().forward(images, target)
        return {**result, 'loss': NanGradient.apply(result['loss'])}


def test_running_statistics_do_not_take_in_a_step_whose_gradients_are_not_finite():
    task = NanGradientTask(timm.create_model('test_resnet', num_classes=3))
    before = copy.deepcopy(task.trainable_module.state_dict())
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    Trainer(task, batches([4] * 2), Stepper(task, optimizer), Precision(CPU), skip_nan_steps=2).train_epoch(0)
    assert all(value.equal(before[name]) for name, value in task.trainable_module.state_dict().items()
               if not name.endswith('num_batches_tracked'))


def test_losses_that_are_not_finite_are_told_with_a_scaler_and_left_out_as_often_as_is_allowed():
    """However far they bring the loss scale down."""
    for allowed in (0, 40):
        task = Poisoned(make(), range(2, 42))
        optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
        trainer = Trainer(task, batches([2] * 42), Stepper(task, optimizer, NativeScaler('cpu')), Precision(CPU),
                          skip_nan_steps=allowed)
        if allowed:
            trainer.train_epoch(0)
            assert trainer.num_skipped == 40 and trainer.step.scaler.state_dict()['scale'] < 2 ** -20
        else:
            with pytest.raises(TrainingError, match='The loss is not finite at epoch 0, step 2 of 42'):
                trainer.train_epoch(0)


def test_gradients_that_are_never_finite_stop_a_run_with_a_scaler():
    """Their loss is, and the scaler looks for a scale that would do."""
    task = NanGradientTask(make())
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    trainer = Trainer(
        task, batches([2] * 40), Stepper(task, optimizer, NativeScaler('cpu')), Precision(CPU), log_interval=10)
    with pytest.raises(TrainingError, match='with any loss scale'):
        trainer.train_epoch(0)


def test_float16_scaler_leaves_out_an_infinite_loss():
    task = Poisoned(make(), (1,), float('inf'))
    before = [p.clone() for p in task.parameters()]
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.1)
    trainer = Trainer(
        task, batches([4]), Stepper(task, optimizer, NativeScaler('cpu')), Precision(CPU), skip_nan_steps=1)
    trainer.train_epoch(0)
    assert all(p.equal(q) for p, q in zip(task.parameters(), before)) and trainer.num_skipped == 1


def test_the_mean_of_an_epoch_that_was_continued_is_over_all_of_it():
    parts = batches([4] * 4)
    whole, halves = ClassificationTask(make()), ClassificationTask(make())

    def trainer(task, data):
        return Trainer(task, data, Stepper(task, torch.optim.SGD(task.parameters(), lr=0.1)), Precision(CPU))

    expected = trainer(whole, parts).train_epoch(0)
    first, states = trainer(halves, parts), []
    first.on_update = lambda epoch, update, last: states.append(first.meter.state_dict())
    first.train_epoch(0)

    class FromThere(list):
        def set_epoch(self, epoch, first_batch):
            self[:] = parts[first_batch:]

        def __len__(self):
            return 4

    halves.load_state_dict(ClassificationTask(make()).state_dict())
    first = trainer(halves, parts[:2])
    first.train_epoch(0)
    losses = trainer(halves, FromThere(parts)).train_epoch(0, 2, states[1])
    assert losses['loss'] == pytest.approx(expected['loss'], rel=1e-6)


def test_mirrored_views():
    model = make().eval()
    (images, labels), = batches([6])
    metrics = Validator(ClassificationTask(model), [(images, labels)], Precision(CPU), tta=2)(model)
    with torch.no_grad():
        logits = (model(images) + model(images.flip(-1))) / 2
    assert metrics['loss'] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
