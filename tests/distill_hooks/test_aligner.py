import pytest
import torch
import torch.nn.functional as F

from distill_hooks import Aligner


@pytest.mark.parametrize('size', [(9, 7), (4, 4), (1, 3)])
@pytest.mark.parametrize('relu', [True, False])
def test_aligner_is_figure_3(size, relu):
    aligner = Aligner(6, 10, relu=relu)
    with torch.no_grad():
        aligner.norm.weight.uniform_(0.5, 2)
        aligner.norm.bias.uniform_(-1, 1)
    tokens = torch.randn(2, 6, 4, 4)
    x = tokens if size == (4, 4) else F.interpolate(tokens, size, mode='bilinear', align_corners=False)
    kernel = aligner.conv_dw.weight
    x = torch.cat([F.conv2d(x[:, c:c + 1], kernel[c:c + 1], padding=1) for c in range(6)], dim=1)
    x = torch.einsum('oc,bchw->bhwo', aligner.conv_pw.weight, x) + aligner.conv_pw.bias
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    x = (x - mean) / (var + 1e-6).sqrt() * aligner.norm.weight + aligner.norm.bias
    x = x.permute(0, 3, 1, 2)
    out = aligner(tokens, size)
    torch.testing.assert_close(out, x.clamp(min=0) if relu else x, atol=1e-5, rtol=1e-4)
    assert (out.min() < 0) != relu
