"""The fused log-probability and the group advantage: PyTorch everywhere, Triton on GPUs."""
