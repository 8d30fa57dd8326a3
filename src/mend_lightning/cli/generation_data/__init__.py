"""Makes the paper's generation task (Wikitext) from any text and any causal model."""
