"""Check on one GPU what a CPU cannot show: kernels, precision, synchronisations, speed, memory, train.py, data_free.

Eight phases in processes of their own, 480 seconds in all. Each writes JSON lines into FOLDER/phaseN.jsonl as it goes,
so that a check that is cut off keeps what it has. A table comes last. It needs no network, and installs nothing.

    python benchmarks/gpu_check.py --out build/gpu-check
    python benchmarks/gpu_check.py --out build/gpu-check --phases 1 2   # again, these two alone
    python benchmarks/gpu_check.py --report build/gpu-check             # the tables into docs/performance.md
    python benchmarks/gpu_check.py --toy --out build/gpu-toy            # every phase on a CPU, at a toy size

Packages that are missing or too old are taken from `--wheels FOLDER` (`make gpu-check-wheels`). The status is 0 if
every phase ended and no figure failed, 1 if not, 2 if the check could not start.
"""
import argparse
import configparser
import gc
import importlib
import importlib.metadata
import logging
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, Callable, Container, Dict, List, NamedTuple, Optional

from gpu_phases import CUDNN_PHASES, NO_CUDNN, PHASES, WITHOUT_CUDNN_PHASES, Phase
from gpu_phases.report import (
    environment_of,
    has_cudnn_failure,
    is_toy,
    passes,
    phase_file,
    read_lines,
    render,
    write,
)

ROOT = Path(__file__).resolve().parent.parent
PERFORMANCE = ROOT / 'docs' / 'performance.md'
LEAST_SECONDS = 30.  # of a phase, for the first start of CUDA alone may take 10
# One import for all phases. The parent uses neither the GPU nor OpenMP's threads, so its children may
CONTEXT: Any = multiprocessing.get_context('fork')


class Job(NamedTuple):
    """A phase to run, and in which variant."""
    phase: Phase
    variant: str = ''


class Failure(Exception):
    """Why the check cannot start, in one line."""


def _normalize(name: str) -> str:
    return name.lower().replace('_', '-')


