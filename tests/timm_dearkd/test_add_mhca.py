"""MHCA in any timm VisionTransformer, by hand and by name."""
import copy
import io

import pytest
import timm
import torch
from torch import nn

from timm_dearkd import ConvAttention, DearKD, add_mhca

ANY_VIT = [
    'vit_tiny_patch16_224', 'deit3_small_patch16_224', 'deit_tiny_distilled_patch16_224',
    'vit_small_patch14_reg4_dinov2', 'vit_base_patch16_siglip_224', 'test_vit2', 'test_vit3']


@pytest.mark.parametrize('name', ANY_VIT)
def test_add_mhca_keeps_any_vit(name):
    """With alpha = 0 the outputs are the original's, in training form and in inference form."""
    original = timm.create_model(name, img_size=56 if '14' in name else 64).eval()
    model = add_mhca(copy.deepcopy(original), num_blocks=4, rpe_alpha=0.)
    assert type(model) is not type(original) and isinstance(model, type(original))
    x = torch.randn(2, 3, *original.patch_embed.img_size)
    expected = original(x)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
        for block in model.blocks[:4]:
            block.attn.rpe.alpha.fill_(1.)
        assert not torch.equal(model(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other(x), model(x))
    added = set(model.state_dict()) - set(original.state_dict())
    assert added == {f'blocks.{i}.attn.rpe.{p}' for i in range(4) for p in ('alpha', 'delta')}


def test_add_mhca_refuses_what_it_cannot_convert():
    with pytest.raises(ValueError, match='not to a ResNet'):
        add_mhca(timm.create_model('test_resnet'))
    with pytest.raises(ValueError, match='already'):
        add_mhca(timm.create_model('test_dearkd'))
    with pytest.raises(ValueError, match='blocks.0'):
        add_mhca(timm.models.VisionTransformer(
            img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2,
            block_fn=timm.models.vision_transformer.ParallelThingsBlock), num_blocks=1)
    mixed = timm.create_model('test_vit')
    mixed.blocks[1].attn = nn.Identity()
    with pytest.raises(ValueError, match='blocks.1'):
        add_mhca(mixed, num_blocks=3)
    assert not isinstance(mixed.blocks[0].attn, ConvAttention)  # nothing was converted


def test_dearkd_from_is_built_saved_and_built_again(tmp_path):
    model = timm.create_model(
        'dearkd_from', base='deit3_small_patch16_224', num_mhca_blocks=3, img_size=64, num_classes=5).eval()
    assert isinstance(model, DearKD) and isinstance(model.blocks[2].attn, ConvAttention)
    assert not isinstance(model.blocks[3].attn, ConvAttention)
    assert model.pretrained_cfg['mean'] == timm.models.get_pretrained_cfg('deit3_small_patch16_224').mean
    with torch.no_grad():
        model.blocks[1].attn.rpe.alpha.uniform_(0, 1)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(x), model(x))
    assert len([b for b in again.blocks if isinstance(b.attn, ConvAttention)]) == 3


def test_dearkd_from_starts_from_the_weights_of_its_base(tmp_path):
    base = timm.create_model('test_vit', num_classes=4)
    path = tmp_path / 'base.pth'
    torch.save(base.state_dict(), path)
    model = timm.create_model(
        'dearkd_from', base='test_vit', num_mhca_blocks=2, num_classes=4, rpe_alpha=0., pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path), num_classes=4))
    assert model.blocks[0].attn.qkv.weight.equal(base.blocks[0].attn.qkv.weight)
    x = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(model.eval()(x), base.eval()(x), atol=1e-5, rtol=1e-4)


def test_dearkd_from_has_the_input_of_its_base(tmp_path):
    """Also with a file of weights, whose alpha and delta are kept. Overlays replace single values."""
    trained = timm.create_model('dearkd_from', base='test_vit', num_mhca_blocks=2, num_classes=4, rpe_alpha=0.5)
    file, base = str(tmp_path / 'trained.pth'), timm.models.get_pretrained_cfg('test_vit')
    torch.save(trained.state_dict(), file)
    args = dict(base='test_vit', num_mhca_blocks=2, num_classes=4, pretrained=True)
    overlay = dict(file=file, num_classes=4, crop_pct=0.9)
    from_script = timm.models.resolve_model_input_args(
        'dearkd_from', {}, **args, pretrained_cfg_overlay=overlay)  # as timm's scripts pass the configuration
    for kwargs in (dict(args, pretrained_cfg_overlay=overlay), dict(from_script, pretrained_cfg_overlay=overlay)):
        model = timm.create_model(kwargs.pop('model_name', 'dearkd_from'), **kwargs)
        assert model.blocks[0].attn.rpe.alpha.tolist() == [0.5, 0.5]
        assert model.pretrained_cfg['crop_pct'] == 0.9 != base.crop_pct
        assert model.pretrained_cfg['mean'] == base.mean and model.pretrained_cfg['input_size'] == base.input_size
    with pytest.raises(ValueError, match="base is 'local-dir:vit', expected the timm name of an architecture"):
        timm.create_model('dearkd_from', base='local-dir:vit')


def test_a_file_takes_the_place_of_the_weights_of_the_base(tmp_path):
    """Those of this base are in JAX's format, on the Hub."""
    base = timm.create_model('vit_tiny_patch16_224.augreg_in21k', num_classes=4, img_size=32, depth=2)
    torch.save(base.state_dict(), tmp_path / 'plain.pth')
    sources = dict(file=str(tmp_path / 'plain.pth')), dict(url=(tmp_path / 'plain.pth').as_uri())
    for source in sources:
        args = dict(base='vit_tiny_patch16_224.augreg_in21k', num_mhca_blocks=1, num_classes=4, img_size=32, depth=2)
        model = timm.create_model('dearkd_from', pretrained=True, pretrained_cfg=dict(source, num_classes=4), **args)
        assert model.blocks[0].attn.qkv.weight.equal(base.blocks[0].attn.qkv.weight)
        assert not model.pretrained_cfg.get('hf_hub_id') and model.pretrained_cfg['mean'] == (0.5, 0.5, 0.5)
    timm.models.save_for_hf(model, str(tmp_path / 'saved'), safe_serialization=True)
    with pytest.raises(RuntimeError, match='Missing key.*blocks.1.attn.rpe.alpha'):
        timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True, num_mhca_blocks=2)


@pytest.mark.parametrize('name', ['test_vit', 'deit_tiny_distilled_patch16_224'])
def test_a_converted_model_is_saved_and_loaded(name, tmp_path):
    model = add_mhca(timm.create_model(name, num_classes=3, img_size=32), num_blocks=2, rpe_alpha=0.7).eval()
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model(x))
    assert type(loaded) is type(model) and tuple(loaded.pretrained_cfg['mean']) == model.pretrained_cfg['mean']


def test_the_start_of_alpha_and_delta_can_be_chosen():
    rpe = timm.create_model('test_dearkd', rpe_alpha=0.3, rpe_delta='zero').blocks[0].attn.rpe
    assert rpe.alpha.tolist() == pytest.approx([0.3, 0.3]) and not rpe.delta.any()
    torch.manual_seed(0)
    first, second = (timm.create_model('test_dearkd', rpe_delta='normal').blocks[0].attn.rpe.delta for _ in range(2))
    assert not torch.equal(first, second) and first.abs().max() < 6
    with pytest.raises(ValueError, match="rpe delta 'ring', expected one of grid, zero, normal"):
        timm.create_model('test_dearkd', rpe_delta='ring')
