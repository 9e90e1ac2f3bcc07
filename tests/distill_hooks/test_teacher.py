import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from distill_hooks import Teacher, load_model, resolve_layer
from distill_hooks.teacher import load_class_map


@pytest.mark.parametrize('name,stride8,first', [
    ('regnety_002', 's2', 's1'),
    ('resnet18', 'layer2', 'layer1'),
    ('resnetv2_50', 'stages.1', 'stages.0'),
    ('convnext_atto', 'stages.1', 'stages.0'),
    ('efficientnet_lite0', 'blocks.2', 'blocks.0'),
    ('nf_resnet26', 'stages.1', 'stages.0'),  # no BatchNorm
    ('dpn68', 'features.conv3_4', 'features.conv2_3'),
    ('densenet121', 'features.denseblock2', 'features.denseblock1'),
    ('swin_tiny_patch4_window7_224', 'layers.1', 'layers.0'),  # no CNN, but maps
])
def test_default_stage(name, stride8, first):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert resolve_layer(model, max_stride=8) == stride8
    assert resolve_layer(model, '1') == first == resolve_layer(model, max_stride=1)
    assert resolve_layer(model, first) == first
    with pytest.raises(ValueError, match=r'no stage 9. Its stages: 1 \('):
        resolve_layer(model, '9')


def test_layers_of_a_model_that_lists_no_stages():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
    assert resolve_layer(torch.nn.Sequential(model), '0.1') == '0.1'
    with pytest.raises(ValueError, match='Name a module instead.*children: 0, 1'):
        resolve_layer(model)


@pytest.mark.parametrize('name', [
    'test_resnet', 'test_convnext', 'test_efficientnet', 'regnety_002', 'nf_resnet26', 'test_byobnet'])
def test_logits_and_features_are_the_models_own(name):
    """One forward gives what two forwards of timm's give, from the student's input, in the teacher's normalisation."""
    model = timm.create_model(name, num_classes=7).eval()
    layer = resolve_layer(model, max_stride=8)
    student = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.5))
    teacher = Teacher(model, [layer], **student)
    pixels = torch.rand(2, 3, 64, 64)

    def normalize(mean, std):
        return (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)

    logits, (feature,) = teacher(normalize(**student))
    x = normalize(model.pretrained_cfg['mean'], model.pretrained_cfg['std'])
    torch.testing.assert_close(logits, model(x), atol=1e-4, rtol=1e-4)
    index = [info['module'] for info in model.feature_info].index(layer)
    shape = timm.create_model(name, features_only=True, out_indices=(index,)).eval()(x)[0].shape
    assert feature.shape == shape
    spec, = teacher.probe((3, 64, 64))
    assert spec.num_chs == feature.shape[1] and spec.size == feature.shape[-2:]
    assert spec.non_negative == bool((feature >= 0).all())


def test_same_normalisation_leaves_the_input_alone():
    model = timm.create_model('test_resnet')
    x = torch.randn(1, 3, 32, 32)
    assert Teacher(model, mean=model.pretrained_cfg['mean'], std=model.pretrained_cfg['std']).prepare_input(x) is x
    assert Teacher(model).prepare_input(x) is x


def test_grey_students():
    """Grey input is renormalised for a colour teacher as its three equal channels are, and for a grey one as it is."""
    colour = timm.create_model('test_resnet').eval()
    pixels = torch.rand(2, 1, 32, 32)
    teacher = Teacher(colour, in_chans=1, mean=(0.5,), std=(0.25,))
    mean, std = (torch.tensor(colour.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ('mean', 'std'))
    torch.testing.assert_close(teacher.prepare_input((pixels - 0.5) / 0.25), (pixels - mean) / std)
    grey = Teacher(timm.create_model('test_resnet', in_chans=1), in_chans=1, mean=(0.5,), std=(0.25,))
    torch.testing.assert_close(grey.prepare_input((pixels - 0.5) / 0.25), (pixels - mean.mean()) / std.mean())
    same = Teacher(colour, in_chans=1, mean=None, std=None)
    assert same.prepare_input(pixels).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match='--in-chans 1'):
        Teacher(timm.create_model('test_resnet', in_chans=1), in_chans=3)


def test_another_image_size():
    model = timm.create_model('test_resnet').eval()
    teacher = Teacher(model, ['layer1'], img_size=64)
    x = torch.randn(1, 3, 32, 32)
    logits, (feature,) = teacher(x)
    torch.testing.assert_close(logits, model(F.interpolate(x, (64, 64), mode='bilinear', antialias=True)))
    assert feature.shape[-2:] == (16, 16)
    half = Teacher(model, img_size=(32, 48)).prepare_input(x.bfloat16())  # which CPUs can not resize
    assert half.shape == (1, 3, 32, 48) and half.dtype == torch.bfloat16
    expected = F.interpolate(x, (32, 48), mode='bilinear', antialias=True)
    torch.testing.assert_close(half.float(), expected, atol=0.02, rtol=0.02)


def test_swin_maps_are_channels_first():
    model = timm.create_model('swin_tiny_patch4_window7_224', img_size=64, embed_dim=24, num_heads=(1, 2, 4, 8)).eval()
    spec, = Teacher(model, ['layers.1']).probe((3, 64, 64))
    assert spec.num_chs == 48 and spec.size == (8, 8)


