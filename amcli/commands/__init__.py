"""amkv."""
