"""Data: records (files) -> tasks (sampling) -> batches (collate) -> EditDataModule (Lightning)."""
