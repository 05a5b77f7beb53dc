"""What the scripts stand on, one topic per file; a reader of the method can skip it."""
