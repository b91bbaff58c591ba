"""Generated documents with questions: what pocket was trained on, and the registers of `eval`."""
