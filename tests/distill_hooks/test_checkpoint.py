"""Teachers of all kinds of files."""
import argparse
import logging
import re

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from timm.models import save_for_hf

from distill_hooks import Teacher, load_model

PREFIXES = ['model.', 'module.', 'model._orig_mod.', 'student.backbone.', 'module.model.module.']


def lively(model, x):
    """Fill in weights and BatchNorm statistics such that the logits depend on the images and on every tensor."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1 or key == 'layer_scale':
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    with torch.no_grad():
        model.train()(x)
        logits = model.eval()(x)
    assert (logits[0] - logits[1]).abs().max() > 0.05
    return logits


@pytest.mark.parametrize('kind', ['safetensors', 'state_dict', 'checkpoint', 'ema', 'net', 'model_state_dict'])
def test_checkpoints_bring_their_class_and_channel_count(tmp_path, caplog, kind):
    model = timm.create_model('test_resnet', num_classes=5, in_chans=1)
    weights, path = model.state_dict(), str(tmp_path / f'teacher.{kind}')
    if kind == 'safetensors':
        safetensors.torch.save_file(weights, path)
    else:
        other = {k: v + 1 for k, v in weights.items()}
        contents = {
            'state_dict': weights,
            'checkpoint': {'state_dict': weights, 'epoch': 3, 'args': argparse.Namespace(lr=1.)},
            'ema': {'state_dict': other, 'state_dict_ema': weights},
            'net': {'net': {f'module.{k}': v for k, v in weights.items()}, 'acc': 93.5},
            'model_state_dict': {
                'epoch': 3, 'model_state_dict': weights, 'optimizer_state_dict': torch.optim.SGD(
                    model.parameters(), lr=1., momentum=0.9).state_dict(), 'scaler': {'scale': 65536., '_growth': 0}},
        }
        torch.save(contents[kind], path)
    with caplog.at_level(logging.INFO):
        teacher = load_model('test_resnet', path)
    assert 'loaded by order' not in caplog.text
    assert teacher.num_classes == 5 and teacher.in_chans == 1
    assert all(v.equal(weights[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize('name,theirs,by_order', [
    ('resnet18', 'resnet18', False),
    ('densenet121', 'densenet121', False),
    ('efficientnet_b0', 'efficientnet_b0', True),
    ('mobilenetv2_100', 'mobilenet_v2', True),
    ('mnasnet_100', 'mnasnet1_0', True),
    ('convnext_tiny', 'convnext_tiny', True),
])
def test_torchvision_weights_give_torchvision_logits(tmp_path, caplog, name, theirs, by_order):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = getattr(torchvision.models, theirs)(num_classes=5)
    logits, path = lively(model, x), str(tmp_path / 'torchvision.pth')
    torch.save(model.state_dict(), path)
    with caplog.at_level(logging.INFO):
        teacher = load_model(name, path).eval()
    assert ('loaded by order' in caplog.text) == by_order
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), logits, atol=1e-5, rtol=1e-5)


def test_loading_by_order(tmp_path):
    """Class and channel count come from the shapes; what names or file order contradict is refused."""
    model = timm.create_model('test_resnet', num_classes=5, in_chans=1)
    weights, path = model.state_dict(), str(tmp_path / 'foreign.pth')

    def foreign(tensors):
        return {f'n{i}.{k.rpartition(".")[2]}': v for i, (k, v) in enumerate(tensors.items())}

    torch.save({k: v for k, v in foreign(weights).items() if 'num_batches' not in k}, path)  # as before PyTorch 0.4.1
    teacher = load_model('test_resnet', path)
    assert teacher.num_classes == 5 and teacher.in_chans == 1
    assert all(v.equal(weights[k]) for k, v in teacher.state_dict().items())

    stem, *_ = keys = list(weights)
    i, j = keys.index('bn1.weight'), keys.index('bn1.bias')
    keys[i], keys[j] = keys[j], keys[i]
    # one name of timm's is missing, two stand in each other's place
    moved = {'fc.bias': 'b', 'layer1.0.bn1.bias': 'layer1.0.bn2.bias', 'layer1.0.bn2.bias': 'layer1.0.bn1.bias'}
    for tensors, message in (
            (foreign({k: weights[k] for k in keys}), r'bias \(32,\) is in place of bn1.weight \(32,\)'),
            (foreign({**weights, stem: weights[stem][..., :1]}), rf'n0.weight .*, 1\) is in place of {stem} .*, 3\)'),
            (foreign({k: weights[k] for k in keys[2:]}), 'has [0-9]+ tensors, the model [0-9]+. Give the arch'),
            ({moved.get(k, k): v for k, v in weights.items()}, 'layer1.0.bn2.bias .* is in place of layer1.0.bn1.b')):
        torch.save(tensors, path)
        with pytest.raises(ValueError, match=message):
            load_model('test_resnet', path)
    path = str(tmp_path / 'foreign.safetensors')
    safetensors.torch.save_file(foreign(weights), path)
    with pytest.raises(ValueError, match=r'77 of its 77 tensors missing \(conv1.0.w.*, …\), 77 unknown.*…\). Give'):
        load_model('test_resnet', path)


class Settings(dict):
    """What Lightning may keep of a module's arguments."""


