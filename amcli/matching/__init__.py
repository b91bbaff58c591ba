"""The maths of Attention Matching: scores, selection, mass fit, value fit, budgets, methods.

Knows torch and nothing else: no models, no files. Everything is batched over the KV heads of
a layer and runs in bounded memory by tiles, the same on CPU and GPU.

Symbols (one layer): `Q [H, n, d]` reference queries after RoPE, the query heads of a group
folded into the rows; `K [H, T, d]`, `V [H, T, dv]` the document's keys and values;
`W [H, n]` in (0, 1], the share of a query's full softmax mass that falls on the document;
`C_k, beta, C_v` the compact entries, `t` of them per head.
"""

from __future__ import annotations

from amcli.matching import recipes as recipes  # registers the built-in methods
