"""Random numbers that depend only on the seed, the epoch and the place in the epoch.

A run that is resumed in the middle of an epoch therefore gets the images, crops and mixes of the whole run.
"""
import contextlib
import random
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, get_worker_info

_SAMPLE, _BATCH, _ERASING = range(3)  # different numbers for different uses at the same place


def get_rng_state(device: Optional[torch.device] = None) -> Dict[str, Any]:
    """Return the states of the generators of Python, NumPy, PyTorch and the device, as plain values and tensors."""
    numpy_state: Any = np.random.get_state()
    name, keys, *rest = numpy_state
    state = dict(python=random.getstate(), numpy=(name, keys.tolist(), *rest), torch=torch.get_rng_state())
    if device is not None and device.type != 'cpu':
        state['device'] = torch.get_device_module(device).get_rng_state()
    return state


def set_rng_state(state: Dict[str, Any], device: Optional[torch.device] = None) -> None:
    """Restore the states that `get_rng_state` returned."""
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'])
    if device is not None and device.type != 'cpu' and 'device' in state:
        torch.get_device_module(device).set_rng_state(state['device'])


@contextlib.contextmanager
def seeded(*key: int, device: Optional[torch.device] = None) -> Iterator[None]:
    """Seed all generators with `key`, and restore them at the end.

    Args:
        *key: Numbers of 0 or more. Keys of different length may give the same seed.
        device: Also seed the generator of this device.
    """
    state = None if get_worker_info() is not None else get_rng_state(device)  # a worker needs no other numbers
    seeds = np.random.SeedSequence(key).generate_state(4).tolist()
    try:
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.default_generator.manual_seed(seeds[2])
        if device is not None and device.type != 'cpu':
            torch.get_device_module(device).manual_seed(seeds[3])
        yield
    finally:
        if state is not None:
            set_rng_state(state, device)


class EpochBatchSampler(Sampler):
    """Batches of (epoch, place, index) for the samples of another sampler, from any batch of the epoch on.

    Args:
        batch_sampler: Batches of indices for this process. It, or its `sampler`, has a `set_epoch`.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    def __init__(self, batch_sampler, rank: int = 0, world_size: int = 1) -> None:
        self.batch_sampler = batch_sampler
        self.rank = rank
        self.world_size = world_size
        self.epoch = self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Set the epoch, and the number of batches to skip at its start."""
        self.epoch, self.first_batch = epoch, first_batch
        target = self.batch_sampler if hasattr(self.batch_sampler, 'set_epoch') else self.batch_sampler.sampler
        target.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[List[Tuple[int, int, Any]]]:
        place = self.rank
        for number, batch in enumerate(self.batch_sampler):
            places = range(place, place + len(batch) * self.world_size, self.world_size)
            place += len(batch) * self.world_size
            if number >= self.first_batch:
                yield [(self.epoch, *sample) for sample in zip(places, batch)]


class SeededDataset(Dataset):
    """Data set whose random transforms depend on (seed, epoch, place). Its keys come from `EpochBatchSampler`."""

    def __init__(self, dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Tuple[int, int, Any]):
        epoch, place, index = key
        with seeded(self.seed, epoch, place, _SAMPLE):
            return key, self.dataset[index]


class SeededCollate:
    """Collates the samples of a `SeededDataset`, with mixing that depends on (seed, epoch, place).

    Args:
        collate_fn: Builds a batch from samples.
        seed: See `seeded`.
        mixup: timm's Mixup or FastCollateMixup that `collate_fn` applies.
        mixup_off_epoch: First epoch without mixing; 0 mixes in all epochs.
    """

    def __init__(self, collate_fn: Callable, seed: int, mixup: Optional[Any] = None, mixup_off_epoch: int = 0) -> None:
        self.collate_fn = collate_fn
        self.seed = seed
        self.mixup = mixup
        self.mixup_off_epoch = mixup_off_epoch

    def __call__(self, items: Sequence[Tuple[Tuple[int, int, Any], Any]]):
        epoch, place, _ = items[0][0]
        if self.mixup is not None:
            self.mixup.mixup_enabled = not self.mixup_off_epoch or epoch < self.mixup_off_epoch
        with seeded(self.seed, epoch, place, _BATCH):
            return self.collate_fn([sample for _, sample in items])


class SeededErasing:
    """timm's random erasing of batches on the device, with rectangles that depend on (seed, epoch, batch)."""

    def __init__(self, erasing: Callable, seed: int, device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        self.erasing = erasing
        self.seed = seed
        self.device = device
        self.rank = rank
        self.world_size = world_size
        self.epoch = self.batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.epoch, self.batch = epoch, first_batch

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        place = self.batch * self.world_size + self.rank
        self.batch += 1
        with seeded(self.seed, self.epoch, place, _ERASING, device=self.device):
            return self.erasing(images)
