"""Phase 4: whole models against DeiT with as many heads and timm's ConViT: training step, inference, memory."""
import time
from typing import Any, Callable, Dict, Tuple

import timm
import torch
from attention import SIZES, step
from timing import medians

from .check import Check, at_least, milliseconds

MARKS = {True: at_least(0.97), False: at_least(0.98)}  # training, inference
CONVIT = at_least(2)


def make_models(size: str, check: Check) -> Dict[str, torch.nn.Module]:
    """DeiT with as many heads, DearKD and ConViT."""
    torch.manual_seed(0)
    toy: Dict[str, Any] = dict(depth=2, img_size=64) if check.toy else {}
    models = dict(
        deit=timm.create_model(f'deit_{size}_patch16_224', num_heads=SIZES[size][1], **toy),
        dearkd=timm.create_model(f'dearkd_{size}_patch16_224', **toy, **(dict(num_mhca_blocks=1) if toy else {})),
        convit=timm.create_model(f'convit_{size}', **toy),
    )
    return {name: model.to(check.device) for name, model in models.items()}


def make_images(batch_size: int, check: Check) -> torch.Tensor:
    side = 64 if check.toy else 224
    return torch.randn(batch_size, 3, side, side, device=check.device)


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of the parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def time_models(
        check: Check,
        models: Dict[str, torch.nn.Module],
        images: torch.Tensor,
        train: bool,
        rounds: int,
) -> Tuple[Dict[str, float], Dict[str, Any]]:
    """Median seconds of each model that fits into memory, and the peak memory of each in GiB, without the others."""
    autocast = check.precision(torch.bfloat16).autocast
    functions: Dict[str, Callable[[], Any]] = {}
    memory = {}
    for name, model in models.items():
        function = step(model, images, train, autocast)
        for other in models.values():
            other.zero_grad(set_to_none=True)
        others = sum(bytes_of(other) for key, other in models.items() if key != name) / 2 ** 30
        try:
            function()
            peak = check.peak_memory(function)
            memory[name] = None if peak is None else peak - others
        except torch.OutOfMemoryError:
            check.skip(f'{name}, batch {len(images)}', 'it does not fit into memory')
            check.free()
            continue
        functions[name] = function
    return medians(functions, rounds, check.device), memory


def compare(check: Check, name: str, models: Dict[str, torch.nn.Module], batch_size: int, train: bool) -> None:
    """Rows of one comparison: the speed relative to DeiT's and to ConViT's."""
    rounds = 1 if check.toy else 9 if batch_size > 32 else 25
    seconds, memory = time_models(check, models, make_images(batch_size, check), train, rounds)
    if 'dearkd' not in seconds:
        return
    details: Dict[str, Any] = dict(ms=milliseconds(seconds), peak_gib=memory)
    is_full = batch_size > 32 or check.toy
    label = f'{"training" if train else "inference"}, {name}, batch {batch_size}'
    for other, mark in (('deit', MARKS[train]), ('convit', CONVIT)):
        if other in seconds:
            check.row(
                label, seconds[other] / seconds['dearkd'], dict(deit='x DeiT', convit='x ConViT')[other],
                mark if is_full else None, is_speed=True, **details)


def run(check: Check) -> None:
    full = 2 if check.toy else 256
    sizes = ['tiny'] if check.toy else list(SIZES)
    for size in sizes:
        if check.has_time(f'{size}, eager', 0 if check.toy else 5 if size != 'base' else 12):
            with check.part(f'{size}, eager'):
                models = make_models(size, check)
                compare(check, f'{size}, eager', models, full, train=True)
                for batch_size in (full,) if check.toy else (full, 32, 1):
                    compare(check, f'{size}, eager', models, batch_size, train=False)
                del models
    estimate = 0. if check.toy else 30.  # seconds to compile and time two models of one size, for training
    for size in sizes:  # the largest last, which is dropped first
        for train in (True,) if check.toy else (True, False):
            name = f'{size}, compiled'
            label = f'{"training" if train else "inference"}, {name}'
            if not check.has_time(label, estimate if train else estimate / 2):
                continue
            start = time.monotonic()
            with check.part(label):
                compare_compiled(check, name, size, full, train)
            if not check.toy:
                estimate = 1.1 * (time.monotonic() - start) if train else estimate


def compare_compiled(check: Check, name: str, size: str, batch_size: int, train: bool) -> None:
    torch.compiler.reset()  # all of timm's ViTs count as one function, of which Dynamo compiles eight versions
    models = make_models(size, check)
    del models['convit']
    compiled: Dict[str, Any] = {
        key: torch.compile(model, backend=check.backend, dynamic=False) for key, model in models.items()}
    compare(check, name, compiled, batch_size, train)
