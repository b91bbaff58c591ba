"""A document in a model's cache: read from text, or opened from an artifact."""
