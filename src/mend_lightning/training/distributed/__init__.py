"""Several processes: strategies that shard, where a base goes, and checkpoints of any layout."""
