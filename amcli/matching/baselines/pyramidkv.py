"""PyramidKV: SnapKV's scores, with more entries in the lower layers than in the higher ones.

Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
arXiv 2406.02069. The entries of a layer fall linearly with its depth; see `budgets.pyramid`.
"""

from __future__ import annotations

from amcli.matching.baselines.evicting import evict
from amcli.matching.baselines.last_queries import WINDOW, LastQueries
from amcli.matching.baselines.snapkv import score

PYRAMIDKV = evict(
    "pyramidkv",
    score,
    watch=LastQueries,
    window=WINDOW,
    budget="pyramid",
)
