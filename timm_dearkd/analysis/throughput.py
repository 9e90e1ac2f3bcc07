"""Speed and cost of models: images/s, latency, memory, multiply-adds (table 3)."""
import argparse
import contextlib
import copy
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
from timm.data.model_config import resolve_input_data_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from distill_hooks import resolve_model
from distill_hooks.errors import one_line
from timm_dearkd.commands import POSITIVE_INT, add_device
from timm_dearkd.engine.process import check_backend, find_device
from timm_dearkd.files import write_bytes, write_table

from .figures import escape_label, new_figure, render
from .inputs import add_output_arguments, output_files

MIB = 2 ** 20


@dataclass
class Measurement:
    """Speed and cost of a model at a batch size; no speed if it ran out of memory.

    Args:
        name: Name of the model.
        batch_size: Images per batch.
        params: Number of parameters.
        macs: Multiply-adds per image.
        peak_memory: Bytes of the weights and of the allocations of a forward; None on devices other than CUDA.
        seconds: Seconds per batch, in each round.
        ratios: Speed relative to the first model, in each round.
    """
    name: str
    batch_size: int
    params: int
    macs: int
    peak_memory: Optional[int] = None
    seconds: List[float] = field(default_factory=list)
    ratios: List[float] = field(default_factory=list)

    @property
    def latency(self) -> Optional[float]:
        """Median seconds per batch."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def images_per_second(self) -> Optional[float]:
        """Images per second at the median latency."""
        return self.batch_size / self.latency if self.latency else None

    @property
    def ratio(self) -> Optional[float]:
        """Median over the rounds of the speed relative to the first model."""
        return statistics.median(self.ratios) if self.ratios else None


def count_macs(model: nn.Module, image: torch.Tensor) -> int:
    """Return the multiply-adds of a forward of one image (1, C, H, W).

    They are those of convolutions and matrix products, attention included.
    """
    counter = FlopCounterMode(display=False)
    # the counter's module tracker fails on parameters that are inputs of modules and need gradients
    model = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(image)
    return counter.get_total_flops() // 2


def _peak_memory(forward: Callable[[], Any], device: torch.device) -> Optional[int]:
    """Return the peak bytes that a forward allocates on CUDA; None on other devices."""
    if device.type != 'cuda':
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    forward()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure_throughput(
        names: List[str],
        batch_size: int,
        device: torch.device,
        img_size: Optional[int] = None,
        rounds: int = 5,
        seconds: float = 1.,
        dtype: torch.dtype = torch.float32,
        compile_backend: Optional[str] = None,
        channels_last: bool = False,
) -> List[Measurement]:
    """Time the forward of models.

    The models take turns in each round, so that other load on the machine affects them alike.

    Args:
        names: timm names or run folders. Weights are random, because speed does not depend on them.
        batch_size: Images per batch.
        device: Device of the models.
        img_size: Side length in pixels; None is each model's own.
        rounds: Turns of each model.
        seconds: Approximate seconds per turn.
        dtype: Type of weights and images.
        compile_backend: Backend of `torch.compile`; None runs eagerly.
        channels_last: Use the channels_last memory format.

    Returns:
        A measurement for each model.

    Raises:
        ValueError: If a model is unknown, does not take the size, or cannot run.
    """
    with _compiles_each(compile_backend):
        forwards, results = [], []
        for name in tqdm(names, desc='Prepare', unit='model', leave=False, disable=None):
            forward, result = _prepare(
                name, batch_size, device, img_size, dtype, compile_backend,
                torch.channels_last if channels_last else torch.contiguous_format)
            forwards.append(forward)
            results.append(result)
        repeats = [0 if forward is None else max(1, round(seconds / _time(forward, 1, device))) for forward in forwards]
        for _ in tqdm(range(rounds), desc=f'Batch size {batch_size}', unit='round', leave=False, disable=None):
            for forward, result, count in zip(forwards, results, repeats):
                if forward is not None:
                    result.seconds.append(_time(forward, count, device))
                    if results[0].seconds:
                        result.ratios.append(results[0].seconds[-1] / result.seconds[-1])
        return results


@contextlib.contextmanager
def _compiles_each(backend: Optional[str]) -> Iterator[None]:
    """Make `torch.compile` compile each model and batch size with static shapes."""
    if backend is None:
        yield
        return
    from torch._dynamo import config  # slow to import
    torch.compiler.reset()  # else sizes of earlier calls become dynamic shapes
    limit = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'  # its name in PyTorch 2.6
    with config.patch({limit: 1000, f'accumulated_{limit}': 1000}):
        yield


def _prepare(
        name: str,
        batch_size: int,
        device: torch.device,
        img_size: Optional[int],
        dtype: torch.dtype,
        compile_backend: Optional[str],
        memory_format: torch.memory_format,
) -> Tuple[Optional[Callable[[], Any]], Measurement]:
    """Create a model and run it once; return its forward and a measurement.

    The forward is None if the device has too little memory. See `measure_throughput`.
    """
    source, _ = resolve_model(name)
    try:
        try:
            kwargs: Dict[str, Any] = {} if img_size is None else {'img_size': img_size}
            model: Any = timm.create_model(source, **kwargs).eval()
        except TypeError:  # CNNs have no argument img_size
            model = timm.create_model(source).eval()
        chans, *size = resolve_input_data_config(model)['input_size']
        size = [img_size or side for side in size]
        macs = count_macs(model, torch.zeros(1, chans, *size))
    except (AssertionError, RuntimeError, ValueError) as e:
        problem = f'does not take images of {img_size}x{img_size}' if img_size else 'cannot be created'
        raise ValueError(f'{name!r} {problem}: {one_line(e)}') from e
    result = Measurement(name, batch_size, sum(p.numel() for p in model.parameters()), macs)
    try:
        model = model.to(device=device, dtype=dtype, memory_format=memory_format)
        images = torch.randn(batch_size, chans, *size, device=device, dtype=dtype).to(memory_format=memory_format)
        run = torch.compile(model, backend=compile_backend, dynamic=False) if compile_backend else model

        def forward() -> Any:
            with torch.inference_mode():
                return run(images)

        forward()
        peak = _peak_memory(forward, device)
    except torch.OutOfMemoryError:
        return None, result
    except RuntimeError as e:
        if "can't allocate memory" in str(e):  # out of memory on a CPU
            return None, result
        raise ValueError(f'{name!r} cannot run: {one_line(e)}') from e
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    result.peak_memory = None if peak is None else peak + weights
    return forward, result


def _time(forward: Callable[[], Any], count: int, device: torch.device) -> float:
    """Return the mean seconds of `count` forwards."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        forward()
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    return (time.perf_counter() - start) / count


