"""Probabilities of the manifest, by networks whose classes have another order or number."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import timm_dearkd  # noqa: F401
from timm_dearkd.data_free.judge import Judge


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
    for record in Judge(model, other, names, *norm, 0.3).records(pixels, targets):
        assert record['verifier_prob'] == pytest.approx(record['teacher_prob'], abs=1e-3)
        assert record['kept'] == (record['verifier_prob'] >= 0.3)
    vit = timm.create_model('test_vit', num_classes=3, img_size=48).eval()
    judge = Judge(model, vit, names, *norm, 0.3)
    judge.check_size(32)
    array = F.interpolate(pixels.permute(0, 3, 1, 2) / 255, (48, 48), mode='bilinear', antialias=True)
    mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        expected = vit((array - mean) / std).softmax(1)[range(6), targets]
    found = [record['verifier_prob'] for record in judge.records(pixels, targets)]
    assert found == pytest.approx(expected.tolist(), abs=1e-3)
    other.pretrained_cfg['label_names'] = names[:2]
    with pytest.raises(ValueError, match='has 2 of the 3 classes'):
        Judge(model, other, names, *norm, 0.3)
    small = timm.create_model('inception_v3', num_classes=3).eval()
    with pytest.raises(ValueError, match='verifier does not take images of 8 pixels'):
        Judge(model, small, names, *norm, 0.3).check_size(8)
