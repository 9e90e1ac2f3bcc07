"""Probabilities of the manifest, by networks whose classes have another order or number."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import timm_dearkd  # noqa: F401
from timm_dearkd.data_free.classes import match_student, match_verifier, parse_classes, read_class_names
from timm_dearkd.data_free.dataset import SyntheticSet
from timm_dearkd.data_free.judge import MAX_IMAGES, Judge
from timm_dearkd.engine.image_folder import open_folder


def test_a_verifier_of_other_order_and_size(cnn):
    """Its classes are found by their names, and a ViT sees the images at its own size."""
    names = ['blue sky', 'grass', 'rust']
    model = timm.create_model(f'local-dir:{cnn}', pretrained=True).eval()
    norm = [model.pretrained_cfg[key] for key in ('mean', 'std')]
    other = copy.deepcopy(model)
    order = [2, 0, 1]
    for parameter in other.get_classifier().parameters():
        parameter.data = parameter.data[order]
    other.pretrained_cfg = {**model.pretrained_cfg, 'label_names': [names[i] for i in order]}
    pixels = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    classes = match_verifier(other, model, names)
    assert classes == [1, 2, 0] == match_verifier(other, model, ['himmel', 'gras', 'rost'])  # by the CNN's own names
    for record in Judge(model, other, classes, *norm, 0.3).records(pixels, targets):
        assert record['verifier_prob'] == pytest.approx(record['teacher_prob'], abs=1e-3)
        assert record['kept'] == (record['verifier_prob'] >= 0.3)
    vit = timm.create_model('test_vit', num_classes=3, img_size=48).eval()
    judge = Judge(model, vit, range(3), *norm, 0.3)
    judge.check_size(32)
    array = F.interpolate(pixels.permute(0, 3, 1, 2) / 255, (48, 48), mode='bilinear', antialias=True)
    mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        expected = vit((array - mean) / std).softmax(1)[range(6), targets]
    found = [record['verifier_prob'] for record in judge.records(pixels, targets)]
    assert found == pytest.approx(expected.tolist(), abs=1e-3)
    small = timm.create_model('inception_v3', num_classes=3).eval()
    with pytest.raises(ValueError, match='verifier does not take images of 8 pixels'):
        Judge(model, small, range(3), *norm, 0.3).check_size(8)


def test_many_images_are_judged_in_parts(cnn):
    """A generator makes up to 1,920 at once, which do not fit into memory at 224 pixels."""
    model = timm.create_model(f'local-dir:{cnn}', pretrained=True).eval()
    sizes = []
    model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    pixels = torch.randint(0, 256, (MAX_IMAGES + 2, 8, 8, 3), dtype=torch.uint8)
    records = Judge(model, model, range(3), [0.5] * 3, [0.5] * 3, 0.).records(pixels, torch.ones(len(pixels)).long())
    assert sizes == [MAX_IMAGES, 2] * 2
    alone = Judge(model, None, (), [0.5] * 3, [0.5] * 3, 0.).records(pixels[-1:], torch.ones(1).long())
    assert alone[0]['teacher_prob'] == pytest.approx(records[-1]['teacher_prob'], abs=1e-4)
    assert records[-1]['teacher_prob'] == pytest.approx(records[-1]['verifier_prob'], abs=1e-4)


@pytest.mark.parametrize('known, classes, told', [
    (['date', 'apple', 'cherry', 'banana'], [1, 3, 2], False),  # more classes
    (['apple', 'cherry', 'date'], [0, 1, 2], True),  # partly others
    ([], [0, 1, 2], False)])
def test_classes_of_a_verifier(known, classes, told, caplog):
    names = ['apple', 'banana', 'cherry']
    cnn, verifier = (timm.create_model('test_resnet', num_classes=len(n) or 3) for n in (names, known))
    cnn.pretrained_cfg = {**cnn.pretrained_cfg, 'label_names': names}
    verifier.pretrained_cfg = {**verifier.pretrained_cfg, 'label_names': known}
    assert match_verifier(verifier, cnn, names) == classes
    assert ("'banana' is 'cherry'" in caplog.text) == told
    if len(known) < 4:  # a student has no more classes
        assert match_student(verifier, names) == classes


def test_a_network_without_names_beside_a_cnn_in_another_order(caplog):
    """Networks that were trained on folders have the order of `class_order`."""
    cnn, other = (timm.create_model('test_resnet', num_classes=3) for _ in range(2))
    for role, match in (('student', lambda names: match_student(other, names)),
                        ('verifier', lambda names: match_verifier(other, cnn, names))):
        caplog.clear()
        assert match(['a', 'b', 'c']) == [0, 1, 2] and not caplog.messages
        assert match(['b', 'a', 'c']) == [0, 1, 2]
        assert f'--{role} has no class names. Its classes are taken in the order of the CNN: b, a, c.' in caplog.text


def test_folder_names_are_different_and_synsets_are_known(tmp_path):
    """Also of a file of Windows, with a byte order mark."""
    (tmp_path / 'names.txt').write_text('\ufeffcrane\ncrane\ncrane 0\n', encoding='utf-8')
    cnn = timm.create_model('test_resnet', num_classes=3)
    names = read_class_names(str(tmp_path / 'names.txt'), cnn)
    assert len(set(names)) == 3 and names[0].startswith('crane')
    imagenet = timm.create_model('test_resnet', num_classes=1000)
    assert match_verifier(imagenet, cnn, ['n03888257', 'n01440764', 'n01443537']) == [701, 0, 1]
    assert parse_classes(['2', '0-1'], 3) == [0, 1, 2]
    for text in ('1-', '-1', '1-x'):
        with pytest.raises(ValueError, match='--classes has'):
            parse_classes([text], 3)


def test_class_names_of_the_cnn_are_those_of_the_student(tmp_path, caplog):
    """If they are valid folder names. Others are told, stay apart, and are not hidden from the reader."""
    names = ['50%', 'C++', '_x', 'cup (blue)', 'no, thanks', "rock'n'roll", '²', '[a] & {b}']
    cnn = timm.create_model('test_resnet', num_classes=8, pretrained_cfg_overlay=dict(label_names=names))
    assert read_class_names(None, cnn) == names and not caplog.messages
    names = ['a/b', 'a:b', '.net', '..', 'etc. ', 'Nul', 'e' * 300, 'fine']
    cnn.pretrained_cfg = {**cnn.pretrained_cfg, 'label_names': names}
    folders = read_class_names(None, cnn)
    assert folders == ['a_b 0', 'a_b 1', '_net', '__', 'etc_', '_Nul', 'e' * 240, 'fine']
    assert len(caplog.messages) == 1 and "7 of 8 class names" in caplog.text and "'a/b' becomes 'a_b 0'" in caplog.text
    dataset = SyntheticSet(str(tmp_path), dict(enumerate(folders)), {})
    for index in range(8):
        dataset.write(index, [Image.new('L', (4, 4))], [dict(target=index, teacher_prob=1., kept=True)])
    assert set(open_folder(str(tmp_path), 'train', is_training=True).class_to_idx) == set(folders)
