"""Timing of functions side by side, for the benchmarks."""
import statistics
import time
from typing import Callable, Dict

import torch


def elapsed(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call: CUDA events on a GPU, core-seconds on a CPU (other programs do not count)."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    if device.type == 'cpu':
        begin = time.process_time()
        function()
        return time.process_time() - begin
    torch.accelerator.synchronize()
    begin = time.perf_counter()
    function()
    torch.accelerator.synchronize()
    return time.perf_counter() - begin


def medians(
        functions: Dict[str, Callable[[], object]],
        rounds: int,
        device: torch.device,
        warmup: int = 2,
) -> Dict[str, float]:
    """Return the median seconds of each function, run in turns after some uncounted rounds."""
    times: Dict[str, list] = {name: [] for name in functions}
    for i in range(rounds + warmup):
        for name, function in functions.items():
            seconds = elapsed(function, device)
            if i >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(t) for name, t in times.items()}
