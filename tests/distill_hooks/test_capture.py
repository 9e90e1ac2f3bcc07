import pytest
import timm
import torch

from distill_hooks import FeatureCapture, find_module


def test_captures_what_timm_extracts():
    model = timm.create_model('test_resnet').eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[2, 1], intermediates_only=True)  # in order of depth
    with FeatureCapture(model, ['layer2', 'layer1']) as capture:
        model(x)
        layer2, layer1 = capture.take()
        torch.testing.assert_close(layer1, expected[0])
        torch.testing.assert_close(layer2, expected[1])
        assert not capture._features  # nothing is kept
        capture.enabled = False
        model(x)
        assert not capture._features
    assert not model.layer1._forward_hooks and not model.layer2._forward_hooks


def test_unknown_layers_name_the_nearest():
    model = timm.create_model('test_resnet')
    with pytest.raises(ValueError, match=r"no layer 'layer9'.*layer1"):
        FeatureCapture(model, ['layer1', 'layer9'])
    assert not model.layer1._forward_hooks
    with pytest.raises(ValueError, match='conv1'):
        find_module(model, '')


def test_a_layer_that_is_not_called():
    """There and in no forward, as timm's blocks have them that are off."""
    model = timm.create_model('test_efficientnet').eval()
    with FeatureCapture(model, ['blocks.1.0.drop_path']) as capture:
        model(torch.randn(1, 3, 32, 32))
        with pytest.raises(ValueError, match='does not call its layer'):
            capture.take()
