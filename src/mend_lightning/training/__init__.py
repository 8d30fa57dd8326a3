"""Training an editor: MendModule, the step it takes, MendCallback, and what a run says and saves."""
