import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from timm.utils import NativeScaler

from timm_dearkd.engine.device import Precision
from timm_dearkd.engine.loop import LossMeter, Stepper, train_one_epoch, validate

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
    losses = train_one_epoch(
        0, task, parts, Stepper(task, optimizer, scaler, clip_grad), Precision(CPU), grad_accum_steps=3,
        on_update=lambda update, last: updates.append((update, last)))

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


def test_losses_are_weighted_by_samples_and_by_where_they_occur():
    meter = LossMeter()
    meter.update(dict(loss=torch.tensor(1.), part=torch.tensor(4.)), 3)
    meter.update(dict(loss=torch.tensor(5.)), 1)
    assert meter.means() == dict(loss=2., part=4.)
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
    train_one_epoch(0, task, batches([2] * 6), Stepper(task, optimizer), Precision(CPU), log_interval=3)
    assert len(counts) == 3  # the run's first update, and one for every three


def test_validate_is_the_accuracy_over_all_samples():
    model = make().train()
    parts = batches([4, 4, 3])
    task = ClassificationTask(model)
    metrics = validate(model, parts, task.create_evaluator(), Precision(CPU))
    assert model.training
    images, labels = (torch.cat(part) for part in zip(*parts))
    with torch.no_grad():
        logits = model.eval()(images)
    assert metrics['top1'] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), rel=1e-5)
    assert metrics['top5'] == 100.
    assert metrics['loss'] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_lookahead_is_synchronised_at_the_end_of_an_epoch():
    from timm.optim import create_optimizer_v2
    task = ClassificationTask(make())
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'lookahead_sgd', lr=0.1)
    slow = {}
    sync = optimizer.sync_lookahead
    optimizer.sync_lookahead = lambda: (sync(), slow.update(done=True))
    train_one_epoch(0, task, batches([2] * 2), Stepper(task, optimizer), Precision(CPU))
    assert slow


def test_second_order_optimizers():
    from timm.optim import create_optimizer_v2
    task = ClassificationTask(timm.create_model('test_resnet', num_classes=3))
    optimizer = create_optimizer_v2(task.get_trainable_module(), 'adahessian', lr=0.1)
    before = [p.clone() for p in task.trainable_module.parameters()]
    train_one_epoch(0, task, batches([2]), Stepper(task, optimizer), Precision(CPU))
    assert not all(p.equal(q) for p, q in zip(task.trainable_module.parameters(), before))


def test_precision():
    model = make()
    with Precision(CPU, torch.bfloat16).autocast():
        assert model(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16
    with Precision(CPU).autocast():
        assert model(torch.randn(1, 3, 32, 32)).dtype == torch.float32
    assert Precision(CPU, torch.float16).scaler is None
    assert Precision(torch.device('cuda'), torch.bfloat16).scaler is None
