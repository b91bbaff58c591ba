"""Entries of one layer, as numbers or as codes: what the maths, the runtime and the file share."""