@pytest.mark.parametrize('kind', ['safetensors', 'ckpt'])
@pytest.mark.parametrize('prefix', PREFIXES)
def test_weights_of_a_wrapped_model(tmp_path, caplog, prefix, kind):
    """As Lightning writes them, with tensors of a loss and an average of weights beside them."""
    model = timm.create_model('test_resnet', num_classes=5, in_chans=1)
    weights, path = model.state_dict(), str(tmp_path / f'wrapped.{kind}')
    tensors = {
        'criterion.weight': torch.ones(7, 7), 'loss_fn.net.weight': torch.ones(4, 2, 1, 1),
        **{prefix + key: value for key, value in weights.items()},
        **{f'ema.{key}': value + 1 for key, value in weights.items()}, 'zeta.pos_weight': torch.ones(9, 9)}
    if kind == 'safetensors':
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save({
            'state_dict': tensors, 'hyper_parameters': {'lr': 0.1, 'name': 'x'}, 'epoch': 3, 'callbacks': {},
            'pytorch-lightning_version': '2.5.0', 'optimizer_states': []}, path)
    with caplog.at_level(logging.INFO):
        teacher = load_model('test_resnet', path)
    assert teacher.num_classes == 5 and teacher.in_chans == 1
    assert all(v.equal(weights[k]) for k, v in teacher.state_dict().items())
    assert re.search(r'80 tensors that test_resnet does not have were skipped: \w+.*, …\.', caplog.text)
    inner = prefix if prefix != 'module.' else ''  # timm drops that one
    assert not inner or f'under the prefix {inner.removeprefix("module.")!r}' in caplog.text


@pytest.mark.parametrize('prefix', ['', 'model.'])
def test_a_linear_classifier_behind_a_dropout(tmp_path, caplog, prefix):
    """The logits are those of the model that was saved. A classifier of two layers is refused."""
    x, path = torch.randn(2, 3, 64, 64), str(tmp_path / 'own.pth')
    model = timm.create_model('test_resnet', num_classes=5)
    model.fc = torch.nn.Sequential(torch.nn.Dropout(), model.fc)
    logits = lively(model, x)
    torch.save({f'{prefix}{key}': value for key, value in model.state_dict().items()}, path)
    with torch.no_grad(), caplog.at_level(logging.INFO):
        torch.testing.assert_close(load_model('test_resnet', path).eval()(x), logits)
    assert f"The classifier '{prefix}fc.1' of the checkpoint is loaded as '{prefix}fc'." in caplog.text
    weights = {f'{under}.{key}': value for under in ('a', 'b') for key, value in model.state_dict().items()}
    torch.save(weights, path)
    with pytest.raises(ValueError, match='holds the model 2 times, under a., b.'):
        load_model('test_resnet', path)
    model.fc = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
    torch.save({f'{prefix}{key}': value for key, value in model.state_dict().items()}, path)
    with pytest.raises(ValueError, match="Only its classifier differs: test_resnet has one linear layer, 'fc'."):
        load_model('test_resnet', path)


@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning', 'ignore:.torch.load. received a zip')
def test_files_that_hold_no_state_dict(tmp_path):
    path = str(tmp_path / 'file.pt')
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match=r'is a TorchScript archive.*torch.jit.load\(FILE\).state_dict\(\)'):
        load_model('test_resnet', path)
    for contents, kind in (([torch.zeros(1)], 'list'), (torch.zeros(1), 'Tensor')):
        torch.save(contents, path)
        with pytest.raises(ValueError, match=f'holds an object of type {kind}, expected a state dict'):
            load_model('test_resnet', path)


def test_wrapped_models_that_do_not_fit(tmp_path):
    model = timm.create_model('test_resnet', num_classes=5)
    weights, path = model.state_dict(), str(tmp_path / 'wrapped.ckpt')
    under = {key: {f'{key}.{name}': value for name, value in weights.items()} for key in ('model', 'teacher', 'ema')}
    headless = {key: value for key, value in under['model'].items() if '.fc.' not in key}
    deeper = {f'model.layer4.9.{name}': torch.ones(3) for name in ('a', 'b', 'c', 'd')}
    for contents, message in (
            ({**headless, 'classifier.weight': torch.ones(5, 64)},
             r'2 of its 77 tensors missing \(fc.weight, fc.bias\), 1 unknown \(classifier.weight\); by order'),
            ({**under['model'], **deeper}, r'test_resnet.: 4 unknown \(layer4.9.a, layer4.9.b, layer4.9.c, …\)'),
            ({**under['model'], **under['teacher']}, 'holds the model 2 times, under model., teacher.. Write only'),
            ({'state_dict': under['model'], 'hyper_parameters': Settings(lr=0.1)},
             r'holds Python objects besides its tensors \(.*Settings\).*torch.save\(torch.load\(FILE')):
        torch.save(contents, path)
        with pytest.raises(ValueError, match=message) as error:
            load_model('test_resnet', path)
        assert '\n' not in str(error.value)
    torch.save(under['ema'], path)
    assert all(v.equal(weights[k]) for k, v in load_model('test_resnet', path).state_dict().items())


