"""Rivals and ablations, one script each: the difference to train_rl.py, its flags and its source.

Claims are the authors' own. Of some methods of 2026 only an abstract or a summary was at hand: what a file calls ours
is our reading of it.
"""
