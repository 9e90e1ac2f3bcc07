"""Phase 0: how fast the card copies and multiplies."""
import torch
from timing import medians

from .check import Check


def run(check: Check) -> None:
    with check.part('copy'):
        copy(check)
    with check.part('matrix products'):
        matrix_products(check)


def copy(check: Check) -> None:
    """Bytes read and written per second by a copy that is many times the size of the cache."""
    size = 2 ** (22 if check.toy else 31)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=check.device)
    target = torch.empty_like(source)
    seconds = medians({'copy': lambda: target.copy_(source)}, 10, check.device)['copy']
    check.row('copy on the device', 2 * size / seconds / 1e12, 'TB/s', expected='about 3 (H100), 4.3 (H200)')


def matrix_products(check: Check) -> None:
    """Matrix products of random numbers (zeros are faster)."""
    size = 128 if check.toy else 8192
    functions = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(size, size, device=check.device).to(dtype) for _ in range(2))
        functions[str(dtype).removeprefix('torch.')] = lambda a=a, b=b: a @ b
    expected = dict(bfloat16='about 800 (H100, H200)', float32='with TF32')
    for name, seconds in medians(functions, 10, check.device).items():
        check.row(
            f'matrix product, {name}', 2 * size ** 3 / seconds / 1e12, 'TFLOP/s', expected=expected.get(name, ''))
