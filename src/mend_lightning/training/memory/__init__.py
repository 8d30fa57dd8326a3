"""What a run will hold on each device, by part, before anything is loaded."""
