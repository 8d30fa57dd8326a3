"""Working inside a training that is somebody else's: find its model, borrow it, leave everything as it was."""
