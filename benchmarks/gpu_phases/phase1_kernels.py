"""Phase 1: which attention kernels take queries and keys with the channels of MHCA, how exactly, and how fast."""
import contextlib
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
import torch.nn.functional as F
from timing import medians
from torch.nn.attention import SDPBackend, sdpa_kernel

from .check import Check, at_most, milliseconds, relative_error

HEADS = dict(tiny=(12, 16), small=(12, 32), base=(16, 48))  # heads, head dimension
BACKENDS = dict(
    default=None,
    cudnn=SDPBackend.CUDNN_ATTENTION,
    flash=SDPBackend.FLASH_ATTENTION,
    efficient=SDPBackend.EFFICIENT_ATTENTION,
    math=SDPBackend.MATH,
)
# Relative error above which a kernel is wrong, not just rounded
WRONG = {torch.float32: 1e-2, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Shape(NamedTuple):
    """Attention of a model at a batch size."""
    model: str
    tokens: int
    batch: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f'{self.model}, {self.tokens} tokens, {str(self.dtype).removeprefix("torch.")}'


def shapes(check: Check) -> List[Shape]:
    """Return the measurements, the most important first."""
    sizes = [(17, 2)] if check.toy else [(197, 256), (577, 64)]
    models = ['tiny'] if check.toy else list(HEADS)
    result = [
        Shape(model, tokens, batch, dtype)
        for tokens, batch in sizes
        for dtype in (torch.bfloat16, torch.float32)
        for model in models
    ]
    return result + [Shape(model, *sizes[0], torch.float16) for model in models]


def is_unsupported(error: RuntimeError) -> bool:
    """Whether PyTorch says that the backend does not take such tensors, rather than that it failed."""
    return 'No available kernel' in str(error) or 'No viable backend' in str(error)


def use(backend: Optional[SDPBackend]):
    """Allow one backend only; None leaves the choice to PyTorch."""
    return contextlib.nullcontext() if backend is None else sdpa_kernel(backend)


def make_inputs(shape: Shape, check: Check) -> Dict[str, List[torch.Tensor]]:
    """Queries, keys and values (B, heads, T, D), strided as the model has them.

    'plain' has none of the channels; 'V padded' has them in all three; 'V as it is' in queries and keys alone.
    """
    heads, dim = HEADS[shape.model]
    wide = dim + (4 if shape.dtype == torch.float32 else 8)

    def tensor(width: int, zeros: int = 0) -> torch.Tensor:
        x = torch.randn(shape.batch, shape.tokens, heads, width - zeros, device=check.device)
        return F.pad(x, (0, zeros)).to(shape.dtype).transpose(1, 2).requires_grad_()

    return {
        'plain': [tensor(dim) for _ in range(3)],
        'V padded': [tensor(wide), tensor(wide), tensor(wide, zeros=wide - dim)],
        'V as it is': [tensor(wide), tensor(wide), tensor(dim)],
    }


def make_call(inputs: List[torch.Tensor], backend: Optional[SDPBackend], train: bool) -> Callable[[], Any]:
    """The forward, or the forward and the backward to all three inputs, as a function."""
    grad = torch.randn_like(inputs[2])  # the output has the width of V

    def forward():
        with torch.no_grad(), use(backend):
            return [F.scaled_dot_product_attention(*inputs, scale=1.)]

    def forward_backward():
        with use(backend):
            out = F.scaled_dot_product_attention(*inputs, scale=1.)
            return [out, *torch.autograd.grad(out, inputs, grad)]

    return forward_backward if train else forward


def default_backend(inputs: List[torch.Tensor]) -> str:
    """Name of the kernel that PyTorch chooses."""
    try:
        return SDPBackend(torch._fused_sdp_choice(*inputs, scale=1.)).name.lower()
    except (AttributeError, TypeError, ValueError):  # not public
        return 'unknown'


def largest_error(inputs: List[torch.Tensor], backend: Optional[SDPBackend]) -> float:
    """Relative error of the output and of the gradients against float64, for two of the images."""
    part = [x.detach()[:2].requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in part]  # float32 would be multiplied under TF32
    torch.manual_seed(0)  # the same gradient for both
    results = make_call(part, backend, train=True)()
    torch.manual_seed(0)
    grad = torch.randn_like(part[2]).double()
    out = F.softmax(exact[0] @ exact[1].transpose(-2, -1), dim=-1) @ exact[2]
    references = [out, *torch.autograd.grad(out, exact, grad)]
    return max(relative_error(r, e) for r, e in zip(results, references))


def try_backends(check: Check, shape: Shape, forms: Dict[str, List[torch.Tensor]]) -> Dict[str, Dict[str, Any]]:
    """Run each form by each backend once. Returns, by form, the backends that work; writes what does not."""
    working: Dict[str, Dict[str, Any]] = {}
    for form, inputs in forms.items():
        for name, backend in BACKENDS.items():
            problem = ''
            chosen = default_backend(inputs) if name == 'default' else name
            if 'cudnn' in chosen:
                check.data(f'{shape.name}, {form}, {name}', cudnn='started')  # it may kill the process
            try:
                error = largest_error(inputs, backend)
                tensors = make_call(inputs, backend, train=True)()
                if not all(bool(t.isfinite().all()) for t in tensors):
                    problem = 'not finite'
                elif not error <= WRONG[shape.dtype]:
                    problem = f'relative error {error:.2g}'
            except RuntimeError as e:
                if is_unsupported(e):
                    check.data(f'{shape.name}, {form}, {name}', supported=False)
                    continue
                problem, error = ' '.join(str(e).split())[:300], None
            failed_cudnn = bool(problem) and 'cudnn' in chosen
            check.data(
                f'{shape.name}, {form}, {name}', supported=True, problem=problem, relative_error=error,
                backend=chosen, cudnn_failed=failed_cudnn)
            working.setdefault(form, {})
            if not problem:
                working[form][name] = backend
    return working


def run(check: Check) -> None:
    for shape in shapes(check):
        if not check.has_time(shape.name, 0 if check.toy else 3):
            continue
        with check.part(shape.name):
            measure(check, shape)
    bias_shapes = [shape for shape in shapes(check) if shape.dtype == torch.bfloat16 and shape.tokens < 500]
    for shape in bias_shapes:
        if check.has_time(f'bias, {shape.name}', 0 if check.toy else 2):
            with check.part(f'bias, {shape.name}'):
                measure_bias(check, shape)


def measure(check: Check, shape: Shape) -> None:
    """Which backends work for a shape, and the speed of each."""
    torch.manual_seed(0)
    forms = make_inputs(shape, check)
    working = try_backends(check, shape, forms)
    broken = [form for form in forms if 'default' not in working.get(form, {})]
    check.row(f'forms that the default gets wrong, {shape.name}', len(broken), mark=at_most(0), forms=broken)
    chosen = {form: default_backend(inputs) for form, inputs in forms.items()}
    for train in (False, True):
        functions = {
            f'{form}, {name}': make_call(forms[form], backend, train)
            for form, backends in working.items() for name, backend in backends.items()
        }
        seconds = medians(functions, 1 if check.toy else 5, check.device, warmup=1)
        plain, padded = (seconds.get(f'{form}, default') for form in ('plain', 'V padded'))
        if plain and padded:
            check.row(
                f'{"forward and backward" if train else "forward"}, {shape.name}', plain / padded,
                'x plain attention', default=chosen, ms=milliseconds(seconds))


def measure_bias(check: Check, shape: Shape) -> None:
    """The scores as a constant bias beside the channels, for inference."""
    heads, tokens = HEADS[shape.model][0], shape.tokens
    forms = make_inputs(shape, check)
    aligned = torch.randn(1, heads, tokens, -(-tokens // 16) * 16, device=check.device, dtype=shape.dtype)
    masks = {'bias, aligned': aligned[..., :tokens], 'bias': aligned[..., :tokens].contiguous()}

    def with_bias(mask: torch.Tensor):
        with torch.no_grad():
            F.scaled_dot_product_attention(*forms['plain'], attn_mask=mask, scale=1.)

    functions: Dict[str, Callable[[], Any]] = {
        'V padded': make_call(forms['V padded'], None, train=False),
        'V as it is': make_call(forms['V as it is'], None, train=False),
        **{name: lambda mask=mask: with_bias(mask) for name, mask in masks.items()},
    }
    seconds = medians(functions, 1 if check.toy else 9, check.device)
    check.row(
        f'bias for inference, {shape.name}', seconds['V padded'] / seconds['bias, aligned'], 'x channels',
        ms=milliseconds(seconds))
