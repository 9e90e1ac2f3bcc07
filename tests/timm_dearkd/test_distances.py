import math

import pytest
import timm
import torch

import timm_dearkd  # noqa: F401
from timm_dearkd.distances import attention_distances, attention_weights, mean_distances

GRID = (3, 4)


def one_token(rows, columns, offset):
    """Attention that every query gives wholly to the patch at an offset, round the edges."""
    weights = torch.zeros(1, 1, rows * columns, rows * columns)
    for y in range(rows):
        for x in range(columns):
            target = (y + offset[0]) % rows * columns + (x + offset[1]) % columns
            weights[0, 0, y * columns + x, target] = 1.
    return weights


def test_maps_that_can_be_worked_out_by_hand():
    assert mean_distances(torch.eye(12)[None, None], GRID).item() == 0
    # one to the right: 1 patch away, but for the last column, which wraps 3 patches to the left
    assert mean_distances(one_token(*GRID, (0, 1)), GRID).item() == pytest.approx((3 * 1 + 3) / 4)
    places = [(y, x) for y in range(3) for x in range(4)]
    expected = sum(math.dist(p, q) for p in places for q in places) / 144
    assert mean_distances(torch.full((2, 5, 12, 12), 1 / 12), GRID).tolist() == pytest.approx([expected] * 5)
    # with [CLS], which takes half of the attention, and asks for its own
    with_cls = torch.full((1, 1, 13, 13), 0.5 / 12)
    with_cls[..., 0] = 0.5
    assert mean_distances(with_cls, GRID).item() == pytest.approx(expected)


@pytest.mark.parametrize('name', ['test_dearkd', 'test_vit', 'deit_tiny_distilled_patch16_224'])
def test_against_a_slow_loop(name):
    kwargs = dict(img_size=(48, 64)) if name != 'test_dearkd' else dict(img_size=16)
    model = timm.create_model(name, num_classes=3, **kwargs).eval()
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    maps = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda m, args: maps.append(attention_weights(m, args[0])))
    actual = attention_distances(model, images)
    rows, columns = model.patch_embed.grid_size
    prefix = model.num_prefix_tokens
    places = [(y, x) for y in range(rows) for x in range(columns)]
    maps = maps[:len(model.blocks)]
    for layer, weights in enumerate(maps):
        for head in range(weights.shape[1]):
            total = 0.
            for attention in weights[:, head].double().tolist():
                for i, p in enumerate(places):
                    row = attention[prefix + i][prefix:]
                    total += sum(w * math.dist(p, q) for w, q in zip(row, places)) / sum(row)
            assert actual[layer, head].item() == pytest.approx(total / 2 / len(places), rel=1e-4)


@pytest.mark.parametrize('name', ['test_dearkd', 'test_vit'])
def test_the_weights_are_those_that_the_model_uses(name):
    attention = timm.create_model(name).eval().blocks[0].attn
    tokens = attention.rpe.key_basis.shape[0] if name == 'test_dearkd' else 20
    x = torch.randn(2, tokens, attention.qkv.in_features)
    with torch.no_grad():
        values = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1))[:, :, 2].transpose(1, 2)
        expected = attention.proj((attention_weights(attention, x) @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-4)


def test_models_without_attention_are_refused():
    with pytest.raises(ValueError, match='no blocks with timm'):
        attention_distances(timm.create_model('test_resnet'), torch.zeros(1, 3, 32, 32))
