"""Conversations about contexts."""
