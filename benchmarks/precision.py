"""Compare the rounding errors of two forms of MHCA, factorised and with a bias, for output and gradients.

The reference is the bias form in float64 on the same random inputs (alpha in [0, 2], delta within 3 patches). The
figures are norms of the error relative to the norm of the reference. On the CPU, in half a minute:

    python benchmarks/precision.py
"""
from typing import List

import torch
import torch.nn.functional as F

from timm_dearkd.rel_pos import AdaptiveRelPos, append_positions

HEADS, HEAD_DIM, BATCH = 12, 32, 2


def attend(rpe: AdaptiveRelPos, inputs: List[torch.Tensor], dtype: torch.dtype, factorised: bool) -> List[torch.Tensor]:
    """Return output and gradients of qkv (B, T, 3, heads, D), alpha and delta, in float64."""
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight = inputs[-1]
    leaves = [t.to(d).clone().requires_grad_() for t, d in zip(inputs, (dtype, parameter_dtype, parameter_dtype))]
    qkv, alpha, delta = leaves
    scale = HEAD_DIM ** -0.5
    if factorised:
        q, k, v = append_positions(qkv, alpha, delta, rpe.query_basis, rpe.key_basis, scale, rpe.sq_steps)
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :HEAD_DIM]
    else:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = rpe.offset_scores(alpha, delta).to(dtype).unsqueeze(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    (out.double() * weight).sum().backward()
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]


def main() -> None:
    torch.set_flush_denormal(True)
    print('| grid, dtype, form | output | q, k, v | alpha | delta |')
    print('| --- | --- | --- | --- | --- |')
    for size in (14, 24):
        torch.manual_seed(0)
        rpe, num_tokens = AdaptiveRelPos(HEADS, (size, size)), size * size + 1
        qkv = torch.randn(BATCH, num_tokens, 3, HEADS, HEAD_DIM)
        alpha, delta = torch.rand(HEADS) * 2, torch.rand(HEADS, 2) * 6 - 3
        weight = torch.randn(BATCH, HEADS, num_tokens, HEAD_DIM, dtype=torch.float64)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            inputs = [qkv.to(dtype).double(), alpha.double(), delta.double(), weight]
            exact = attend(rpe, inputs, torch.float64, factorised=False)
            for form in ('factorised', 'bias'):
                results = attend(rpe, inputs, dtype, factorised=form == 'factorised')
                errors = [f'{((r - e).norm() / e.norm()).item():.1e}' for r, e in zip(results, exact)]
                name = str(dtype).removeprefix('torch.')
                print(f'| {size}x{size}, {name}, {form} | {" | ".join(errors)} |', flush=True)


if __name__ == '__main__':
    main()