def plot_throughput(results: List[Measurement]) -> Any:
    """Plot images/s by batch size; for a single batch size, a bar for each model."""
    figure, ((axes,),) = new_figure(size=(7, 3.6))
    sizes = sorted({result.batch_size for result in results})
    names = list(dict.fromkeys(result.name for result in results))
    if len(sizes) == 1:
        speeds = [result.images_per_second or 0. for result in results]
        axes.barh([escape_label(name) for name in names], speeds, color='C0')
        axes.invert_yaxis()
        axes.set(xlabel=f'images/s, batch size {sizes[0]}')
        axes.grid(alpha=0.3, axis='x')
        return figure
    for name in names:
        points = [(r.batch_size, r.images_per_second) for r in results if r.name == name and r.seconds]
        if points:
            axes.plot(*zip(*points), marker='o', label=escape_label(name))
    axes.set(xlabel='batch size', ylabel='images/s', ylim=(0, None), xscale='log', xticks=sizes, xticklabels=sizes)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the tool."""
    add = parser.add_argument
    add('models', nargs='+', metavar='NAME', help='timm names or run folders; speed ratios are relative to the first')
    add('-b', '--batch-size', type=POSITIVE_INT, nargs='+', default=[32], metavar='N',
        help='images per batch (default: 32)')
    add('--img-size', type=POSITIVE_INT, metavar='N', help="side length of the images in pixels (default: the model's)")
    add('--rounds', type=POSITIVE_INT, default=5, metavar='N', help='turns of each model (default: %(default)s)')
    add('--seconds', type=float, default=1., metavar='S', help='approximate seconds per turn (default: %(default)s)')
    add('--dtype', default='float32', choices=('float32', 'float16', 'bfloat16'),
        help='type of weights and images (default: %(default)s)')
    add('--channels-last', action='store_true', help='use the channels_last memory format')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND',
        help='compile the models (BACKEND: inductor; default: off)')
    add_device(parser)
    add_output_arguments(parser, 'throughput')


COLUMNS = ('model', 'batch', 'images/s', 'ratio', 'latency, ms', 'peak memory, MiB', 'parameters, M', 'GMACs')


def _cells(result: Measurement) -> List[str]:
    def number(value: Optional[float], places: int, scale: float = 1.) -> str:
        return '' if value is None else f'{value * scale:.{places}f}'

    speed = result.images_per_second
    return [
        result.name, str(result.batch_size), 'out of memory' if speed is None else number(speed, 1),
        number(result.ratio, 2), number(result.latency, 2, 1000), number(result.peak_memory, 0, 1 / MIB),
        number(result.params, 2, 1e-6), number(result.macs, 2, 1e-9)]


def run(args: argparse.Namespace) -> None:
    """Print a table; write it as CSV and a plot after each batch size."""
    if not 0 < args.seconds < math.inf:
        raise ValueError(f'--seconds {args.seconds}, expected more than 0.')
    for name in args.models:
        if resolve_model(name)[1]:
            raise ValueError(f'{name!r} is a file, expected a timm name or a run folder. Give the folder of its run.')
    check_backend(args.torchcompile)
    new_figure()
    table, picture = output_files(args, 'throughput', args.models[0], '.csv', '.png')
    device = find_device(args.device)
    results: List[Measurement] = []
    print('| ' + ' | '.join(COLUMNS) + ' |\n' + '| --- ' * len(COLUMNS) + '|')
    for batch_size in args.batch_size:
        measured = measure_throughput(
            args.models, batch_size, device, args.img_size, args.rounds, args.seconds, getattr(torch, args.dtype),
            args.torchcompile, args.channels_last)
        results += measured
        for result in measured:
            print('| ' + ' | '.join(_cells(result)) + ' |', flush=True)
        write_table(table, [COLUMNS, *map(_cells, results)])
        write_bytes(picture, render(plot_throughput(results)))
    where = f'{device}, {torch.get_num_threads()} threads' if device.type == 'cpu' else str(device)
    if device.type == 'cuda':
        where = f'{torch.cuda.get_device_name(device)}, TF32 for float32'
    print(f'\n{where}; {args.dtype}, {args.torchcompile or "eager"}; medians of {args.rounds} rounds.'
          f' {table}, {picture}')
