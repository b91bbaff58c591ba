"""Entries of one layer, as numbers or as codes: what the maths, the runtime and the file share.

catalogue  names of stores, and what the help says of them; imports nothing
matrix     rows of numbers in some form: `Matrix`, and `Numbers`, plain ones
ragged     `Entries`: a layer's keys and values, head after head
prefix     what attention needs to know of entries, of one context or of several
stores     ways to store entries: `Quantizer`, and how one is found by its name
blocks     codes in blocks with a scale each, and their quantizer
int8, int4  a store each
"""
