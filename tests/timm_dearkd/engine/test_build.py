import copy

import datasets
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from timm.task import ClassificationTask

from distill_hooks import load_model
from timm_dearkd.engine.build import build_evaluation, build_optimizer
from timm_dearkd.engine.device import SINGLE
from timm_dearkd.train import _parse_args


def build(name, device='cpu', flags=(), **options):
    """The optimizer of a small model on the CPU, for a run on `device`."""
    args = _parse_args(['DIR', '--opt', name, '--lr', '0.1', *flags])[0]
    args.opt_kwargs = options
    torch.manual_seed(0)
    return build_optimizer(args, ClassificationTask(torch.nn.Linear(3, 2)), torch.device(device), SINGLE)


def weights(optimizer):
    return [p for group in optimizer.param_groups for p in group['params']]


def step(optimizer, count):
    for i in range(count):
        for p in weights(optimizer):
            p.grad = torch.full_like(p, (-2.) ** i)
        optimizer.step()


@pytest.mark.parametrize('name', ['lookahead_adamw', 'lookahead_sgd', 'lookahead_lamb', 'adamw'])
def test_an_optimizer_goes_on_from_its_state(name):
    """Over Lookahead's steps of every sixth update, and with its own kind of step, not the checkpoint's."""
    before, after = build(name, **({} if 'lamb' in name else dict(fused=True))), build(name)
    step(before, 8)
    with torch.no_grad():
        for p, q in zip(weights(after), weights(before)):
            p.copy_(q)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert all(group.get('fused') is None for group in after.param_groups)
    step(before, 5)
    step(after, 5)
    for p, q in zip(weights(after), weights(before)):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize('name,fused', [
    ('adam', True), ('adamw', True), ('sgd', True), ('momentum', True), ('adagrad', None), ('lamb', None),
    ('lookahead_adamw', None)])
def test_the_fused_step_is_taken_where_every_pytorch_has_it(name, fused):
    assert build(name, 'cuda').defaults.get('fused') is fused
    assert build(name).defaults.get('fused') is None


@pytest.mark.parametrize('flags,fused', [
    (['--amp'], None), (['--amp', '--momentum', '0'], True), (['--amp', '--amp-dtype', 'bfloat16'], True)])
def test_a_loss_scale_does_not_meet_fused_momentum(flags, fused):
    """PyTorch leaves the momentum uninitialised where the first step overflows."""
    assert build('momentum', 'cuda', flags).defaults.get('fused') is fused


@pytest.fixture
def turned(cnn, tmp_path):
    """A checkpoint of the CNN with its classes, and the rows of its head, in another order."""
    checkpoint = torch.load(cnn / 'model_best.pth.tar', weights_only=False)
    indices, order = checkpoint['classes']['indices'], [2, 0, 1]
    assert indices == {'blue sky': 0, 'grass': 1, 'rust': 2}
    checkpoint['classes']['indices'] = {name: order.index(index) for name, index in indices.items()}
    for name in ('fc.weight', 'fc.bias'):
        checkpoint['state_dict'][name] = checkpoint['state_dict'][name][order]
    torch.save(checkpoint, tmp_path / 'turned.pth.tar')
    return tmp_path / 'turned.pth.tar'


def evaluation(folder, *flags):
    """The labels of the validation images by file name, and the logits of the model for noise."""
    args = _parse_args([str(folder), '--eval-only', '--img-size', '32', *map(str, flags)])[0]
    model, _, eval_set = build_evaluation(args, torch.device('cpu'), timm.create_model)
    torch.manual_seed(0)
    labels = {eval_set.filename(i): eval_set.reader[i][1] for i in range(len(eval_set))}
    return labels, model.eval()(torch.randn(2, 3, 32, 32))


def test_weights_are_evaluated_with_the_classes_of_their_checkpoint(cnn, turned, image_folder, tmp_path):
    """Whichever order the folders have, and only if they are the same classes."""
    flags = '--model', 'test_resnet', '--initial-checkpoint'
    labels, logits = evaluation(image_folder, *flags, cnn / 'model_best.pth.tar')
    turned_labels, turned_logits = evaluation(image_folder, *flags, turned)
    assert turned_logits[:, [1, 2, 0]].equal(logits) and set(labels.values()) == {0, 1, 2}
    assert turned_labels == {name: [1, 2, 0][label] for name, label in labels.items()}
    for split in ('train', 'validation'):
        for name in ('azure', 'grass', 'rust'):
            (tmp_path / 'data' / split / name).mkdir(parents=True)
            Image.new('RGB', (32, 32)).save(tmp_path / 'data' / split / name / '0.png')
    with pytest.raises(ValueError, match='classes that the model does not know: azure'):
        evaluation(tmp_path / 'data', *flags, cnn / 'model_best.pth.tar')


def test_a_checkpoint_tells_the_names_of_its_classes(cnn, turned):
    """So that a teacher is matched by name, and predictions are named."""
    names = {path: load_model('test_resnet', str(path)).pretrained_cfg['label_names'] for path in (
        turned, cnn / 'last.pth.tar')}
    assert list(names.values()) == [['rust', 'blue sky', 'grass'], ['blue sky', 'grass', 'rust']]


def test_numbered_labels_are_matched_to_the_class_names_of_the_model(tmp_path):
    """Those that a validation set of Hugging Face has, which may be fewer than the model knows."""
    save_for_hf(
        timm.create_model('test_resnet', num_classes=2), tmp_path / 'model', safe_serialization=True,
        model_config=dict(label_names=['1', '3']))
    (tmp_path / 'data').mkdir()
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('int64')})
    for split, labels in (('train', [3, 1]), ('validation', [3, 3])):
        rows = {'image': [Image.new('L', (8, 8))] * 2, 'label': labels}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / 'data' / f'{split}-0.parquet')
    args = _parse_args([
        str(tmp_path / 'cache'), '--dataset', f'hfds/{tmp_path / "data"}', '--eval-only', '--model',
        str(tmp_path / 'model')])[0]
    _, _, eval_set = build_evaluation(args, torch.device('cpu'), timm.create_model)
    assert [label for _, label in eval_set] == [1, 1]
