"""Passes of a base: the trunk, the blocks above it, the head, generation, and hooks that change a layer's output."""
