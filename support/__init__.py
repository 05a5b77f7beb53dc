"""What the scripts stand on, each file a matter of its own; a reader of the method may skip it."""
