"""The only room that knows transformers: loading, attention, cache, templates, generation."""
