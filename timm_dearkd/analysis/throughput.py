"""Speed and cost of models side by side: images/s, latency, memory, parameters and multiply-adds (table 3)."""
import argparse
import contextlib
import copy
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator, List, Optional

import timm
import torch
import torch.nn as nn
from timm.data import resolve_model_data_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from timm_dearkd.engine.device import check_backend, find_device
from timm_dearkd.files import write_bytes, write_table

from .figures import new_figure, plain, render
from .inputs import add_output_arguments, check_counts, output_files

__all__ = ['Measurement', 'count_macs', 'measure_throughput', 'plot_throughput']

MIB = 2 ** 20


@dataclass
class Measurement:
    """A model at a batch size. Speeds are None where the device has too little memory.

    Args:
        name: Of the model.
        batch_size: Images at a time.
        params: Number of parameters.
        macs: Multiply-adds for an image.
        peak_memory: Bytes of the weights and of what a forward allocates; None on other devices than CUDA.
        seconds: Of a forward, for each round.
        ratios: Speed relative to the first model at this batch size, for each round.
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
        """Median seconds of a batch."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def images_per_second(self) -> Optional[float]:
        return self.batch_size / self.latency if self.latency else None

    @property
    def ratio(self) -> Optional[float]:
        """Median over the rounds of the speed relative to the first model's in the same round."""
        return statistics.median(self.ratios) if self.ratios else None


def count_macs(model: nn.Module, image: torch.Tensor) -> int:
    """Multiply-adds of the matrix products and convolutions for one image (1, C, H, W), attention included."""
    counter = FlopCounterMode(display=False)
    # its module tracker trips over parameters that are inputs of modules
    model = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(image)
    return counter.get_total_flops() // 2


def _peak_memory(forward: Callable[[], Any], device: torch.device) -> Optional[int]:
    """Return the bytes that a forward allocates at its peak on a CUDA device; None on another."""
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
    """Time the forward of models in turns, round by round, so that what slows the machine slows them alike.

    Args:
        names: timm names. Weights are random, for speed does not depend on them.
        batch_size: Images at a time.
        device: Where they run.
        img_size: Side length in pixels; None is each model's own.
        rounds: Turns of each model.
        seconds: Length of a turn, about.
        dtype: Of weights and images.
        compile_backend: For `torch.compile`; None runs eagerly.
        channels_last: Memory format of the images.

    Returns:
        One for each model.

    Raises:
        ValueError: An unknown model, a size that it does not take, or one that can't be compiled.
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
    """Compile every model for its own batch size, however many there are and whatever was compiled before."""
    if backend is None:
        yield
        return
    from torch._dynamo import config  # slow to import
    torch.compiler.reset()  # else the sizes of an earlier call turn into dynamic shapes
    with config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
        yield


def _prepare(name, batch_size, device, img_size, dtype, compile_backend, memory_format):
    """A model's forward, run once, and its measurement without the times; no forward where the memory is too small."""
    try:
        try:
            model: Any = timm.create_model(name, **({} if img_size is None else {'img_size': img_size})).eval()
        except TypeError:  # CNNs know no img_size
            model = timm.create_model(name).eval()
        chans, *size = resolve_model_data_config(model)['input_size']
        size = [img_size or side for side in size]
        macs = count_macs(model, torch.zeros(1, chans, *size))
    except (AssertionError, RuntimeError, ValueError) as e:
        what = f' does not take images of {img_size}x{img_size}' if img_size else ' can not be made'
        raise ValueError(f'{name!r}{what}: {" ".join(str(e).split())}') from e
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
        if "can't allocate memory" in str(e):  # what a CPU says
            return None, result
        raise ValueError(f'{name!r} can not run: {" ".join(str(e).split())[:300]}') from e
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    result.peak_memory = None if peak is None else peak + weights
    return forward, result


def _time(forward: Callable[[], Any], count: int, device: torch.device) -> float:
    """Seconds of a forward, the mean of a few."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        forward()
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
    return (time.perf_counter() - start) / count


def plot_throughput(results: List[Measurement]) -> Any:
    """A figure: images/s over the batch size, or a bar for each model where there is one batch size."""
    figure, ((axes,),) = new_figure(size=(7, 3.6))
    sizes = sorted({result.batch_size for result in results})
    names = list(dict.fromkeys(result.name for result in results))
    if len(sizes) == 1:
        axes.barh([plain(name) for name in names], [result.images_per_second or 0. for result in results], color='C0')
        axes.invert_yaxis()
        axes.set(xlabel=f'images/s, batch size {sizes[0]}')
        axes.grid(alpha=0.3, axis='x')
        return figure
    for name in names:
        points = [(r.batch_size, r.images_per_second) for r in results if r.name == name and r.seconds]
        if points:
            axes.plot(*zip(*points), marker='o', label=plain(name))
    axes.set(xlabel='batch size', ylabel='images/s', ylim=(0, None), xscale='log', xticks=sizes, xticklabels=sizes)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add('models', nargs='+', metavar='NAME', help='timm names; ratios are to the first')
    add('-b', '--batch-size', type=int, nargs='+', default=[32], metavar='N')
    add('--img-size', type=int, metavar='N', help="side length of the images (each model's own)")
    add('--rounds', type=int, default=5, help='turns of each model')
    add('--seconds', type=float, default=1., help='length of a turn')
    add('--dtype', default='float32', choices=('float32', 'float16', 'bfloat16'))
    add('--channels-last', action='store_true')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the models')
    add('--device', help='cuda, cpu, ... (the accelerator there is, else the CPU)')
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
    """The command: a table, the same as CSV, and a picture, written anew after each batch size."""
    check_counts(args, 'batch_size', 'img_size', 'rounds')
    if not 0 < args.seconds < math.inf:
        raise ValueError(f'--seconds {args.seconds}, expected more than 0.')
    unknown = [name for name in args.models if ':' not in name and not timm.is_model(name)]
    if unknown:
        raise ValueError(f'timm knows no {unknown[0]!r}. timm.list_models("*NAME*") lists what there is.')
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
