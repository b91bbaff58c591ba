"""Reference queries: what a context is asked so that its entries can be chosen and fitted."""