def test_wrapped_torchvision_weights(tmp_path, caplog):
    """Names that timm has, and names that it has not, under a prefix."""
    x, path = torch.randn(2, 3, 64, 64), str(tmp_path / 'wrapped.ckpt')
    for name, theirs in (('resnet18', 'resnet18'), ('mobilenetv2_100', 'mobilenet_v2')):
        model = getattr(torchvision.models, theirs)(num_classes=5).eval()
        torch.save({'state_dict': {f'model.{key}': value for key, value in model.state_dict().items()}}, path)
        with torch.no_grad():
            torch.testing.assert_close(load_model(name, path).eval()(x), model(x), atol=1e-5, rtol=1e-5)


def test_folder_of_a_run(tmp_path):
    model, other = (timm.create_model('test_resnet', num_classes=5, in_chans=1) for _ in range(2))
    folder, path = tmp_path / 'run', str(tmp_path / 'run' / 'last.pth.tar')
    save_for_hf(model, str(folder), safe_serialization=True)
    torch.save({'state_dict': other.state_dict(), 'epoch': 3}, path)
    for name in (str(folder), f'local-dir:{folder}'):
        for teacher, expected in ((load_model(name), model), (load_model(name, path), other)):
            assert all(v.equal(expected.state_dict()[k]) for k, v in teacher.state_dict().items())
    weights = folder / 'model.safetensors'
    with pytest.raises(ValueError, match=f'does not name its architecture. Give its folder, {folder}.$'):
        load_model(str(weights))
    for name in (str(tmp_path), f'local-dir:{tmp_path}'):
        with pytest.raises(ValueError, match=f'is not a run folder. Give one of the run folders in it: {folder}.$'):
            load_model(name)
    (folder / 'config.json').unlink()
    with pytest.raises(ValueError, match='config.json'):
        load_model(str(folder))
    with pytest.raises(ValueError, match='the file with the flag of that model: --checkpoint, --kd-teacher'):
        load_model(str(weights))


@pytest.mark.parametrize('name,kwargs,options', [
    ('test_efficientnet', dict(bn_eps=0.1), dict(bn_eps=0.1, img_size=32, model_kwargs={})),
    ('test_vit', dict(img_size=32, qkv_bias=False), dict(img_size=32, model_kwargs=dict(qkv_bias=False))),
    ('test_vit', dict(img_size=(32, 48)), dict(input_size=[1, 32, 48])),
])
def test_a_training_checkpoint_brings_its_arguments_and_its_normalisation(
        tmp_path, monkeypatch, name, kwargs, options):
    """The file alone gives the logits of the model that it was written from, on images normalised as it was."""
    model = timm.create_model(name, num_classes=5, in_chans=1, **kwargs).eval()
    monkeypatch.chdir(tmp_path)
    path = f'{name}.pth.tar'  # timm takes what follows the dot for a tag
    args = argparse.Namespace(
        **dict(model=name, mean=[0.1], std=[0.9], crop_pct=0.7, interpolation='', gp=None), **options)
    torch.save({'arch': name, 'args': args, 'state_dict': model.state_dict()}, path)
    images = torch.rand(2, 1, 32, 48 if 'input_size' in options else 32)
    for given in ((path, None), (name, path)):
        teacher = load_model(*given)
        config = timm.data.resolve_model_data_config(teacher)
        assert config['input_size'] == tuple(images.shape[1:]) and config['crop_pct'] == 0.7
        logits, _ = Teacher(teacher, in_chans=1, mean=[0.4], std=[0.3])((images - 0.4) / 0.3)
        torch.testing.assert_close(logits, model((images - 0.1) / 0.9), atol=1e-5, rtol=1e-4)
    if name == 'test_efficientnet':  # options of a script of others mean what they mean there
        args = argparse.Namespace(mean='0.5,0.5', img_size='224')
        torch.save({'arch': name, 'args': args, 'state_dict': model.state_dict()}, path)
        assert load_model(path).num_classes == 5
    else:  # a file that says nothing of it
        torch.save(timm.create_model(name, img_size=32).state_dict(), path)
        with pytest.raises(ValueError, match='another image size, give its run folder'):
            load_model(name, path)
