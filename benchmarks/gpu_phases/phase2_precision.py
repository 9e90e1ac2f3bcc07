"""Phase 2: MHCA against Eq. 2 and 3 computed pair by pair in float64."""
import itertools
import math
from typing import Dict, List, NamedTuple, Tuple

import torch
import torch.nn as nn

from timm_dearkd.attention import ConvAttention

from .check import Check, at_most
from .phase1_kernels import BACKENDS, HEADS, is_unsupported, use

PARTS = ('output', 'qkv', 'alpha', 'delta')
BATCH = 2


class Case(NamedTuple):
    """A model's heads on a token grid."""
    model: str
    grid: Tuple[int, int]


# Relative errors of the output, and of the gradients of q, k and v, of alpha and of delta, on a grid of 14x14. Over
# several inputs together, because the gradient of alpha is a small difference of large sums for some of them.
LIMITS = {
    torch.float32: (1e-5, 1e-4, 1e-4, 1e-4),
    torch.bfloat16: (4e-3, 6e-3, 5e-2, 3e-2),
    torch.float16: (4e-3 / 8, 6e-3 / 8, 5e-2 / 8, 3e-2 / 8),
}


def pair_scores(alpha: torch.Tensor, delta: torch.Tensor, grid: Tuple[int, int], prefix: int = 1) -> torch.Tensor:
    """Eq. 2 for every pair of tokens, v . r_ij: (heads, T, T), 0 for pairs with a prefix token."""
    height, width = grid
    index = torch.arange(height * width, device=alpha.device)
    place = torch.stack([index // width, index % width], dim=1).to(alpha.dtype)  # (H*W, 2), row and column
    shift = place[None, :] - place[:, None]  # (query, key, 2)
    r = torch.cat([shift.square().sum(-1, keepdim=True), shift], dim=-1)  # (query, key, 3)
    v = torch.stack([-alpha, 2 * alpha * delta[:, 0], 2 * alpha * delta[:, 1]], dim=1)  # (heads, 3)
    return nn.functional.pad(torch.einsum('hc,ijc->hij', v, r), (prefix, 0, prefix, 0))


def reference(qkv: torch.Tensor, alpha: torch.Tensor, delta: torch.Tensor, case: Case) -> torch.Tensor:
    """Eq. 3 of qkv (B, T, 3 * heads * D), all in float64: (B, T, heads * D)."""
    heads, dim = HEADS[case.model]
    q, k, v = qkv.unflatten(-1, (3, heads, dim)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / dim ** 0.5 + pair_scores(alpha, delta, case.grid)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def limits_of(case: Case, dtype: torch.dtype) -> Dict[str, float]:
    """The limits by part. That of alpha grows with the grid, as |p|^2 does, which its gradient sums."""
    output, qkv, alpha, delta = LIMITS[dtype]
    larger = max(1., case.grid[0] * case.grid[1] / 14 ** 2)
    return dict(zip(PARTS, (output, qkv, alpha * larger, delta)))


def make_inputs(case: Case, check: Check, seed: int = 0) -> List[torch.Tensor]:
    """qkv, alpha in [0, 2], delta within 3 patches, and the weights of a loss, in float64."""
    heads, dim = HEADS[case.model]
    tokens = case.grid[0] * case.grid[1] + 1
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(BATCH, tokens, 3 * heads * dim, generator=generator)
    alpha, delta = torch.rand(heads, generator=generator) * 2, torch.rand(heads, 2, generator=generator) * 6 - 3
    weight = torch.randn(BATCH, tokens, heads * dim, generator=generator)
    return [x.double().to(check.device) for x in (qkv, alpha, delta, weight)]


def make_mhca(case: Case, check: Check, alpha: torch.Tensor, delta: torch.Tensor) -> ConvAttention:
    """MHCA in training mode without its two linear layers, whose own rounding is not of interest."""
    heads, dim = HEADS[case.model]
    mhca = ConvAttention(heads * dim, heads, grid_size=case.grid)
    mhca.qkv = mhca.proj = nn.Identity()
    mhca = mhca.to(check.device).train()
    with torch.no_grad():
        mhca.rpe.alpha.copy_(alpha)
        mhca.rpe.delta.copy_(delta)
    return mhca


def errors(
        case: Case,
        dtype: torch.dtype,
        backend: str,
        autocast: bool,
        check: Check,
        seed: int = 0,
) -> Dict[str, Tuple[float, float]]:
    """Squared norms of the error of MHCA and of the exact value, by part."""
    qkv, alpha, delta, weight = make_inputs(case, check, seed)
    qkv = qkv.to(dtype)
    exact = [x.double().requires_grad_() for x in (qkv, alpha.float(), delta.float())]
    expected = reference(*exact, case)
    (expected * weight).sum().backward()
    mhca = make_mhca(case, check, alpha, delta)
    qkv.requires_grad_()
    with use(BACKENDS[backend]), torch.autocast(check.device_type, dtype=dtype, enabled=autocast):
        out = mhca(qkv)
        (out.double() * weight).sum().backward()
    results = (out, qkv.grad, mhca.rpe.alpha.grad, mhca.rpe.delta.grad)
    return {
        name: tuple(x.detach().double().square().sum().item() for x in (result - right, right))
        for name, result, right in zip(PARTS, results, (expected, *(x.grad for x in exact)))
    }


def relative_errors(case: Case, dtype: torch.dtype, backend: str, autocast: bool, check: Check) -> Dict[str, float]:
    """Norm of the errors over several inputs relative to that of the exact values, by part."""
    found = [errors(case, dtype, backend, autocast, check, seed) for seed in range(3 if check.toy else 5)]
    return {part: math.sqrt(sum(f[part][0] for f in found) / sum(f[part][1] for f in found)) for part in PARTS}


def cases(check: Check) -> List[Case]:
    if check.toy:
        return [Case('tiny', (8, 8)), Case('tiny', (4, 5))]
    return [Case(*case) for case in itertools.product(HEADS, [(14, 14), (24, 24), (14, 15)])]


def run(check: Check) -> None:
    kinds = [
        (torch.bfloat16, True), (torch.float32, False), (torch.float16, True), (torch.bfloat16, False),
        (torch.float16, False)]
    for dtype, autocast in kinds:
        for backend in BACKENDS:
            name = f'{str(dtype).removeprefix("torch.")}{", autocast" if autocast else ""}, {backend}'
            if check.has_time(name, 0 if check.toy else 2):
                with check.part(name):
                    largest(check, name, dtype, backend, autocast)


def largest(check: Check, name: str, dtype: torch.dtype, backend: str, autocast: bool) -> None:
    """The largest of the errors over all cases, relative to its limit."""
    ratios: Dict[str, float] = dict.fromkeys(PARTS, 0.)
    may_be_cudnn = dtype != torch.float32 and backend in ('cudnn', 'default')
    for case in cases(check):
        place = f'{name}, {case.model}, {case.grid[0]}x{case.grid[1]}'
        if may_be_cudnn:
            check.data(place, cudnn='started')  # it may kill the process
        try:
            found = relative_errors(case, dtype, backend, autocast, check)
        except RuntimeError as e:
            if is_unsupported(e):
                check.skip(name, 'PyTorch has no such kernel for these tensors')
                return
            check.data(place, problem=str(e)[:300], cudnn_failed=may_be_cudnn and 'cudnn' in str(e).lower())
            raise
        ratio = {part: found[part] / limit for part, limit in limits_of(case, dtype).items()}
        is_wrong = not max(ratio.values()) <= 3  # more than rounding, or not finite
        check.data(place, errors=found, ratios=ratio, cudnn_failed=backend == 'cudnn' and is_wrong)
        ratios = {part: max(ratios[part], ratio[part], key=lambda x: float('inf') if x != x else x) for part in PARTS}
    # The math form multiplies float32 matrices under TF32, as train.py allows it: PyTorch's error, not ours
    is_judged = not (backend == 'math' and dtype == torch.float32 and check.is_cuda)
    check.row(
        f'error of MHCA, {name}', max(ratios.values()), 'x its limit', at_most(1) if is_judged else None,
        of_limit={part: float(f'{ratio:.3g}') for part, ratio in ratios.items()})
