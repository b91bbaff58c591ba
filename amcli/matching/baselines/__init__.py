"""Rival methods, each after its paper, in a file of its own: what evaluations compare with.

They run through the same pipeline as the tool's own methods and store what they keep, so their
ratios are real. Every file names its source and says where it departs from it. `catalogue` names
them; each is loaded when it is asked for.
"""