def test_maps_with_channels_last_that_nobody_said():
    model = timm.create_model('volo_d1_224', img_size=64, num_classes=3)
    with pytest.raises(ValueError, match='has its channels last, but the model does not declare it'):
        Teacher(model, ['network.0']).probe((3, 64, 64))


def test_layers_without_a_map():
    model = timm.create_model('test_vit', img_size=32)
    with pytest.raises(ValueError, match=r'\(1, 5, 64\), not a 4-D feature map.*--dearkd-beta 0'):
        Teacher(model, ['blocks.0']).probe((3, 32, 32))


def test_frozen_and_in_eval_mode():
    model = timm.create_model('test_resnet')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    teacher = Teacher(model, ['layer1'])
    teacher.train()
    x = torch.randn(4, 3, 32, 32, requires_grad=True)
    logits, features = teacher(x)
    assert not logits.requires_grad and not features[0].requires_grad
    assert not any(m.training for m in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def test_class_map():
    model = timm.create_model('test_resnet', num_classes=7).eval()
    x, class_map = torch.randn(3, 3, 32, 32), [6, 0, 0, 3]
    teacher = Teacher(model, class_map=class_map)
    expected = [[row[i] for i in class_map] for row in model(x).tolist()]
    torch.testing.assert_close(teacher(x)[0], torch.tensor(expected))
    assert teacher.num_classes == 4 and not [key for key in teacher.state_dict() if 'class_map' in key]
    assert teacher.half().class_map.dtype == torch.int64
    for wrong, message in (([0, 7], 'names teacher class 7.*0 to 6.*--kd-class-map'), ([-1], 'teacher class -1')):
        with pytest.raises(ValueError, match=message):
            Teacher(model, class_map=wrong)
    with pytest.raises(ValueError, match='teacher class -2'):
        Teacher(torch.nn.Flatten(), class_map=[1000, -2])  # does not say how many classes it knows


def test_class_map_file(tmp_path):
    path = tmp_path / 'classes.txt'
    path.write_bytes(b'\xef\xbb\xbf# Imagenette\r\n0 tench\r\n\r\n  217\tEnglish springer\r\n # and\r\n0')
    assert load_class_map(str(path)) == [0, 217, 0]
    for text, message in (
            ('0\ntench 0\n', "Line 2 of class map .* begins with 'tench'"), ('0\n\n-1', "Line 3 .*'-1'"),
            ('1.0', "Line 1 .*'1.0'"), ('# nothing\n\n', 'is empty')):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_class_map(str(path))
    with pytest.raises(FileNotFoundError, match='Class map .*nothing.txt. does not exist'):
        load_class_map(str(tmp_path / 'nothing.txt'))


def test_teachers_that_cannot_be_had(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing.pth'):
        load_model('test_resnet', 'nothing.pth')
    path = tmp_path / 'broken.pth'
    path.write_bytes(b'PK\x03\x04 not a checkpoint')
    with pytest.raises(ValueError, match='cannot be read'):
        load_model('test_resnet', str(path))
    model = timm.create_model('test_convnext')
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match="does not fit architecture 'test_resnet'"):
        load_model('test_resnet', str(path))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r'cannot be read \(.*truncated'):
        load_model('test_resnet', str(path))
    with pytest.raises(ValueError, match='is a folder. Name a file in it'):
        load_model('test_resnet', str(tmp_path))
    for contents, message in (
            (model, r'cannot be read.*\(timm.*torch.save\(model.state_dict\(\), PATH\)'),
            ({'epoch': 3, 'args': {}}, 'holds no state dict'),
            ({'net': model.state_dict(), 'net_ema': model.state_dict()}, "holds 'net' and 'net_ema'")):
        torch.save(contents, path)
        with pytest.raises(ValueError, match=message) as error:
            load_model('test_resnet', str(path))
        assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match="Unknown model 'regnety_161'.*regnety_160"):
        load_model('regnety_161')
    with pytest.raises(ValueError, match='Name a trained checkpoint of it'):
        load_model('mnasnet_050')  # has no weights to download


def test_stored_weights_give_what_autocast_gives():
    model = timm.create_model('test_resnet', num_classes=3).eval()
    plain, stored = Teacher(copy.deepcopy(model), ['layer2']), Teacher(copy.deepcopy(model), ['layer2'])
    stored.store_weights(torch.bfloat16)
    assert stored.model.conv1[0].weight.dtype == torch.bfloat16 and stored.model.bn1.weight.dtype == torch.float32
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast('cpu', torch.bfloat16):
        for a, b in zip(plain(x)[1], stored(x)[1]):
            assert a.equal(b)
        assert plain(x)[0].equal(stored(x)[0])


def test_fingerprints_tell_teachers_apart():
    def make(seed, **kwargs):
        torch.manual_seed(seed)
        return Teacher(timm.create_model('test_resnet', num_classes=3), **kwargs).fingerprint()

    prints = [make(0), make(1), make(0, layers=['layer2']), make(0, class_map=[0, 1])]
    assert len(set(prints)) == 4 and make(0) == prints[0]
