"""A document in the cache of a model: read from a text, or opened from an artifact."""
