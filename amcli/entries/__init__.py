"""Entries of one layer, as numbers or as codes: what the maths, the runtime and the file share.

catalogue  names of stores, and what the help says of them; imports nothing
matrix     rows of numbers in some form: `Matrix`, and `Numbers` for plain ones
ragged     `Entries`: a layer's keys and values, head after head
prefix     what attention needs to know of the entries of one context or several
stores     ways to store entries: `Quantizer`, and finding one by name
blocks     codes in blocks with a scale each, and their quantizer
int8, int4  one store each
planes     codes of few bits in bytes
grouped    keys as codes, by channel in groups of entries
turned     values as codes, turned, in blocks
packed     the stores k8v8 to k2v2, of both
"""
