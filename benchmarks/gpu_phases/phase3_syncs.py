"""Phase 3: no step waits for the GPU between two log lines; DDP with nccl; CUDA graphs."""
import contextlib
import os
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist
from timm.data.random_erasing import RandomErasing
from train_step import make_trainer

from timm_dearkd.engine.loop import Trainer
from timm_dearkd.engine.options import build_parser, resolve_args
from timm_dearkd.engine.seeding import SeededErasing

from .check import Check, at_most
from .tasks import STAGE_1, STAGE_2, make_batches, make_dearkd, make_student_task

SYNC = 'called a synchronizing CUDA operation'


class Erased:
    """Batches with random erasing on the device, as timm's prefetcher applies it."""

    def __init__(self, batches: List[Tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> None:
        self.batches = batches
        erasing = RandomErasing(probability=0.5, mode='pixel', device=device)
        self.erase = SeededErasing(erasing, seed=0, device=device)

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.erase.set_epoch(epoch, first_batch)

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for images, target in self.batches:
            yield self.erase(images.clone()), target


def sizes(check: Check) -> Dict[str, Any]:
    """The models of this phase: shallow ones, because a wait of the host shows at any depth."""
    if check.toy:
        return dict(student='test_dearkd', teacher='test_resnet', size=32, depth=2, num_mhca_blocks=1)
    return dict(student='dearkd_tiny_patch16_224', teacher='regnety_002', size=224, depth=3, num_mhca_blocks=2)


def count_syncs(trainer: Trainer, check: Check, mode: str) -> Tuple[float, str]:
    """Synchronisations per update, from the second update to the last but one, which have no log line.

    Args:
        trainer: With more than two updates and no log line among them.
        check: The phase.
        mode: 'error' stops at the first one and tells where it is; 'warn' counts them.

    Returns:
        The count, and where the first one is.
    """
    trainer.train_epoch(0)  # the first step makes states, and chooses kernels
    set_mode = torch.cuda.set_sync_debug_mode if check.is_cuda else lambda mode: None

    def on_update(epoch: int, update: int, last: bool) -> None:
        if update == 1:
            set_mode(mode)
        elif update == trainer.num_updates - 1:
            set_mode('default')

    trainer.on_update = on_update
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            trainer.train_epoch(1)
        except RuntimeError as e:
            if SYNC not in str(e):
                raise
            frames = traceback.extract_tb(e.__traceback__)
            return 1., ' < '.join(f'{Path(f.filename).name}:{f.lineno} {f.name}' for f in reversed(frames[-5:]))
        finally:
            set_mode('default')
    syncs = [w for w in caught if SYNC in str(w.message)]
    where = f'{Path(syncs[0].filename).name}:{syncs[0].lineno}' if syncs else ''
    return len(syncs) / (trainer.num_updates - 2), where


def run(check: Check) -> None:
    with check.part('synchronisations'):
        synchronisations(check)
    if check.has_time('DDP, compiled', 0 if check.toy else 12):
        with check.part('DDP, compiled'):
            ddp(check)
    with check.part('CUDA graphs'):
        cuda_graphs(check)


def synchronisations(check: Check) -> None:
    """Stage I and II with accumulation, EMA, clipping and erasing."""
    kinds = [
        ('stage I, AdamW', STAGE_1, 'adamw', torch.bfloat16),
        ('stage II, AdamW', STAGE_2, 'adamw', torch.bfloat16),
        ('stage I, AdamW, float16', STAGE_1, 'adamw', torch.float16),
        # No fused step: the flag that all is finite is read once per update
        ('stage I, lamb', STAGE_1, 'lamb', torch.bfloat16),
    ]
    models = sizes(check)
    for name, epoch, opt, dtype in kinds[1::2] if check.toy else kinds:
        if not check.has_time(name, 0 if check.toy else 2):
            continue
        with check.part(name):
            task = make_dearkd(check, amp=False, epoch=epoch, **models)
            task.setup_ema(decay=0.99)
            batches = Erased(make_batches(check, 10, 4 if check.toy else 64, models['size']), check.device)
            trainer = make_trainer(
                task, batches, check.precision(dtype), opt, grad_accum_steps=2, log_interval=1000)
            is_fused = opt == 'adamw'
            count, where = count_syncs(trainer, check, 'error' if is_fused else 'warn')
            check.row(
                f'synchronisations per update, {name}', count, mark=at_most(0 if is_fused else 1), where=where)


@contextlib.contextmanager
def process_group(check: Check) -> Iterator[None]:
    """A group of this process alone."""
    for backend in ('NCCL', 'GLOO'):
        os.environ.setdefault(f'{backend}_SOCKET_IFNAME', 'lo')  # there may be no network
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            'nccl' if check.is_cuda else 'gloo', init_method=f'file://{folder}/init', rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def train(check: Check, compile: Optional[str], is_ddp: bool) -> float:
    """Mean loss of an epoch of a few steps in stage I."""
    models = sizes(check)
    task = make_dearkd(check, **models)
    batches = make_batches(check, 4, 4 if check.toy else 32, models['size'])
    trainer = make_trainer(task, batches, check.precision(torch.bfloat16), compile=compile, grad_accum_steps=2)
    if is_ddp:
        task.prepare_distributed(
            device_ids=[check.device] if check.is_cuda else None, bucket_cap_mb=1, gradient_as_bucket_view=True)
    return trainer.train_epoch(0)['loss']


def ddp(check: Check) -> None:
    """A compiled task in DDP: its graph is split by buckets, MHCA's own function included."""
    eager = train(check, None, is_ddp=False)
    with process_group(check):
        loss = train(check, check.backend, is_ddp=True)
    check.row(
        'loss of the compiled task in DDP', abs(loss - eager) / abs(eager), 'relative to eager', at_most(2e-2),
        eager=eager, compiled=loss)


def cuda_graphs(check: Check) -> None:
    """`--torchcompile-mode reduce-overhead`: refused with a teacher, or right; right without one."""
    argv = ['DIR', '--model', 'dearkd_tiny_patch16_224', '--torchcompile', '--torchcompile-mode', 'reduce-overhead']
    try:
        resolve_args(build_parser().parse_args([*argv, '--kd-model-name', 'regnety_160']))
        refusal = ''
    except ValueError as e:
        refusal = str(e)
    check.data('reduce-overhead with a teacher', refused=refusal)
    if not refusal:
        check.skip('reduce-overhead with a teacher', 'train.py does not refuse it, and nothing here tests it')
    name = 'reduce-overhead without a teacher'
    if not check.has_time(name, 0 if check.toy else 10):
        return
    losses = {}
    models = sizes(check)
    del models['teacher']
    for mode in (None, 'reduce-overhead'):
        task = make_student_task(check, **models)
        trainer = make_trainer(
            task, make_batches(check, 6, 4 if check.toy else 32, models['size']), check.precision(torch.bfloat16))
        if mode and check.toy:
            task.compile(backend=check.backend)  # a CPU has no such graphs
        elif mode:
            task.compile(mode=mode)
        losses[mode] = trainer.train_epoch(0)['loss']
    check.row(
        f'loss of {name}', abs(losses['reduce-overhead'] - losses[None]) / abs(losses[None]), 'relative to eager',
        at_most(2e-2))
