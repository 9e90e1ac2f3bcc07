"""Phase 7: a step of data_free against the forward and backward of the bare CNN."""
import time
from typing import Any, List, NamedTuple, Optional

import timm
import torch
from inversion import make_bare, make_step
from timing import medians

from .check import Check, at_most, milliseconds

BATCH = 42  # the paper's


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
    estimate = 0. if check.toy else 15.  # seconds to compile a step
    for case in cases(check):
        needed = 0 if check.toy else estimate if case.compiled else 3
        if check.has_time(case.name, needed):
            start = time.monotonic()
            with check.part(case.name):
                measure(check, case)
            if case.compiled:
                estimate = max(estimate, time.monotonic() - start)


def measure(check: Check, case: Case) -> None:
    """The step with its statistics, priors and Adam, against the bare forward and backward."""
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
