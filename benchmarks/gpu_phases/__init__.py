"""The phases of `gpu_check.py`: one module each, with a function `run(check)`."""
from typing import NamedTuple, Tuple


class Phase(NamedTuple):
    """A phase: its number, module, share of the time in seconds, and title."""
    number: int
    module: str
    seconds: float
    title: str


PHASES: Tuple[Phase, ...] = (
    Phase(0, 'phase0_ceilings', 10, 'Versions, card and ceilings'),
    Phase(1, 'phase1_kernels', 45, 'Attention kernels with the channels of MHCA'),
    Phase(2, 'phase2_precision', 40, 'Error of MHCA against float64, pair by pair'),
    Phase(3, 'phase3_syncs', 30, 'Synchronisations of a training step; DDP; CUDA graphs'),
    Phase(4, 'phase4_models', 125, 'Whole models against DeiT and ConViT'),
    Phase(5, 'phase5_stage1', 90, 'Step of stage I against its parts'),
    Phase(6, 'phase6_training', 85, 'train.py over both stages'),
    Phase(7, 'phase7_data_free', 50, 'Step of data_free against the bare CNN'),
)

# If cuDNN's attention fails in one of the first, the others run again without it
CUDNN_PHASES = (1, 2)
WITHOUT_CUDNN_PHASES = (4, 5, 6)
NO_CUDNN = 'without cuDNN attention'
