"""Prefill, reference pass, compaction and sessions: joins models, matching and artifacts."""
