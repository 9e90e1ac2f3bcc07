"""Timing of functions side by side, for the benchmarks."""
import statistics
import time
from typing import Callable, Dict


def medians(functions: Dict[str, Callable[[], None]], rounds: int, sync: Callable[[], None]) -> Dict[str, float]:
    """Median seconds of each function, run in turns after two uncounted rounds."""
    times = {name: [] for name in functions}
    for i in range(rounds + 2):
        for name, function in functions.items():
            sync()
            start = time.perf_counter()
            function()
            sync()
            if i > 1:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}
