"""The frozen base model: loading it, its layers, its passes. Nothing here knows what an edit is."""