def missing_packages() -> Dict[str, str]:
    """Return the requirements that are not met here, such as 'timm': 'timm>=1.0.31 (1.0.20 is installed)'."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
    config = configparser.ConfigParser()
    config.read(ROOT / 'setup.cfg')
    missing = {}
    for text in config['options']['install_requires'].splitlines():
        if not text.strip() or text.lstrip().startswith('#'):
            continue
        requirement = Requirement(text)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing[_normalize(requirement.name)] = f'{text} (not installed)'
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing[_normalize(requirement.name)] = f'{text} ({version} is installed)'
    return missing


def unpack_wheels(folder: Path, place: Path, missing: Container[str]) -> None:
    """Make the wheels of missing packages importable, here and in every process started from here."""
    wheels = sorted(folder.glob('*.whl'))
    if not wheels:
        raise Failure(f'--wheels {folder} has no *.whl. Collect them with make gpu-check-wheels.')
    for wheel in wheels:
        if _normalize(wheel.name.partition('-')[0]) not in missing:
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(place)
    sys.path.insert(0, str(place))
    importlib.invalidate_caches()
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(place), os.environ.get('PYTHONPATH')]))


def import_packages(toy: bool) -> None:
    """Import what all phases need, once. Nothing here may touch the GPU.

    Raises:
        Failure: If something is missing.
    """
    missing = missing_packages()
    if missing:
        raise Failure(
            f'Missing here: {", ".join(missing.values())}. Collect their wheels where there is a network (make'
            ' gpu-check-wheels, or pip download --no-deps), and pass --wheels FOLDER.')
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    # An import that looks for a GPU asks the driver's NVML, and does not start CUDA, which would spoil every fork
    os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'
    try:
        for name in ('safetensors.torch', 'huggingface_hub', 'yaml', 'tqdm', 'PIL', 'timm.task', 'timm_dearkd.train'):
            importlib.import_module(name)
        for phase in PHASES:
            importlib.import_module(f'gpu_phases.{phase.module}')
        if toy:  # half of a toy compilation; with a GPU, not before the fork
            importlib.import_module('torch._dynamo.convert_frame')
            importlib.import_module('torch._functorch.aot_autograd')
    except ImportError as e:
        raise Failure(f'Could not import {e.name or "a module"}: {" ".join(str(e).split())}') from e
    gc.freeze()  # what is imported stays shared with the children


def driver_version() -> str:
    try:
        command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().split('\n')[0]
    except (OSError, subprocess.SubprocessError):
        return ''


def describe(device_type: str) -> Dict[str, Any]:
    """The card and the versions, for the first line of every phase."""
    import timm
    import torch

    import timm_dearkd
    versions: Dict[str, Any] = {
        'torch': torch.__version__, 'timm': timm.__version__, 'timm-dearkd': timm_dearkd.__version__,
        'Python': platform.python_version()}
    if device_type == 'cpu':
        return {'card': f'CPU ({platform.machine()})', **versions}
    if not torch.cuda.is_available():
        raise Failure(
            'PyTorch finds no CUDA device here. Use --toy to run every phase on the CPU, at a toy size.')
    properties = torch.cuda.get_device_properties(0)
    return {
        'card': properties.name,
        'memory': f'{properties.total_memory / 2 ** 30:.0f} GiB',
        'multiprocessors': properties.multi_processor_count,
        'compute capability': f'{properties.major}.{properties.minor}',
        'driver': driver_version(),
        'CUDA': torch.version.cuda,
        'cuDNN': torch.backends.cudnn.version(),
        **versions,
    }


def in_child(function: Callable[[], Any]) -> Any:
    """Return what a function gives in a forked process, so that this one never starts CUDA."""
    receiver, sender = CONTEXT.Pipe(duplex=False)

    def call() -> None:
        try:
            sender.send(function())
        except Exception as e:  # whatever a driver or a library says
            sender.send(e if isinstance(e, Failure) else Failure(f'{type(e).__name__}: {e}'))

    process = CONTEXT.Process(target=call)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = Failure('The process that looked for the GPU died. Does nvidia-smi work here?')
    process.join()
    if isinstance(result, Failure):
        raise result
    return result


class Runner:
    """Runs phases one after another, each in a process group of its own with a time limit.

    Args:
        folder: Where the lines go.
        budget: Seconds for all of them.
        toy: Use the size for the CPU.
        device_type: 'cuda' or 'cpu'.
        environment: See `describe`.
    """

    def __init__(self, folder: Path, budget: float, toy: bool, device_type: str, environment: Dict[str, Any]) -> None:
        self.folder = folder
        self.end = time.monotonic() + budget
        self.toy = toy
        self.device_type = device_type
        self.environment = environment
        self.process: Any = None

    def run(self, phases: List[Phase]) -> None:
        """Run the phases, and some of them a second time without cuDNN's attention if that failed."""
        queue = [Job(phase) for phase in phases]
        for job in queue:
            phase_file(self.folder, job.phase.number).unlink(missing_ok=True)
        again = [Job(job.phase, NO_CUDNN) for job in queue if job.phase.number in WITHOUT_CUDNN_PHASES]
        while queue:
            job = queue.pop(0)
            self.supervise(job, self.share(job, queue))
            if job.phase.number in CUDNN_PHASES and again and has_cudnn_failure(read_lines(self.folder)):
                queue, again = queue + again, []

    def share(self, job: Job, later: List[Job]) -> float:
        """Return the time limit of a phase in seconds: its share of the remaining time."""
        left = self.end - time.monotonic()
        part = job.phase.seconds / sum(j.phase.seconds for j in (job, *later))
        return min(left, max(LEAST_SECONDS, left * part))

    def status(self, job: Job, status: str, seconds: float = 0., reason: str = '') -> None:
        from gpu_phases.check import write_line
        write_line(
            phase_file(self.folder, job.phase.number), kind='status', phase=job.phase.number, variant=job.variant,
            name=job.phase.title, status=status, seconds=round(seconds, 1), reason=reason)
        if status != 'complete':
            print(f'[{job.phase.number}] {status}{f": {reason}" if reason else ""}', flush=True)

    def supervise(self, job: Job, seconds: float) -> None:
        """Run a phase until it ends or its time is over, and write how it ended."""
        if seconds < 5 and not self.toy or seconds <= 0:
            self.status(job, 'skipped', reason='no time is left')
            return
        print(f'[{job.phase.number}] {job.phase.title}{f", {job.variant}" if job.variant else ""}: {seconds:.0f} s')
        sys.stdout.flush()
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / 'log'
            self.process = CONTEXT.Process(target=self.be_phase, args=(job, start + seconds, log))
            self.process.start()
            status, reason = 'interrupted', ''
            try:
                self.process.join(seconds)
                code = self.process.exitcode
                if code is None:
                    status, reason = 'cut off', f'after {seconds:.0f} s'
                elif code == 0:
                    status = 'complete'
                else:
                    lines = log.read_text(errors='replace').strip().splitlines() if log.exists() else []
                    how = f'signal {-code}' if code < 0 else f'status {code}'
                    status, reason = 'died', f'{how}{f": {lines[-1][:300]}" if lines else ""}'
            finally:
                self.kill()
                self.status(job, status, time.monotonic() - start, reason)

    def kill(self) -> None:
        """End the phase and all that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has ended, or has not made its group yet
            self.process.kill()
        self.process.join()

    def be_phase(self, job: Job, end: float, log: Path) -> None:
        """Run a phase in this process."""
        import torch
        from gpu_phases.check import Check, die_with_parent
        os.setsid()
        die_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with open(log, 'ab') as f:
            os.dup2(f.fileno(), 2)
        sys.stderr = os.fdopen(2, 'w', closefd=False)
        logging.disable(logging.WARNING)
        if job.variant == NO_CUDNN:
            torch.backends.cuda.enable_cudnn_sdp(False)
        check = Check(
            job.phase.number, phase_file(self.folder, job.phase.number), self.device_type, self.toy, end - 1,
            job.variant)
        check.write('start', job.phase.title, environment=self.environment, toy=self.toy, device=self.device_type)
        importlib.import_module(f'gpu_phases.{job.phase.module}').run(check)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = [phase.number for phase in PHASES]
    parser.add_argument('--out', type=Path, metavar='FOLDER', help='where the JSON lines go')
    parser.add_argument('--phases', type=int, nargs='+', choices=numbers, default=numbers, help='phases to run (all)')
    parser.add_argument('--budget', type=float, default=480., help='seconds for all phases (default: 480)')
    parser.add_argument('--toy', action='store_true', help='a toy size, on the CPU')
    parser.add_argument('--device', choices=('cuda', 'cpu'), help='default: cuda, and cpu with --toy')
    parser.add_argument('--wheels', type=Path, metavar='FOLDER', help='wheels of packages that are missing here')
    parser.add_argument('--report', type=Path, metavar='FOLDER', help='write the tables of a check, and run nothing')
    parser.add_argument('--output', type=Path, metavar='FILE', help='where the tables go (docs/performance.md)')
    return parser


def report(folder: Path, output: Optional[Path]) -> None:
    """Write the tables of a folder into a document.

    Raises:
        Failure: If it is of a toy run, and no document is named.
    """
    lines = read_lines(folder)
    if (is_toy(lines) or environment_of(lines).get('card', '').startswith('CPU')) and output is None:
        raise Failure(f'{folder} is of a toy run, which does not belong in docs/performance.md. Set --output FILE.')
    write(render(lines, with_details=True), output or PERFORMANCE)
    print(f'Wrote {output or PERFORMANCE}')


def run_check(args: argparse.Namespace) -> int:
    """Run the phases and print the table. Returns the status."""
    def stop(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    device_type = args.device or ('cpu' if args.toy else 'cuda')
    if device_type == 'cpu' and not args.toy:
        raise Failure('The full size is for a GPU. Add --toy for a CPU.')
    start = time.monotonic()
    sys.path.insert(0, str(ROOT))
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        if args.wheels:
            unpack_wheels(args.wheels, Path(place), missing_packages())
        import_packages(args.toy)
        environment = in_child(lambda: describe(device_type))
        budget = args.budget - (time.monotonic() - start)
        runner = Runner(args.out, budget, args.toy, device_type, environment)
        try:
            runner.run([phase for phase in PHASES if phase.number in args.phases])
        finally:
            lines = [line for line in read_lines(args.out) if line['phase'] in args.phases]
            print(f'\n{render(lines)}\n{time.monotonic() - start:.0f} s in all.', flush=True)
    return 0 if passes(lines) else 1


def main(argv: Optional[List[str]] = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if (args.out is None) == (args.report is None):
        parser.error('Give --out FOLDER to run the check, or --report FOLDER to write its tables.')
    try:
        if args.report:
            report(args.report, args.output)
            return 0
        return run_check(args)
    except (Failure, FileNotFoundError, ImportError, ValueError) as e:
        parser.exit(2, f'{parser.prog}: {e}\n')


if __name__ == '__main__':
    sys.exit(main())
