"""One model for many conversations: batches whose rows continue from different contexts.

Knows models and entries; only commands and the Python API import it.
"""
