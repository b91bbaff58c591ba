"""Trains pocket on the documents of `generator`, and measures it."""
