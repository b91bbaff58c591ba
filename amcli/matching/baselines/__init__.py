"""Methods from other papers, each in its own file: what evaluations compare with.

They run through the same pipeline as the tool's own methods and store what they keep, so their
ratios are real. Every file names its source and says where it departs from it. `catalogue` lists
them; each is loaded when asked for.
"""
