"""Contexts in other forms: folders for plain transformers, caches that other tools have saved."""
