"""Edits that leave this package: in the weights of a full model, or as PEFT adapters; and adapters that come in."""
