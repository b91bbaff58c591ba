"""Artifacts as torch tensors: joins the file format and the entries of layers."""
