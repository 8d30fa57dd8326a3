"""Speed and memory of a training step and of one edit, beside the original algorithm. See README.md."""
