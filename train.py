#!/usr/bin/env python3
"""Train a timm model on images, alone or taught by a CNN with DearKD: `python train.py --help`.

The script itself is timm_dearkd/train.py, which an installed package runs as `python -m timm_dearkd.train`.
"""
import sys

from timm_dearkd import train

if __name__ == '__main__':
    train.run_script()
else:
    sys.modules[__name__] = train  # `import train; train.create_model = ...` reaches the script itself
