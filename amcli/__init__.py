"""amkv: compile a document into a compact KV cache, and chat with it.

Importing this package must stay cheap: nothing here imports torch or transformers.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
