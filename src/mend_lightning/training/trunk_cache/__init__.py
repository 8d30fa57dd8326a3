"""The trunk's outputs of a training set on disk: an epoch after the first runs the blocks above alone."""

from mend_lightning.training.trunk_cache.cached import CachedTrunk, CacheUse
from mend_lightning.training.trunk_cache.folder import check_folder

__all__ = ["CacheUse", "CachedTrunk", "check_folder"]
