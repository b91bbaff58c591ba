"""Rival methods, each after its paper, in a file of its own: what evaluations compare with.

They run through the same pipeline as the tool's own methods and store what they keep, so their
ratios are real. Every file names its source and says where it departs from it.
"""

from __future__ import annotations

# In the order in which they are listed: without queries, with the context's own, with others.
# isort: off
from . import streaming as streaming
from . import random_keys as random_keys
from . import knorm as knorm
from . import keydiff as keydiff
from . import snapkv as snapkv
from . import tova as tova
from . import h2o as h2o
from . import expected_attention as expected_attention
from . import pyramidkv as pyramidkv
from . import kvzip as kvzip
from . import am_highest_attention as am_highest_attention
from . import am_omp as am_omp
