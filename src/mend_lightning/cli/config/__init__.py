"""Configs: found by name (files), read with the line of every value (tree), built on each other (overlays)."""
