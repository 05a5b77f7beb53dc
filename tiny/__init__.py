"""A Qwen2.5-VL of under 2 M parameters that makes the whole method visible on a laptop."""
