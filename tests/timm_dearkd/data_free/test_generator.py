"""The generator of images, on a small CNN."""
from dataclasses import replace

import pytest
import timm
import torch

import timm_dearkd  # noqa: F401
from timm_dearkd.data_free import generator as module
from timm_dearkd.data_free.generator import GENERATOR_WEIGHTS, Generator, GeneratorInverter, random_views, run_pilot
from timm_dearkd.data_free.inversion import Augmentation, Execution, Resolution

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TARGETS = torch.tensor([1, 3]).repeat_interleave(5)


@pytest.fixture(autouse=True)
def _short_periods(monkeypatch):
    monkeypatch.setattr(module, 'MIN_PERIOD', 6)
    monkeypatch.setattr(module, 'BATCH_SIZE', 8)


def make(seed=0, steps=24, model=None, weights=GENERATOR_WEIGHTS, diversity='none', **kwargs):
    torch.manual_seed(seed)
    if model is None:
        model = timm.create_model('test_resnet', num_classes=4)
        for _ in range(2):
            model.train()(torch.randn(8, 3, 32, 32))  # statistics of its own
    return GeneratorInverter(
        model, MEAN, STD, [Resolution(32, steps, 0.01)], weights, diversity, augmentation=Augmentation(0),
        check_interval=6, **kwargs)


@pytest.mark.parametrize('size', [8, 28, 32, 64, 96, 224])
@pytest.mark.parametrize('in_chans', [1, 3])
def test_images_of_any_size(size, in_chans):
    generator = Generator(7, in_chans, size)
    images = generator(torch.randn(7, module.NOISE))
    assert images.shape == (7, in_chans, size, size) and images.min() >= 0 and images.max() <= 1
    assert not images[0].equal(images[1])


def test_images_are_valid_and_come_closer():
    with make() as inverter:
        checks = []
        state = torch.get_rng_state()
        images = inverter.run(TARGETS, 0, lambda step, losses: checks.append((step, losses)))
        assert torch.get_rng_state().equal(state)
        assert images.equal(inverter.run(TARGETS, 0)) and not images.equal(inverter.run(TARGETS, 1))
    assert images.shape == (10, 3, 32, 32)
    pixels = images * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    assert [step for step, _ in checks] == [6, 12, 18, 24] and checks[-1][1]['loss'] < checks[0][1]['loss']
    assert len({image.numpy().tobytes() for image in images}) == 10
    assert not any(m._forward_pre_hooks for m in inverter.model.modules())


def test_the_cnn_is_left_alone():
    inverter = make(steps=6, execution=Execution(channels_last=True))
    before = {k: v.clone() for k, v in inverter.model.state_dict().items()}
    assert inverter.run(TARGETS, 0).isfinite().all()
    assert all(v.equal(before[k]) for k, v in inverter.model.state_dict().items())
    assert all(p.grad is None for p in inverter.model.parameters())


def test_every_image_has_a_code_of_its_class():
    labels = torch.tensor([2, 0, 1, 2, 2, 0, 2, 2, 2])
    codes, rounds = module._share_codes(labels, 3, 8)  # class 2 has the codes 2 and 5
    assert codes.tolist() == [2, 0, 1, 5, 2, 3, 5, 2, 5] and rounds.tolist() == [0, 0, 0, 0, 1, 0, 1, 2, 2]
    assert module._share_codes(labels[:0], 3, 8)[1].unique().numel() == 0


def test_periods_are_long_enough(monkeypatch):
    monkeypatch.undo()
    assert [module._period(steps) for steps in (3, 50, 99, 110, 400, 3200)] == [3, 50, 99, 55, 50, 400]
    for steps in range(1, 1000):
        period = module._period(steps)
        assert period >= min(50, steps) and (steps - 1) % period + 1 >= min(steps, 44)  # the last one is the shortest


def test_images_come_from_the_ends_of_the_periods():
    assert module._harvest_steps(24, 6) == [18, 24] and module._harvest_steps(6, 6) == [6]
    assert module._harvest_steps(20, 6) == [18, 20] and module._harvest_steps(3, 6) == [3]


@pytest.mark.parametrize('steps', [24, 48])
def test_images_of_a_class_differ_by_more_than_noise(steps, monkeypatch):
    """Without noise, two of four periods with four codes of each class give eight images, and all are different.

    With more steps, the periods are longer.
    """
    monkeypatch.setattr(module, 'NOISE', 0)
    monkeypatch.setattr(module, 'PERIODS', 4)
    targets = torch.tensor([1, 3]).repeat_interleave(20)
    images = make(steps=steps).run(targets, 0)
    for index in (1, 3):
        different = torch.stack([*{image.numpy().tobytes(): image for image in images[targets == index]}.values()])
        assert len(different) == 8
        distances = torch.pdist(different.flatten(1))
        assert distances.min() > 0.1 * torch.pdist(images.flatten(1)).max()


class Levels(torch.nn.Module):
    """A CNN whose classes are shades of grey."""

    def __init__(self, num_classes):
        super().__init__()
        self.norm, self.num_classes = torch.nn.BatchNorm2d(3), num_classes
        self.register_buffer('levels', torch.linspace(-0.6, 0.6, num_classes))

    def forward(self, x):
        return -50 * (self.norm(x).mean((1, 2, 3))[:, None] - self.levels) ** 2


