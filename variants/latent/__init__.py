"""Latent actions: RL over a codebook in place of the vocabulary. README.md here."""
