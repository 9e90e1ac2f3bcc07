import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import ClassificationTask

from timm_dearkd.engine.device import Precision
from timm_dearkd.engine.loop import LossMeter, Stepper, train_one_epoch, validate

CPU = torch.device('cpu')


def batches(sizes):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n) % 3) for n in sizes]


def make():
    torch.manual_seed(0)
    return timm.create_model('test_vit', num_classes=3, img_size=32, dynamic_img_size=False)


@pytest.mark.parametrize('clip_grad', [None, 0.01])
def test_gradient_accumulation_is_the_bigger_batch(clip_grad):
    """Two steps of 8, the last one of two batches only, beside plain PyTorch on the concatenated batches."""
    parts = batches([4, 4, 4, 4, 4])
    model = make()
    task = ClassificationTask(model, criterion_kwargs=dict(smoothing=0.))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    updates = []
    losses = train_one_epoch(
        0, task, parts, Stepper(task, optimizer, clip_grad=clip_grad), Precision(CPU), grad_accum_steps=3,
        on_batch=lambda i, last: updates.append((i, last)))

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
    assert updates == [(2, False), (4, True)]
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
            if func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__, torch.Tensor.__bool__):
                counts.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    class Task(ClassificationTask):
        def forward(self, input, target):
            result = super().forward(input, target)
            return {**result, 'loss': result['loss'].as_subclass(Watched)}

    model = make()
    task = Task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train_one_epoch(0, task, batches([2] * 6), Stepper(task, optimizer), Precision(CPU), log_interval=3)
    assert len(counts) == 3  # twice in the epoch, and its means


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


def test_precision():
    model = make()
    with Precision(CPU, torch.bfloat16).autocast():
        assert model(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16
    with Precision(CPU).autocast():
        assert model(torch.randn(1, 3, 32, 32)).dtype == torch.float32
    assert Precision(CPU, torch.float16).scaler is None
    assert Precision(torch.device('cuda'), torch.bfloat16).scaler is None
