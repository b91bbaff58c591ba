"""Reference queries: what a context is asked so that entries can be selected and fitted."""
