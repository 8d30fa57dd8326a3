"""Text and token ids as Rows: what a model reads."""
