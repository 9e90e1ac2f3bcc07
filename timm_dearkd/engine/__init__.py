"""The parts of train.py: options, data, training loop and output folder."""
