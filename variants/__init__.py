"""Rivals and ablations, one script each: the difference to train_rl.py, its flags and its source."""