def test_images_are_of_their_classes(monkeypatch):
    """Also if a batch has more classes than codes, and if it has fewer images than periods."""
    monkeypatch.setattr(module, 'PERIODS', 4)
    inverter = make(model=Levels(4), steps=240, weights=replace(GENERATOR_WEIGHTS, bn=0.))
    for num_codes, targets in (8, [2, 0, 3, 0, 2, 2]), (3, [0, 1, 2, 3] * 2), (8, [1]):
        monkeypatch.setattr(module, 'BATCH_SIZE', num_codes)
        images = inverter.run(torch.tensor(targets), 0)
        assert inverter.model(images).argmax(1).tolist() == targets


def test_a_reset_draws_codes_and_first_layer():
    generator = Generator(4, 1, 8)
    before = {name: value.clone() for name, value in generator.named_parameters()}
    generator.reset()
    changed = {name for name, value in generator.named_parameters() if not value.equal(before[name])}
    assert changed == {'codes', 'first.weight', 'first.bias'}


def test_views_are_crops():
    """Of a linear ramp, a crop has linear values inside the range; a mirror image has a falling ramp."""
    ramp = torch.linspace(-1, 1, 33).expand(64, 1, 33, 33).clone().requires_grad_()
    views = random_views(ramp, flip=True)
    slopes = views[..., 16, 20] - views[..., 16, 10]
    assert (slopes < 0).any() and (slopes > 0).any()
    steps = views[:, 0, 16, 2:-2].diff(dim=-1)
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), atol=1e-5, rtol=0)
    full = 2 / 32
    assert ((steps[:, 0].abs() > full * 0.6 ** 0.5 - 1e-3) & (steps[:, 0].abs() < full + 1e-3)).all()
    assert (random_views(ramp, flip=False)[..., 16, 20] > random_views(ramp, flip=False)[..., 16, 10]).all()
    views.sum().backward()
    assert ramp.grad.abs().sum() > 0


class Mirrored(torch.nn.Module):
    """A CNN that takes the left half of the image for the class, or the whole image."""

    def __init__(self, whole):
        super().__init__()
        self.norm, self.whole, self.num_classes = torch.nn.BatchNorm2d(3), whole, 3

    def forward(self, x):
        means = self.norm(x)[..., :None if self.whole else x.shape[-1] // 2].mean((2, 3))
        return 20 * torch.cat([means[:, :2] - means[:, 2:], means[:, 2:]], dim=1)


@pytest.mark.parametrize('whole', [True, False])
def test_the_pilot_finds_out_whether_mirror_images_are_alike(whole, caplog):
    caplog.set_level('INFO')
    inverter = make(model=Mirrored(whole), weights=replace(GENERATOR_WEIGHTS, bn=0.))
    weights, mirror = run_pilot(inverter, torch.arange(3).repeat_interleave(8), 0, kept=['bn'])
    assert weights.bn == 0. and mirror == whole and 'Pilot: --bn-weight 0.' in caplog.text
    assert inverter.weights == weights and inverter.augmentation.flip == mirror
    assert not run_pilot(inverter, TARGETS % 3, 0, kept=['bn'], mirror=False)[1]
    assert inverter.resolutions[0].steps == 24


def test_the_pilot_takes_the_largest_weights_that_leave_the_classes(monkeypatch):
    monkeypatch.setattr(module, 'PILOT_WEIGHTS', (1e6, 1e-3))
    monkeypatch.setattr(module, 'PILOT_SCALES', (1., 1e-9))
    inverter = make(steps=30, weights=replace(GENERATOR_WEIGHTS, ep=1e6), diversity='intra')
    weights, _ = run_pilot(inverter, TARGETS, 0)
    assert weights.bn == 1e-3 and weights.ep == pytest.approx(1e-3) and weights.triplet == pytest.approx(5e-10)
    assert run_pilot(inverter, TARGETS, 0, kept=['bn', 'ep', 'triplet'])[0] == weights


def test_the_pilot_takes_the_best_weight_if_all_are_bad(monkeypatch, caplog):
    """It warns if the CNN predicts the class of less than half of the images. Infinite losses end it."""
    monkeypatch.setattr(module, 'PILOT_WEIGHTS', (float('inf'), 1e6, 1e5))
    targets = torch.tensor([0, 1, 2, 3]).repeat_interleave(3)
    assert run_pilot(make(steps=3), targets, 0)[0].bn in (1e6, 1e5)
    record, = caplog.records
    assert record.levelname == 'WARNING' and 'class of 25 %' in record.message
    monkeypatch.setattr(module, 'PILOT_WEIGHTS', (float('inf'),))
    with pytest.raises(ValueError, match='The losses of the pilot are not finite'):
        run_pilot(make(steps=12), TARGETS, 0)


def test_a_loss_that_is_not_finite_ends_the_batch():
    inverter = make()
    inverter.set_choices(replace(GENERATOR_WEIGHTS, bn=float('inf')), mirror=True)
    assert inverter.run(TARGETS, 0) is None


def test_errors():
    with pytest.raises(ValueError, match='--generator has one phase'):
        GeneratorInverter(
            timm.create_model('test_resnet'), MEAN, STD, [Resolution(16, 1, 0.1), Resolution(32, 1, 0.1)],
            diversity='none')
