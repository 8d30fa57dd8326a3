"""An editor beside the training of a host: its model is found, used in isolation, and left as it was."""
