"""Suites: documents with questions. `evaluation.catalogue` lists them, `base.get` loads them."""
