import itertools
import math
import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.datasets import FakeData

from timm_dearkd.engine import augmentation
from timm_dearkd.engine.augmentation import AffineJitter
from timm_dearkd.engine.data import open_dataset
from timm_dearkd.engine.loader import (
    _loader_kwargs,
    build_eval_loader,
    build_teacher_loader,
    build_train_loader,
    create_eval_loader,
    create_train_loader,
)
from timm_dearkd.engine.process import SINGLE, Ranks
from timm_dearkd.engine.wrappers import ClassFraction
from timm_dearkd.train import _parse_args

CPU = torch.device('cpu')


def config(in_chans=3, size=32):
    return dict(
        input_size=(in_chans, size, size), mean=(0.5,) * in_chans, std=(0.25,) * in_chans, interpolation='bilinear',
        crop_pct=1., crop_mode='center')


@pytest.mark.parametrize('prefetcher', [True, False])
def test_eval_batches_are_the_images(image_folder, prefetcher):
    dataset = open_dataset('', str(image_folder), 'validation')
    loader = create_eval_loader(dataset, config(size=40), 5, CPU, use_prefetcher=prefetcher, num_workers=0)
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [5, 5, 2]
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    first = np.asarray(Image.open(image_folder / 'validation' / 'blue sky' / '0.png'), dtype=np.float32) / 255
    torch.testing.assert_close(images[0], torch.from_numpy((first - 0.5) / 0.25).permute(2, 0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('prefetcher', [True, False])
def test_mixup_until_it_is_off(image_folder, prefetcher, workers):
    dataset = open_dataset('', str(image_folder), 'train')
    mixup_cls = timm.data.FastCollateMixup if prefetcher else timm.data.Mixup
    mixup = mixup_cls(mixup_alpha=1., label_smoothing=0., num_classes=3)
    loader = create_train_loader(
        dataset, config(), 6, CPU, use_prefetcher=prefetcher, mixup=mixup, mixup_off_epoch=1, num_workers=workers)
    images, target = next(iter(loader))
    assert target.shape == (6, 3)
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    loader.set_epoch(1)
    assert {value for _, target in loader for value in target.unique().tolist()} == {0., 1.}


AUGMENTED = dict(
    re_prob=0.9, re_mode='pixel', auto_augment='rand-m9-mstd0.5-inc1', color_jitter=0.4, scale=(0.1, 1.),
    affine=AffineJitter('edge'))


def load(folder, epochs, prefetcher=True, workers=0, **kwargs):
    """The batches of (epoch, first batch) pairs, one after the other."""
    mixup = (timm.data.FastCollateMixup if prefetcher else timm.data.Mixup)(1., 1., num_classes=3)
    dataset = open_dataset('', str(folder), 'train')
    loader = create_train_loader(
        dataset, config(), 8, CPU, use_prefetcher=prefetcher, mixup=mixup, num_workers=workers,
        **{**AUGMENTED, **kwargs})
    batches = []
    for epoch, first in epochs:
        loader.set_epoch(epoch, first)
        torch.manual_seed(int(torch.randint(1000, ())))  # what else draws random numbers changes nothing
        batches.append(list(loader))
    return batches


def equal(batches, others):
    return len(batches) == len(others) and all(
        x.equal(y) and t.equal(u) for (x, t), (y, u) in zip(batches, others))


@pytest.mark.parametrize('prefetcher', [True, False])
def test_an_epoch_from_the_middle(image_folder, prefetcher):
    """Same images, crops, mixes and erasures as in the whole epoch, in any number of workers."""
    first, second = load(image_folder, [(0, 0), (1, 0)], prefetcher)
    assert len(first) == 6 and not equal(first, second)
    for workers in (0, 2):
        rest, = load(image_folder, [(1, 4)], prefetcher, workers)
        assert equal(rest, second[4:])
    again, _, rest = load(image_folder, [(0, 0), (0, 3), (1, 2)], prefetcher, 2)  # with workers that stay
    assert equal(again, first) and equal(rest, second[2:])
    other, = load(image_folder, [(1, 0)], prefetcher, seed=1)
    assert not equal(other, second)


def test_the_training_keeps_its_random_numbers(image_folder):
    dataset = open_dataset('', str(image_folder), 'train')
    loader = create_train_loader(dataset, config(), 8, CPU, num_workers=0, **AUGMENTED)
    loader_eval = create_eval_loader(open_dataset('', str(image_folder), 'validation'), config(), 8, CPU, num_workers=2)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    list(loader), list(loader_eval)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize('kwargs', [{}, dict(num_aug_repeats=3)])
def test_processes_share_the_images_of_one(image_folder, kwargs):
    """The batches of two processes hold the samples of the one batch twice as large, augmented alike."""
    def samples(batch_size, rank, world_size):
        dataset = open_dataset('', str(image_folder), 'train')
        loader = create_train_loader(
            dataset, config(), batch_size, CPU, num_workers=0, ranks=Ranks(rank, world_size),
            scale=(0.1, 1.), auto_augment='rand-m9', **kwargs)
        loader.set_epoch(1, 1)
        return [images for images, _ in loader]

    one, first, second = samples(8, 0, 1), samples(4, 0, 2), samples(4, 1, 2)
    assert len(one) == len(first) == len(second) == 5
    for whole, *halves in zip(one, first, second):
        assert torch.stack(halves, 1).flatten(0, 1).equal(whole)


def test_repeated_augmentation_differs_between_repeats(image_folder):
    dataset = open_dataset('', str(image_folder), 'train')
    loader = create_train_loader(
        dataset, config(size=40), 6, CPU, num_workers=0, num_aug_repeats=3, scale=(0.5, 0.5), hflip=0.)
    images, labels = next(iter(loader))
    assert labels[:3].unique().numel() == labels[3:].unique().numel() == 1
    assert not images[0].equal(images[1]) and not images[1].equal(images[2])


def test_several_sizes(image_folder):
    dataset = open_dataset('', str(image_folder), 'train')
    loader = create_train_loader(
        dataset, config(), 8, CPU, num_workers=0, image_sizes=[16, 32],
        schedule=dict(batch_sizes=[8, 4], num_batches=12))
    loader.set_epoch(0)
    shapes = [tuple(images.shape) for images, _ in loader]
    assert len(loader) == len(shapes) == 12 and set(shapes) == {(8, 3, 16, 16), (4, 3, 32, 32)}
    loader.set_epoch(0, 5)
    assert [tuple(images.shape) for images, _ in loader] == shapes[5:]


def test_streams_are_read_again_up_to_the_batch(image_folder):
    class Stream(torch.utils.data.IterableDataset):
        transform, epochs = None, []

        def __iter__(self):
            for i in range(20):
                yield self.transform(Image.new('RGB', (40, 40), (i, i, i))), i

        def __len__(self):
            return 20

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    loader = create_train_loader(Stream(), config(), 4, CPU, num_workers=0, no_aug=True)
    loader.set_epoch(3, 2)
    assert [labels.tolist() for _, labels in loader] == [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert Stream.epochs == [3]
    for flag, kwargs in (('--train-img-sizes', dict(image_sizes=[16, 32])), ('--aug-splits', dict(num_aug_splits=2))):
        with pytest.raises(ValueError, match=f'{flag}.* cannot be used with a streamed data set'):
            create_train_loader(Stream(), config(), 4, CPU, num_workers=0, **kwargs)


class Noise(torch.utils.data.IterableDataset):
    """A stream of random crops of one image."""
    transform = None

    def __iter__(self):
        image = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).view(np.uint8)[::2].reshape(64, 64)).convert('RGB')
        for _ in range(8):
            yield self.transform(image), 0

    def __len__(self):
        return 8


def test_workers_of_streams_are_seeded_by_seed_rank_and_epoch():
    """Here they start in each epoch. A resumed run repeats their random numbers."""
    def read(seed, rank, epoch):
        loader = create_train_loader(
            Noise(), config(), 4, CPU, num_workers=1, seed=seed, ranks=Ranks(rank, 2), mixup_off_epoch=9)
        loader.set_epoch(epoch)
        return torch.cat([images for images, _ in loader])

    reference = read(0, 0, 1)
    assert torch.equal(read(0, 0, 1), reference)
    for other in ((1, 0, 1), (0, 1, 1), (0, 0, 2)):
        assert not torch.equal(read(*other), reference), other


def test_sides_of_cutmix_that_are_equal_in_pixels_are_refused():
    flags = ['DIR', '-b', '2', '--workers', '0', '--cutmix-minmax', '0.30', '0.33']
    build_train_loader(_parse_args(flags)[0], Plain(), config(size=32), None, CPU, SINGLE)
    args = _parse_args([*flags, '--train-img-sizes', '32', '24'])[0]
    with pytest.raises(ValueError, match='the least and the greatest side are both 7 of 24 pixels'):
        build_train_loader(args, Plain(), config(size=32), None, CPU, SINGLE)


@pytest.mark.parametrize('in_chans,mode', [(1, 'RGB'), (3, 'L')])
def test_torchvision_sets_are_converted_to_the_channels_asked_for(in_chans, mode):
    class Images(torch.utils.data.Dataset):
        transform = None

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return self.transform(Image.new(mode, (40, 40), 128 if mode == 'L' else (128, 128, 128))), index

    loader = create_eval_loader(Images(), config(in_chans), 4, CPU, num_workers=0)
    images, _ = next(iter(loader))
    assert images.shape == (4, in_chans, 32, 32)
    torch.testing.assert_close(images, torch.full_like(images, (128 / 255 - 0.5) / 0.25))


class Plain(torch.utils.data.Dataset):
    """Images of one colour, as torchvision's data sets have them: with a transform, and without a reader."""
    transform = None
    targets = [0, 1] * 2

    def __len__(self):
        return 4

    def __getitem__(self, index):
        image = Image.new('RGB', (16, 16), (200, 100, 50))
        return image if self.transform is None else self.transform(image), self.targets[index]


@pytest.mark.parametrize('kwargs', [{}, dict(num_aug_splits=2), dict(image_sizes=[16])])
def test_the_affine_map_comes_first(kwargs, monkeypatch):
    """The image is made smaller, so that its border is black, before timm's augmentation, which here does nothing."""
    numbers = itertools.cycle([0., 0., math.log(2), math.log(2), 0., 0., 0.])
    monkeypatch.setattr(augmentation, '_uniform', lambda limit: next(numbers))
    loader = create_train_loader(
        Plain(), dict(config(size=16), mean=(0.,) * 3, std=(1 / 255,) * 3), 4, CPU, num_workers=0, scale=(1., 1.),
        ratio=(1., 1.), hflip=0., color_jitter=0., affine=AffineJitter('black'), **kwargs)
    images = next(iter(loader))[0][:4]
    torch.testing.assert_close(images[:, :, 8, 8], torch.tensor([[200., 100., 50.]] * 4))
    assert images[:, :, 0, 0].count_nonzero() == 0


@pytest.mark.parametrize('mode,in_chans', [(None, 3), ('YCbCr', 3), ('RGBA', 4)])
def test_torchvision_sets_take_the_mode_of_the_images(mode, in_chans):
    args = _parse_args(['DIR', '-b', '4', '--workers', '0', *(['--input-img-mode', mode] if mode else [])])[0]
    images, _ = next(iter(build_eval_loader(args, Plain(), config(in_chans, size=16), CPU, SINGLE)))
    expected = torch.tensor(Image.new('RGB', (1, 1), (200, 100, 50)).convert(mode or 'RGB').getpixel((0, 0))) / 255
    torch.testing.assert_close(images[0, :, 8, 8], (expected - 0.5) / 0.25)


def test_the_teacher_is_checked_on_images_without_augmentation():
    """Also on a fraction of a data set of torchvision."""
    args = _parse_args([
        'DIR', '-b', '2', '--workers', '0', '--reprob', '1', '--train-img-sizes', '16', '8', '--kd-model-name', 'cnn',
    ])[0]
    train_set = ClassFraction(Plain(), 0.5)
    loader = build_teacher_loader(args, train_set, None, 2, config(size=16), CPU, SINGLE)
    before, _ = next(iter(loader))
    build_train_loader(args, train_set, config(size=16), None, CPU, SINGLE)
    assert torch.equal(next(iter(loader))[0], before)


@pytest.mark.parametrize('teacher, num_validation, expected', [
    ('cnn', None, 100), ('cnn', (15, 14), 100), ('cnn', (90, 1), 100), ('cnn', (15, 15), None), ('', None, None)])
def test_the_teacher_is_checked_on_training_images_if_there_are_few_others(teacher, num_validation, expected):
    args = _parse_args(['DIR', '--workers', '0', '--kd-model-name', teacher])[0]
    train_set, eval_set = torch.utils.data.Subset(Plain(), [0] * 100), None
    if num_validation is not None:
        eval_set = torch.utils.data.Subset(Plain(), [0] * sum(num_validation))
        eval_set.targets = [label for label, count in enumerate(num_validation) for _ in range(count)]
    loader = build_teacher_loader(args, train_set, eval_set, 2, config(size=16), CPU, SINGLE)
    assert expected == (None if loader is None else len(loader.dataset))


def test_strongest_augmentation(image_folder):
    """Every operation of RandAugment at its greatest magnitude; some Pillow versions refuse what timm asks for."""
    from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS, AugmentOp
    image = Image.open(next(image_folder.glob('train/*/*.png')))
    for name in _RAND_INCREASING_TRANSFORMS:
        assert AugmentOp(name, prob=1., magnitude=10, hparams=dict(magnitude_std=0.))(image).size == image.size


def test_errors(image_folder):
    dataset = open_dataset('', str(image_folder), 'train')
    with pytest.raises(ValueError, match='--aa'):
        create_train_loader(dataset, config(), 8, CPU, auto_augment='nothing', num_workers=0)
    with pytest.raises(ValueError, match='48 images, less than one batch of 64'):
        create_train_loader(dataset, config(), 64, CPU)


@pytest.mark.parametrize('count, batch, world, mixup, level, message', [
    (72, 40, 1, None, 'WARNING', 'skips 32 of 72 images (44 %, chosen at random)'),
    (72, 40, 1, None, 'WARNING', '--batch-size 36 skips 0.'),
    (50, 24, 1, timm.data.FastCollateMixup(1., num_classes=9), 'INFO', 'skips 2 of 50 images (4 %'),
    (98, 20, 2, None, 'WARNING', 'skips 18 of 98 images (18 %, chosen at random)'),
    (98, 20, 2, None, 'WARNING', '--batch-size 16 skips 2.'),
    (80, 40, 1, None, None, ''),
])
def test_images_of_a_last_batch_that_is_not_full_are_told(count, batch, world, mixup, level, message, caplog):
    """And so is the largest batch, down to half of this one, that skips fewest."""
    caplog.set_level('INFO')
    dataset = FakeData(size=count, image_size=(3, 32, 32))
    loader = create_train_loader(
        dataset, config(), batch, CPU, ranks=Ranks(world_size=world), mixup=mixup, num_workers=0)
    told = [r for r in caplog.records if 'Each epoch skips' in r.message]
    assert [r.levelname for r in told] == [level] * bool(level)
    assert len(loader) * batch * world == count - (int(told[0].message.split()[3]) if told else 0)
    assert not told or message in told[0].message


@pytest.mark.parametrize('flags,on_cuda,on_cpu', [
    ([], True, False), (['--pin-mem'], True, True), (['--no-pin-mem'], False, False)])
def test_memory_is_pinned_on_cuda(flags, on_cuda, on_cpu):
    args = _parse_args(['DIR', *flags])[0]
    for device, pinned in (('cuda', on_cuda), ('cpu', on_cpu)):
        assert _loader_kwargs(args, torch.device(device), SINGLE)['pin_memory'] is pinned
