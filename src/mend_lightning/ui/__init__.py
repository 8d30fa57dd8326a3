"""`mend-lightning ui`: a local page to edit a model and look at what the edits do. Needs the extra `ui` (Gradio)."""
