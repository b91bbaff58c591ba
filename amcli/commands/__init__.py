"""The commands, one per file: the only code that talks to people. Nothing here imports torch
before a command runs, so that help and completion are instant.
"""
