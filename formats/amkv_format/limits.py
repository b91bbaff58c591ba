"""Every limit of the format, in one place; the table in `amkv-v1.md` repeats these numbers.

They bound what a hostile file can make a reader allocate or loop over before it is refused.
Real files stay orders of magnitude below them.
"""

from __future__ import annotations

from typing import Final

MAX_HEADER_BYTES: Final = 16 * 2**20
"""Length of the safetensors header. Checked before a byte of it is read."""

MAX_MANIFEST_BYTES: Final = 8 * 2**20
"""UTF-8 bytes of the manifest."""

MAX_JSON_SEPARATORS: Final = 2**20
"""Characters `,` `:` `[` `{` in one JSON text, those in strings included: bounds its values."""

MAX_JSON_DEPTH: Final = 32
"""Nesting of arrays and objects in one JSON text; the outermost is level 1."""

MAX_INTEGER: Final = 2**63 - 1
"""Largest magnitude of an integer in JSON."""

MAX_NUMBER_CHARS: Final = 64
"""Characters of one number in JSON."""

MAX_TENSORS: Final = 65536
MAX_NAME_CHARS: Final = 256
"""Characters of a tensor name, of a feature, and of a key or short string of the manifest."""

MAX_RANK: Final = 8
MAX_DIMENSION: Final = 2**48 - 1

MAX_LAYERS: Final = 4096
MAX_STATES: Final = 16384
MAX_HEADS: Final = 4096
MAX_HEAD_DIM: Final = 65536
MAX_TOKENS: Final = 2**31 - 1
"""Logical length, and everything counted in tokens: positions have to fit an I32."""

RATIO_TOLERANCE: Final = 0.01
"""Relative error allowed between the ratio a manifest states and what its tensors give."""
