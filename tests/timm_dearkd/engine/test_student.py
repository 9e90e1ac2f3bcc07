import json

import datasets
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from distill_hooks import load_model
from timm_dearkd.engine.options import resolve_args
from timm_dearkd.engine.student import build_evaluation, check_img_size, create_student
from timm_dearkd.train import _parse_args


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
    args = resolve_args(_parse_args([str(folder), '--eval-only', '--img-size', '32', *map(str, flags)])[0])
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


def test_the_checkpoint_of_a_run_is_evaluated_without_its_architecture(cnn, image_folder):
    labels, logits = evaluation(image_folder, '--model', cnn / 'model_best.pth.tar')
    expected = evaluation(
        image_folder, '--model', 'test_resnet', '--initial-checkpoint', cnn / 'model_best.pth.tar')
    assert labels == expected[0] and logits.equal(expected[1])


@pytest.mark.parametrize('flag', ['--initial-checkpoint', '--pretrained-path'])
def test_weights_with_python_objects_are_refused(flag, image_folder, tmp_path):
    torch.save(timm.create_model('test_resnet', num_classes=3), tmp_path / 'whole.pth')
    with pytest.raises(ValueError, match=r'cannot be read safely.*torch.save\(model.state_dict\(\), PATH\)'):
        evaluation(image_folder, '--model', 'test_resnet', '--num-classes', 3, flag, tmp_path / 'whole.pth')


@pytest.mark.parametrize('num_classes, names, labels, told', [
    (10, ('a', 'b', 'c'), {0, 1, 2}, True),
    (3, ('a', 'b', 'c'), {0, 1, 2}, False),
    (1000, ('n01440764', 'n01443537', 'n03888257'), {0, 1, 701}, False),  # lines 1, 2 and 702 of timm's list
    (1000, ('n01440764', 'n01443537', 'c'), {0, 1, 2}, True)])
def test_classes_of_a_model_without_names(num_classes, names, labels, told, tmp_path, caplog):
    """They are found if the folders are ImageNet's synsets; else a smaller number of folders is a warning."""
    for name in names:
        (tmp_path / 'data' / 'validation' / name).mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(tmp_path / 'data' / 'validation' / name / f'{name}.png')
    torch.save(timm.create_model('test_resnet', num_classes=num_classes).state_dict(), tmp_path / 'cnn.pth')
    found, _ = evaluation(
        tmp_path / 'data', '--model', 'test_resnet', '--num-classes', num_classes, '--pretrained-path',
        tmp_path / 'cnn.pth')
    assert set(found.values()) == labels
    assert ('If they are of others, give --class-map' in caplog.text) == told


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
    args = resolve_args(_parse_args([
        str(tmp_path / 'cache'), '--dataset', f'hfds/{tmp_path / "data"}', '--eval-only', '--model',
        str(tmp_path / 'model')])[0])
    _, _, eval_set = build_evaluation(args, torch.device('cpu'), timm.create_model)
    assert [label for _, label in eval_set] == [1, 1]


def test_shards_are_evaluated_with_the_class_map_of_their_training(cnn, tmp_path):
    """They do not know the names of their labels. The checkpoint knows the map that it was trained with."""
    webdataset = pytest.importorskip('webdataset')
    with webdataset.TarWriter(str(tmp_path / 'images.tar')) as shard:
        for i, label in enumerate((2, 0, 1)):
            shard.write({'__key__': str(i), 'png': Image.new('RGB', (32, 32)), 'cls': label})
    split = dict(name='validation', filenames=['images.tar'], shard_lengths=[3], num_samples=3)
    (tmp_path / '_info.json').write_text(json.dumps(dict(splits=dict(validation=split))))
    checkpoint = torch.load(cnn / 'model_best.pth.tar', weights_only=False)
    checkpoint['classes']['indices'] = {0: 1, 1: 2, 2: 0}
    torch.save(checkpoint, tmp_path / 'mapped.pth.tar')
    args = resolve_args(_parse_args([
        str(tmp_path), '--dataset', 'wds/', '--eval-only', '--img-size', '32', '--model', 'test_resnet',
        '--initial-checkpoint', str(tmp_path / 'mapped.pth.tar')])[0])
    _, _, eval_set = build_evaluation(args, torch.device('cpu'), timm.create_model)
    assert [label for _, label in eval_set] == [0, 1, 2]


def test_patches_that_overlap_take_any_size(caplog):
    """No pixel of PVT v2 is ignored, though its patches have a size of 7."""
    model = timm.create_model('pvt_v2_b0', num_classes=2, pretrained_cfg_overlay=dict(input_size=(3, 50, 50))).eval()
    check_img_size(model, [50, 66])
    assert not caplog.messages
    images = torch.randn(1, 3, 50, 50)
    changed = images.clone()
    changed[..., 49, :] = 9.  # the last row of 7 patches of 7
    with torch.no_grad():
        assert not model(images).allclose(model(changed)) and model(torch.randn(1, 3, 66, 66)).isfinite().all()
    with pytest.raises(ValueError, match='takes images of one size. Add --model-kwargs dynamic_img_size'):
        check_img_size(timm.create_model('test_vit', dynamic_img_size=False), [32, 48])


def test_images_that_are_smaller_than_a_patch_are_refused():
    args = _parse_args(['DIR', '--model', 'dearkd_nano_patch4_32', '--img-size', '3'])[0]
    with pytest.raises(ValueError, match=r'smaller than a patch, \(4, 4\). Set --img-size'):
        create_student(args, 2, timm.create_model)


def test_sizes_that_are_no_multiple_of_the_patch(caplog):
    """Are refused where the model would find out when training, not where it pads them, and said where it crops."""
    kwargs = dict(img_size=32, patch_size=8, dynamic_img_size=True)
    with pytest.raises(ValueError, match='36x36 is no multiple of the patch size 8x8. Set --train-img-sizes 32'):
        check_img_size(timm.create_model('test_dearkd', **kwargs), [32, 36])
    model = timm.create_model('test_dearkd', dynamic_img_pad=True, **kwargs)
    check_img_size(model, [32, 36])
    assert model(torch.randn(1, 3, 36, 36)).isfinite().all()
    caplog.clear()
    model = timm.create_model('test_vit', img_size=50, patch_size=4, dynamic_img_size=False).eval()
    check_img_size(model)
    assert 'ignores the last 2 rows and 2 columns. To use them, set --img-size 48 or 52.' in caplog.text
    images = torch.randn(1, 3, 50, 50)
    changed = images.clone()
    changed[..., 48:, :] = changed[..., 48:] = 9.
    assert model(images).equal(model(changed))  # which the warning is about
