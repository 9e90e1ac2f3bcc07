"""What train.py is made of: its options, the data, the training loop and the output folder."""
