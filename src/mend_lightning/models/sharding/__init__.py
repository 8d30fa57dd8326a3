"""Several processes: sharded models, checkpoints of any layout, passes in step."""
