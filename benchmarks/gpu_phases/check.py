"""The tools of a phase: device, remaining time, and the lines that it writes."""
import contextlib
import ctypes
import gc
import json
import math
import signal
import time
import traceback
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

import torch

from timm_dearkd.engine.process import Precision, find_device


@dataclass(frozen=True)
class Mark:
    """A bound that a value has to keep."""
    sign: str
    bound: float

    def __str__(self) -> str:
        return f'{self.sign} {self.bound:g}'

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.sign == '<=' else value >= self.bound


def at_least(bound: float) -> Mark:
    return Mark('>=', bound)


def at_most(bound: float) -> Mark:
    return Mark('<=', bound)


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by None."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def die_with_parent() -> None:
    """Have Linux kill this process when the one that started it is gone."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def write_line(path: Path, **fields: Any) -> None:
    """Append a line of JSON, which is in the file when this returns."""
    with open(path, 'a') as f:
        f.write(json.dumps(_finite(fields), allow_nan=False) + '\n')


class Check:
    """A phase in progress.

    Lines are of a `kind`: 'row' (a figure of the table), 'data' (more figures, for whoever reads the JSON), 'skip' (not
    measured, with the reason) and 'error' (a part that failed; the phase continues).

    Args:
        phase: Number of the phase.
        path: File of its lines.
        device_type: 'cuda' or 'cpu'. Nothing touches the device before `device` is read, so a phase can fork first.
        toy: Use the size for the CPU. Speeds are then not judged.
        deadline: When the time is over, on the clock `time.monotonic`.
        variant: How this run of the phase differs from the usual one.
    """

    def __init__(
            self,
            phase: int,
            path: Path,
            device_type: str = 'cpu',
            toy: bool = True,
            deadline: float = math.inf,
            variant: str = '',
    ) -> None:
        self.phase = phase
        self.path = path
        self.device_type = device_type
        self.toy = toy
        self.deadline = deadline
        self.variant = variant

    @cached_property
    def device(self) -> torch.device:
        """The device, with the settings that train.py makes for it."""
        return find_device(self.device_type)

    @property
    def is_cuda(self) -> bool:
        return self.device_type == 'cuda'

    @property
    def backend(self) -> str:
        """Backend of `torch.compile`: at the toy size, the one that only traces."""
        return 'eager' if self.toy else 'inductor'

    def precision(self, dtype: Optional[torch.dtype]) -> Precision:
        return Precision(self.device, dtype)

    def write(self, kind: str, name: str, **fields: Any) -> None:
        write_line(self.path, kind=kind, phase=self.phase, variant=self.variant, name=name, **fields)

    def row(
            self,
            name: str,
            value: float,
            unit: str = '',
            mark: Optional[Mark] = None,
            expected: str = '',
            is_speed: bool = False,
            **details: Any,
    ) -> None:
        """Write a figure of the table.

        Args:
            name: What was measured.
            value: The figure. One that is not finite fails.
            unit: Its unit.
            mark: The bound it has to keep; None only shows the figure.
            expected: What to expect, where there is no mark.
            is_speed: A speed, whose mark does not count at the toy size.
            **details: Further figures, by name.
        """
        value = float(value)
        judged = mark is not None and not (is_speed and self.toy)
        ok = False if not math.isfinite(value) else mark.holds(value) if judged and mark is not None else None
        self.write(
            'row', name, value=value, unit=unit, expected=str(mark) if mark else expected, ok=ok, details=details)
        verdict = '' if ok is None else '  pass' if ok else '  FAIL'
        print(f'[{self.phase}] {name}: {value:.4g} {unit}{verdict}', flush=True)

    def data(self, name: str, **fields: Any) -> None:
        """Write figures that are not in the table."""
        self.write('data', name, **fields)

    def skip(self, name: str, reason: str) -> None:
        """Write a skipped measurement and the reason."""
        self.write('skip', name, reason=reason)
        print(f'[{self.phase}] {name}: skipped, {reason}', flush=True)

    def has_time(self, name: str, seconds: float) -> bool:
        """Return whether a part that takes about so many seconds fits in. If not, it is written as skipped."""
        left = self.deadline - time.monotonic()
        if left < seconds:
            self.skip(name, f'{max(0., left):.0f} s left, it needs about {seconds:.0f} s')
        return left >= seconds

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Run a part of the phase. If it fails, write why and let the phase continue."""
        try:
            yield
        except Exception as e:  # whatever a kernel or a compiler raises
            reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:500]
            frames = traceback.extract_tb(e.__traceback__)
            where = [f'{Path(frame.filename).name}:{frame.lineno} {frame.name}' for frame in frames[-8:]]
            self.write('error', name, reason=reason, where=where)
            print(f'[{self.phase}] {name}: {reason}', flush=True)
        finally:
            self.free()

    def free(self) -> None:
        """Give the memory of the part before back to the device."""
        if self.is_cuda and torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.empty_cache()

    def peak_memory(self, function: Any) -> Optional[float]:
        """Return the peak memory of a call in GiB; None on a CPU."""
        if not self.is_cuda:
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        function()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) / 2 ** 30


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the norm of the error relative to the norm of the exact value, in float64."""
    result, exact = result.detach().double(), exact.detach().double()
    return ((result - exact).norm() / exact.norm()).item()


def milliseconds(seconds: Dict[str, float]) -> Dict[str, float]:
    """Return times by name in milliseconds, with few digits."""
    return {name: float(f'{1e3 * value:.4g}') for name, value in seconds.items()}
