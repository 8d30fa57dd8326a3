"""Data: sources (rows) -> readers (formats) -> records -> tasks (sampling) -> batches (collate) -> EditDataModule."""
