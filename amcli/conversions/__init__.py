"""Contexts in other forms: folders for plain transformers, caches saved by other tools."""
