import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from timm_dearkd.rel_pos import AdaptiveRelPos, append_positions, needs_one_width

FLOAT64 = torch.float64


def eq2_slowly(alpha, delta, grid_size, num_prefix_tokens):
    """Eq. 2 word by word: v = -alpha (1, -2 delta_1, -2 delta_2), r = (|d|^2, d_1, d_2), 0 for prefix tokens."""
    height, width = grid_size
    num_tokens = num_prefix_tokens + height * width
    alpha, delta = alpha.detach(), delta.detach()
    scores = torch.zeros(len(alpha), num_tokens, num_tokens, dtype=FLOAT64)
    for h in range(len(alpha)):
        v = [-float(alpha[h]), 2 * float(alpha[h]) * float(delta[h, 0]), 2 * float(alpha[h]) * float(delta[h, 1])]
        for i in range(height * width):
            for j in range(height * width):
                d1, d2 = j // width - i // width, j % width - i % width
                scores[h, num_prefix_tokens + i, num_prefix_tokens + j] = (
                    v[0] * (d1 * d1 + d2 * d2) + v[1] * d1 + v[2] * d2)
    return scores


def randomize(rpe):
    with torch.no_grad():
        rpe.alpha.uniform_(0, 2)
        rpe.delta.uniform_(-3, 3)


