"""One model for many conversations: batches whose rows go on from different contexts.

Knows models and entries; nothing imports it but commands and the Python API.
"""
