"""Suites: documents with questions. `evaluation.catalogue` names them, `base.get` loads them."""
