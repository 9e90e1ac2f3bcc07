import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_dearkd.analysis.__main__ import main
from timm_dearkd.analysis.diversity import FeatureDistance, class_pairs, measure_diversity
from timm_dearkd.commands import run_command


@pytest.fixture
def folder(tmp_path):
    """'same': four equal images; 'apart': four of one grey each; 'alone': one."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for name, images in (
        ('same', [picture] * 4),
        ('apart', [np.full((24, 24), 60 * i, np.uint8) for i in range(4)]), ('alone', [picture]),
    ):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / 'images' / name / f'{i}.png')
    return tmp_path / 'images'


def test_pairs_are_of_one_class_and_without_repeats():
    labels = [0, 1, 0, 2, 1, 0, 0, 1]
    every = class_pairs(labels, 100)
    assert set(every) == {0, 1}  # class 2 has one image
    assert [len(set(map(frozenset, every[c]))) for c in (0, 1)] == [6, 3] == [len(every[c]) for c in (0, 1)]
    assert all(labels[i] == labels[j] == c and i != j for c in every for i, j in every[c])
    few = class_pairs(labels, 2, seed=3)
    assert few == class_pairs(labels, 2, seed=3) and len(few[0]) == 2 and set(few[0]) <= set(every[0])
    big = class_pairs([0] * 400, 79800)[0]
    assert len(set(big)) == math.comb(400, 2)


def test_mean_over_pairs_then_over_classes(folder):
    """Against the same sum over all pairs, with the mean absolute difference as the distance."""
    result = measure_diversity(
        str(folder), lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)), img_size=24, batch_size=2)
    greys = [60 * i / 255 for i in range(4)]
    expected = np.mean([abs(greys[i] - greys[j]) for i in range(4) for j in range(i)])
    assert result['classes'] == {'same': 0., 'apart': pytest.approx(expected, abs=1e-6)}
    assert result['mean'] == pytest.approx(expected / 2, abs=1e-6)
    assert result['stderr'] == pytest.approx(np.std([0, expected], ddof=1) / np.sqrt(2), abs=1e-6)
    assert (result['pairs'], result['images']) == (12, 9)


def test_a_class_may_be_called_train(folder):
    """`train` is a split if it has folders."""
    (folder / 'alone').rename(folder / 'train')
    result = measure_diversity(str(folder), lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)), img_size=24)
    assert set(result['classes']) == {'same', 'apart'}


@pytest.mark.parametrize('name', ['test_resnet', 'test_mambaout'])
def test_feature_distance_is_the_slow_formula(name):
    model = timm.create_model(name, num_classes=3).eval()
    distance = FeatureDistance(model, 'cnn')
    a, b = torch.rand(2, 2, 3, 32, 32)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    backbone = timm.create_model(name, features_only=True).eval()
    weights = {key.replace('stages.', 'stages_'): value for key, value in model.state_dict().items()}
    assert not backbone.load_state_dict(weights, strict=False).missing_keys
    with torch.no_grad():
        levels = zip(backbone((a - mean) / std), backbone((b - mean) / std))
    if name == 'test_mambaout':  # (B, H, W, C)
        levels = [(x.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2)) for x, y in levels]
    expected = np.zeros(2)
    for x, y in levels:
        x, y = x.double().numpy(), y.double().numpy()
        for n in range(2):
            for i, j in np.ndindex(*x.shape[2:]):
                u, v = (z[n, :, i, j] / max(np.linalg.norm(z[n, :, i, j]), 1e-10) for z in (x, y))
                expected[n] += ((u - v) ** 2).sum() / np.prod(x.shape[2:])
    torch.testing.assert_close(distance(a, b).double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_command(folder, cnn, tmp_path, capsys):
    main(['diversity', str(folder), '--model', str(cnn), '--output', str(tmp_path / 'd.json')])
    content = json.loads((tmp_path / 'd.json').read_text())
    assert 'not LPIPS' in content['metric'] and 'not LPIPS' in capsys.readouterr().out
    result = content['folders'][str(folder)]
    assert result['classes']['same'] == pytest.approx(0, abs=1e-6) and result['classes']['apart'] > 0


def test_an_image_that_can_not_be_read_is_named_once(folder, caplog):
    """The distance is that of the other pairs."""
    def measure():
        return measure_diversity(str(folder), lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)), img_size=24, batch_size=2)

    expected = measure()
    (folder / 'apart' / 'broken.png').write_bytes(b'nothing')
    result = measure()
    assert result['classes'] == expected['classes'] and result['pairs'] == expected['pairs']
    assert caplog.text.count("broken.png' cannot be read") == 1


def test_lpips(folder, capsys, monkeypatch):
    """LPIPS itself with random backbone weights, which need no download; without weights, an error of one line."""
    lpips = pytest.importorskip('lpips')
    original = lpips.LPIPS
    monkeypatch.setattr(lpips, 'LPIPS', lambda **kwargs: original(**kwargs, pnet_rand=True))
    main(['diversity', str(folder), '--img-size', '64'])
    assert 'LPIPS (alex)' in capsys.readouterr().out

    def refuse(**kwargs):
        raise OSError('no route to host')

    monkeypatch.setattr(lpips, 'LPIPS', refuse)
    with pytest.raises(SystemExit) as e:
        run_command('analysis', main, ['diversity', str(folder)])
    err = capsys.readouterr().err
    assert e.value.code == 2 and 'no route to host' in err and '--model NAME' in err


ERRORS = {
    'folder': (['missing'], 'No folder'),
    'empty': (['EMPTY'], 'no class with two'),
    'no classes': (['SHARDS'], 'itself. Expected a folder for each class. Shards are not read'),
    'broken': (['BROKEN'], 'None of the images'),
    'pairs': (['FOLDER', '--pairs-per-class', '0'], 'expected 1 or more'),
    'lists': (['FOLDER', '--model', 'hrnet_w18_small', '--checkpoint', 'HRNET'], 'not feature maps'),
    'channels': (['FOLDER', '--model', 'test_resnet', '--checkpoint', 'TWO'], 'takes 2 channels, expected 1 or 3'),
    'no maps': (['FOLDER', '--model', 'test_vit', '--checkpoint', 'VIT'], 'not feature maps'),
    'device': (['FOLDER', '--device', 'cuda:77'], 'is not available here'),
    'model': (['FOLDER', '--model', 'resnet26x'], 'nearest timm names'),
    'network': (['FOLDER', '--lpips-net', 'vgg'], '--lpips-net is for LPIPS, and --model measures with a CNN'),
    'weights of nothing': (['FOLDER', '--model', '', '--checkpoint', 'TWO'], 'Add its name, --model NAME'),
}


@pytest.mark.parametrize('case', ERRORS)
def test_errors_are_one_line_and_status_2(case, folder, cnn, tmp_path, capsys):
    args, message = ERRORS[case]
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'bad' / 'a').mkdir(parents=True)
    for name in ('broken.png', 'other.png'):
        (tmp_path / 'bad' / 'a' / name).write_bytes(b'nothing')
    (tmp_path / 'shards').mkdir()
    for name in ('samples.png', 'losses.png', '_info.json'):
        (tmp_path / 'shards' / name).write_bytes(b'')
    torch.save(timm.create_model('test_vit', num_classes=3).state_dict(), tmp_path / 'vit.pth')
    torch.save(timm.create_model('test_resnet', num_classes=3, in_chans=2).state_dict(), tmp_path / 'two.pth')
    if 'HRNET' in args:
        torch.save(timm.create_model('hrnet_w18_small', num_classes=3).state_dict(), tmp_path / 'hrnet.pth')
    replaced = {'TWO': tmp_path / 'two.pth', 'HRNET': tmp_path / 'hrnet.pth',
                'VIT': tmp_path / 'vit.pth', 'EMPTY': tmp_path / 'empty', 'SHARDS': tmp_path / 'shards',
                'BROKEN': tmp_path / 'bad', 'FOLDER': folder}
    args = ['diversity', *(str(replaced.get(a, a)) for a in args)]
    with pytest.raises(SystemExit) as e:
        run_command('analysis', main, args if '--model' in args else [*args, '--model', str(cnn)])
    assert e.value.code == 2 and message in capsys.readouterr().err.strip().splitlines()[-1]