def test_scores_of_prefix_tokens_are_exactly_zero():
    rpe = AdaptiveRelPos(4, (3, 4), num_prefix_tokens=2)
    randomize(rpe)
    scores = rpe()
    assert scores[:, :2].eq(0).all() and scores[:, :, :2].eq(0).all()
    torch.testing.assert_close(scores.double(), eq2_slowly(rpe.alpha, rpe.delta, (3, 4), 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize('num_heads,rows,cols', [(12, 3, 4), (16, 4, 4), (2, 1, 2), (1, 1, 1), (5, 2, 3)])
def test_initial_offsets_are_a_centred_grid(num_heads, rows, cols):
    rpe = AdaptiveRelPos(num_heads, (4, 4))
    expected = [
        (r - (rows - 1) / 2, c - (cols - 1) / 2) for r in range(rows) for c in range(cols)][:num_heads]
    assert rpe.delta.tolist() == [list(offset) for offset in expected]
    assert rpe.alpha.eq(1).all()


def attend(form, q, k, v, alpha, delta, rpe, weight, dtype):
    """Output and gradients of one form of the attention core."""
    parameter_dtype = FLOAT64 if dtype == FLOAT64 else torch.float32
    inputs = [t.to(dtype).clone().requires_grad_() for t in (q, k, v)]
    inputs += [t.to(parameter_dtype).clone().requires_grad_() for t in (alpha, delta)]
    q, k, v, alpha, delta = inputs
    scale = q.shape[-1] ** -0.5
    if form == 'slow':
        mask = rpe.offset_scores(alpha, delta).to(dtype).unsqueeze(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        qkv = torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2)
        appended = append_positions(qkv, alpha, delta, rpe.query_basis, rpe.key_basis, scale, rpe.sq_steps)
        out = F.scaled_dot_product_attention(*appended, scale=scale)[..., :v.shape[-1]]
    (out.double() * weight).sum().backward()
    return [out.detach().double()] + [t.grad.double() for t in inputs]


@pytest.mark.parametrize('grid_size', [(14, 14), (24, 24)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_factorised_form_is_as_precise_as_the_slow_one(grid_size, dtype):
    heads, dim, num_tokens = 6, 16, grid_size[0] * grid_size[1] + 1
    rpe = AdaptiveRelPos(heads, grid_size)
    q, k, v = (torch.randn(2, heads, num_tokens, dim).to(dtype).double() for _ in range(3))
    alpha, delta = torch.rand(heads) * 2, torch.rand(heads, 2) * 6 - 3
    weight = torch.randn(2, heads, num_tokens, dim, dtype=FLOAT64)
    common = (q, k, v, alpha.double(), delta.double(), rpe, weight)
    expected = attend('slow', *common, FLOAT64)
    fast, slow = attend('factorised', *common, dtype), attend('slow', *common, dtype)
    for name, e, f, s in zip(('output', 'q', 'k', 'v', 'alpha', 'delta'), expected, fast, slow):
        error, slow_error = ((t - e).norm() / e.norm() for t in (f, s))
        if dtype == torch.float32:
            assert error < 1e-4, f'{name}: {error}'
            if name == 'output':
                assert (f - e).abs().max() < 1e-4
        elif name in ('alpha', 'delta'):
            # the kernel rounds the gradient of the positional channels, which sums of moments then amplify
            assert error < 0.15, f'{name}: {error}, slow form {slow_error}'
        else:
            assert error <= slow_error, f'{name}: {error}, slow form {slow_error}'
            if name == 'output':
                assert (f - e).abs().max() <= (s - e).abs().max()


@pytest.mark.parametrize('dim', [32, 48])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_parameters_of_half_precision_are_exact_whatever_the_scale(dtype, dim):
    """Scores of a module whose alpha is of that dtype, to its rounding: e^-9 apart would be another distribution."""
    rpe, scale = AdaptiveRelPos(2, (14, 14)), dim ** -0.5
    alpha, delta = (torch.rand(2) * 2).to(dtype), (torch.rand(2, 2) * 6 - 3).to(dtype)
    qkv = torch.zeros(1, 197, 3, 2, dim, dtype=dtype)
    q, k, _ = append_positions(qkv, alpha.unsqueeze(1), delta, rpe.query_basis, rpe.key_basis, scale, rpe.sq_steps)
    scores = scale * q[0].double() @ k[0].double().transpose(-2, -1)
    torch.testing.assert_close(scores, rpe.offset_scores(alpha.double(), delta.double()).double(), atol=0.01, rtol=0)


@pytest.mark.skipif(not shutil.which('g++'), reason='inductor needs a C++ compiler')
@pytest.mark.parametrize('grid_size', [(14, 14), (24, 24)])
def test_compiler_keeps_the_remainders(grid_size):
    """inductor elides casts to half precision and back; the split into value and remainder must survive that."""
    rpe = AdaptiveRelPos(2, grid_size)
    randomize(rpe)
    num_tokens = grid_size[0] * grid_size[1] + 1
    qkv = torch.zeros(1, num_tokens, 3, 2, 8, dtype=torch.bfloat16)

    def scores(qkv, alpha, delta):
        q, k, _ = append_positions(qkv, alpha, delta, rpe.query_basis, rpe.key_basis, 1., rpe.sq_steps)
        return q.float() @ k.float().transpose(-2, -1)

    with torch.no_grad():
        expected = scores(qkv, rpe.alpha, rpe.delta)
        out = torch.compile(scores, backend='inductor')(qkv, rpe.alpha, rpe.delta)
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=1e-5)
    near = eq2_error(expected[0], rpe)
    assert near < 0.02


def eq2_error(scores, rpe):
    """Largest error of scores up to 4 patches away, apart from what rounding alpha to bfloat16 does to them."""
    exact = rpe.offset_scores(rpe.alpha.detach().double(), rpe.delta.detach().double())
    pos = rpe.key_basis[1:, :2]
    close = F.pad((pos[:, None] - pos).abs().amax(-1) <= 4, [1, 0, 1, 0], value=True)
    return ((scores.double() - exact).abs() - exact.abs() * 2 ** -7)[:, close].max()


def test_float16_does_not_overflow():
    rpe = AdaptiveRelPos(1, (64, 64))
    with torch.no_grad():
        rpe.alpha.fill_(20.)
    qkv = torch.zeros(1, 4097, 3, 1, 64, dtype=torch.float16)
    q, k, v = append_positions(qkv, rpe.alpha, rpe.delta, rpe.query_basis, rpe.key_basis, 0.125, rpe.sq_steps)
    assert q.isfinite().all() and k.isfinite().all()


def test_only_float32_on_cuda_leaves_the_values_alone():
    for is_cuda, dtype, dim, expected in (
            (True, torch.float32, 16, False), (True, torch.float32, 18, True), (True, torch.bfloat16, 16, True),
            (True, torch.float64, 16, True), (False, torch.float32, 16, True)):
        qkv = SimpleNamespace(is_cuda=is_cuda, dtype=dtype, shape=(2, 5, 3, 4, dim))
        assert needs_one_width(qkv) is expected
