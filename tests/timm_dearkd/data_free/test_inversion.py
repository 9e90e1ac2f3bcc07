import pytest
import timm
import torch
import torch.nn.functional as F

import timm_dearkd  # noqa: F401
from timm_dearkd.data_free.inversion import (
    Augmentation,
    Competitor,
    Execution,
    Inverter,
    LossWeights,
    Resolution,
    batch_targets,
)
from timm_dearkd.data_free.losses import intra_divergence_loss, l2_prior, total_variation

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model('test_resnet', num_classes=4)
    for _ in range(2):
        model.train()(torch.randn(8, 3, 32, 32))  # statistics of its own
    resolutions = [Resolution(16, 8, 0.2), Resolution(32, 8, 0.1)]
    return Inverter(model, MEAN, STD, **{'resolutions': resolutions, 'augmentation': Augmentation(jitter=4), **kwargs})


TARGETS = torch.tensor([0, 0, 1, 1, 2, 2])


def test_targets_go_round():
    """Each batch has distinct classes, all come equally often, and the order depends on the seed."""
    classes = [3, 5, 7, 9, 11]
    batches = batch_targets(30, classes, 3, 2, seed=1)
    for targets in batches:
        assert targets.shape == (6,) and targets.unique().numel() == 3 and targets[0] == targets[1]
    counts = torch.cat(batches).bincount(minlength=12)
    assert counts[classes].tolist() == [36] * 5 and counts.sum() == 180
    assert all(a.equal(b) for a, b in zip(batches, batch_targets(7, classes, 3, 2, seed=1)))
    assert not all(a.equal(b) for a, b in zip(batches, batch_targets(30, classes, 3, 2, seed=2)))
    assert batch_targets(2, [4], 6, 2)[1].tolist() == [4, 4]


