"""What a run shows while it goes: edits per second and the estimated end, on a terminal and in a log."""
