"""Rival methods, each after its paper, in a file of its own: what `amkv eval` compares with.

They run through the same pipeline as the tool's own methods and store what they keep, so their
ratios are real. Every file names its source and says where it departs from it.
"""

from __future__ import annotations

# In the order in which they are listed: without queries, with the context's own, with others.
# isort: off
from amcli.matching.baselines import streaming as streaming
from amcli.matching.baselines import random_keys as random_keys
from amcli.matching.baselines import knorm as knorm
from amcli.matching.baselines import keydiff as keydiff
from amcli.matching.baselines import snapkv as snapkv
from amcli.matching.baselines import tova as tova
from amcli.matching.baselines import h2o as h2o
from amcli.matching.baselines import expected_attention as expected_attention
from amcli.matching.baselines import pyramidkv as pyramidkv
from amcli.matching.baselines import kvzip as kvzip
from amcli.matching.baselines import am_highest_attention as am_highest_attention
from amcli.matching.baselines import am_omp as am_omp
