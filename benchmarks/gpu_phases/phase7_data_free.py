"""Phase 7: gradients of the BatchNorm statistics; a step of data_free against the forward and backward of the CNN."""
import copy
import time
from typing import Any, List, NamedTuple, Optional

import timm
import torch
import torch.nn as nn
from inversion import make_bare, make_step
from timing import medians

from timm_dearkd.data_free.losses import BatchNormStats

from .check import Check, at_most, milliseconds, relative_error

BATCH = 42  # the paper's
LAYOUTS = (torch.channels_last, torch.contiguous_format)  # data_free's, and that of --no-channels-last


class Case(NamedTuple):
    """A CNN at a size and in a precision."""
    model: str
    size: int
    dtype: Optional[torch.dtype]
    compiled: bool

    @property
    def name(self) -> str:
        dtype = str(self.dtype or torch.float32).removeprefix('torch.')
        return f'{self.model}, {self.size} pixels, {dtype}, {"compiled" if self.compiled else "eager"}'


def cases(check: Check) -> List[Case]:
    """Return the measurements, the least important last."""
    if check.toy:
        return [Case('test_resnet', 32, torch.bfloat16, True)]
    half = torch.bfloat16
    return [
        Case('resnet50', 112, half, False),
        Case('resnet50', 112, half, True),
        Case('resnet50', 224, half, False),
        Case('resnet50', 112, None, False),
        Case('resnet50', 224, None, False),
        Case('resnet50', 224, half, True),
        Case('regnety_160', 224, half, False),
        Case('regnety_160', 224, None, False),
        Case('regnety_160', 224, half, True),
    ]


def run(check: Check) -> None:
    with check.part('BatchNorm statistics'):
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            errors = {str(layout).removeprefix('torch.'): statistics_error(check, dtype, layout) for layout in LAYOUTS}
            check.row(
                f'gradient of the BatchNorm statistics, {str(dtype).removeprefix("torch.")}', max(errors.values()),
                'relative to float64', at_most(bound), **errors)
    estimate = 0. if check.toy else 15.  # seconds to compile a step
    for case in cases(check):
        needed = 0 if check.toy else estimate if case.compiled else 3
        if check.has_time(case.name, needed):
            start = time.monotonic()
            with check.part(case.name):
                measure(check, case)
            if case.compiled:
                estimate = max(estimate, time.monotonic() - start)


def statistics_error(check: Check, dtype: torch.dtype, layout: torch.memory_format) -> float:
    """Error of an input's gradient by the device's own kernel against autograd in float64."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(16).to(check.device).eval()
    nn.init.normal_(layer.running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(layer.running_var, 0.5, 2.)  # type: ignore[arg-type]
    x = 2 * torch.randn(8, 16, 9, 9, device=check.device) + 1
    x = x.to(dtype, memory_format=layout).requires_grad_()
    weight = torch.randn_like(x, dtype=torch.float32)
    with BatchNormStats(layer) as stats:
        output = layer(x)
        (stats.loss() + 0.1 * (output.float() * weight).sum()).backward()
    exact, slow = x.detach().double().requires_grad_(), copy.deepcopy(layer).double()
    mean = exact.mean((0, 2, 3))
    var = (exact - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
    loss = (mean - slow.running_mean).norm() + (var - slow.running_var).norm()
    (loss + 0.1 * (slow(exact) * weight).sum()).backward()
    assert x.grad is not None and exact.grad is not None
    return relative_error(x.grad, exact.grad)


def measure(check: Check, case: Case) -> None:
    """The step with its statistics, priors, Adam, shift and flip, against the bare forward and backward."""
    batch = 2 if check.toy else BATCH
    torch.manual_seed(0)
    precision = check.precision(case.dtype)
    targets = torch.randint(1000, (batch,), device=check.device)
    backend = check.backend if case.compiled else None

    def model() -> Any:
        cnn = timm.create_model(case.model).to(check.device).to(memory_format=torch.channels_last).eval()
        return cnn.requires_grad_(False)

    def images() -> torch.Tensor:
        x = torch.randn(batch, 3, case.size, case.size, device=check.device)
        return x.contiguous(memory_format=torch.channels_last).requires_grad_()

    functions = dict(
        bare=make_bare(model(), images(), targets, precision, backend),
        step=make_step(model(), images(), targets, precision, True, backend),
    )
    seconds = medians(functions, 1 if check.toy else 7, check.device)
    check.row(
        f'step of data_free, {case.name}', seconds['step'] / seconds['bare'], 'x bare',
        at_most(1.25) if case.compiled else None, is_speed=True, ms=milliseconds(seconds))
