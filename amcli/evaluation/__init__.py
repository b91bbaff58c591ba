"""Evaluation: suites of documents with questions, metrics, resumable runs, plots."""
