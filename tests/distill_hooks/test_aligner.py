import pytest
import torch
import torch.nn.functional as F

from distill_hooks import Aligner


@pytest.mark.parametrize('usual', [False, True])
@pytest.mark.parametrize('size', [(9, 7), (4, 4), (1, 3)])
@pytest.mark.parametrize('relu', [True, False])
def test_aligner_is_figure_3(size, relu, usual):
    """By PyTorch's interpolation, and by matrix products between sizes that are known before."""
    aligner = Aligner(6, 10, relu=relu, **(dict(in_size=(4, 4), out_size=size) if usual else {}))
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


def test_the_usual_sizes_are_deterministic_and_in_no_checkpoint():
    """Neither the forward nor the backward calls PyTorch's bilinear interpolation."""
    aligner = Aligner(6, 10, in_size=(4, 5), out_size=(8, 9))
    assert set(aligner.state_dict()) == set(Aligner(6, 10).state_dict())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        aligner(torch.randn(2, 6, 4, 5, requires_grad=True), (8, 9)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert 'aten::bmm' in names and not any('upsample' in name for name in names)
    half = aligner.bfloat16()
    assert half(torch.randn(2, 6, 4, 5).bfloat16(), (8, 9)).dtype == torch.bfloat16