@pytest.mark.parametrize('normalized', [False, True])
def test_the_sum_is_equation_8(normalized):
    weights = LossWeights(tv=0.1, l2=0.2, bn=0.3, ep=4., triplet=5., margin=2., normalized_latent=normalized)
    inverter = make(weights=weights)
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    losses = inverter.losses(images, TARGETS)
    with torch.no_grad():
        features = inverter.model.forward_head(inverter.model.forward_features(images), pre_logits=True)
        logits = inverter.model(images)
        if normalized:
            features = features / features.square().sum(1, keepdim=True).sqrt()
    expected = F.cross_entropy(logits, TARGETS) + 0.3 * losses['bn'] + 0.1 * total_variation(images)
    expected = expected + 0.2 * l2_prior(images) + intra_divergence_loss(features, TARGETS, 4., 5., 2.)
    torch.testing.assert_close(losses['loss'], expected, rtol=1e-5, atol=1e-5)
    plain = make(weights=weights, diversity='none').losses(images, TARGETS)
    torch.testing.assert_close(losses['loss'] - losses['diversity'], plain['loss'], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('execution', [
    Execution(), Execution(channels_last=True), pytest.param(Execution(backend='aot_eager'), marks=pytest.mark.slow)])
def test_images_are_valid_and_come_closer(execution):
    resolutions = [Resolution(16, 4, 0.2), Resolution(32, 28, 0.1)]
    with make(diversity='none', resolutions=resolutions, check_interval=8, execution=execution) as inverter:
        checks = []
        images = inverter.run(TARGETS, 0, lambda step, losses: checks.append((step, losses)))
        again = inverter.run(TARGETS, 0)
        assert images.equal(again) and not images.equal(inverter.run(TARGETS, 1))
    assert images.shape == (6, 3, 32, 32)
    pixels = images * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6
    assert [step for step, _ in checks] == [4, 8, 16, 24, 32] and checks[-1][1]['loss'] < checks[1][1]['loss']
    assert not any(m._forward_pre_hooks for m in inverter.model.modules())


def test_no_gradient_of_weights_and_no_statistics_moved():
    inverter = make()
    before = {k: v.clone() for k, v in inverter.model.state_dict().items()}
    inverter.run(TARGETS, 0)
    assert all(v.equal(before[k]) for k, v in inverter.model.state_dict().items())
    assert all(p.grad is None for p in inverter.model.parameters())


def test_a_competitor_of_another_normalisation_and_size():
    """The student's logits are those for its own normalisation and size, and pass gradients on."""
    student = timm.create_model('test_dearkd', num_classes=4, img_size=64)
    inverter = make(diversity='adi', competitor=Competitor(student))
    images = torch.randn(6, 3, 32, 32).requires_grad_()
    pixels = images * torch.tensor(STD).view(1, 3, 1, 1) + torch.tensor(MEAN).view(1, 3, 1, 1)
    cfg = student.pretrained_cfg
    own = (pixels - torch.tensor(cfg['mean']).view(1, 3, 1, 1)) / torch.tensor(cfg['std']).view(1, 3, 1, 1)
    expected = student(F.interpolate(own, (64, 64), mode='bilinear', antialias=True))
    torch.testing.assert_close(inverter._compete(images), expected, atol=1e-4, rtol=1e-4)
    gradient, = torch.autograd.grad(inverter.losses(images, TARGETS)['diversity'], images)
    assert gradient.abs().sum() > 0
    wide = make(diversity='adi', competitor=Competitor(timm.create_model('test_vit', num_classes=4, img_size=(32, 48))))
    assert wide._compete(images).shape == (6, 4)


def test_a_competitor_that_knows_some_of_the_classes():
    """Both distributions are over the student's classes, in the student's order."""
    student = timm.create_model('test_dearkd', num_classes=2, img_size=32)
    inverter = make(diversity='adi', competitor=Competitor(student, [3, 1]))
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        logits, own = inverter.model(images)[:, [3, 1]], inverter._compete(images)
        p, q = (x.double().div(3).softmax(1) for x in (logits, own))
        m = (p + q) / 2
        expected = 1 - ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean() / 2
    assert inverter.losses(images, TARGETS)['diversity'].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize('size', [8, 15])
def test_a_size_that_the_cnn_does_not_take(size):
    model = timm.create_model('inception_v3', num_classes=3)
    inverter = Inverter(model, MEAN, STD, [Resolution(96, 1, 0.1), Resolution(size, 1, 0.1)])
    with pytest.raises(ValueError, match=f'does not take images of {size} pixels'):
        inverter.check_sizes()
    make().check_sizes()


@pytest.mark.slow
def test_a_look_at_the_sizes_and_other_weights_lead_to_no_further_graph():
    counts = []
    for further in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with make(execution=Execution(backend='eager')) as inverter:
            if further:
                inverter.check_sizes()
            images = inverter.run(TARGETS, 0)
            if further:  # as the pilot does it
                inverter.set_weights(LossWeights(bn=3., ep=0.))
                assert not torch.equal(inverter.run(TARGETS, 0), images)
        counts.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert counts[0] == counts[1] > 0


def test_cnns_with_two_classifiers_or_none():
    """Without the CNN's features, only the loss that needs them is refused."""
    resolutions = [Resolution(32, 1, 0.1)]
    two = timm.create_model('swiftformer_xs', num_classes=4)
    assert isinstance(two.get_classifier(), tuple)
    with Inverter(two, MEAN, STD, resolutions) as inverter:
        inverter.check_sizes()
        assert inverter.losses(torch.randn(6, 3, 32, 32), TARGETS)['diversity'].isfinite()
    none = timm.create_model('efficientvim_m1', num_classes=4)
    resolutions = [Resolution(64, 1, 0.1)]
    with Inverter(none, MEAN, STD, resolutions) as inverter, pytest.raises(ValueError, match='--diversity none'):
        inverter.check_sizes()
    with Inverter(none, MEAN, STD, resolutions, diversity='none') as inverter:
        inverter.check_sizes()
        assert inverter.run(TARGETS, 0).isfinite().all()


def test_a_loss_that_is_not_finite_ends_the_batch():
    inverter = make(weights=LossWeights(bn=float('inf')), check_interval=3)
    checks = []
    assert inverter.run(TARGETS, 0, lambda step, losses: checks.append(step)) is None
    assert checks == [3]


def test_errors():
    with pytest.raises(ValueError, match='Unknown diversity'):
        make(diversity='more')
    with pytest.raises(ValueError, match="'adi' needs a student"):
        make(diversity='adi')
