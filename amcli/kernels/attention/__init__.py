"""Attention over ragged entries on CUDA, in Triton: split over the keys, nothing padded.

plan     which program reads which entries: the work list, made once per prefix
forms    which stores the kernels read, and the tensors they get
stores   entries in any store, as kernels read them
packed   the part of a kernel that reads the stores `k{K}v{V}`
device   the kernels
launch   what can run, shapes and memory; imports `device`, and with it Triton, when first used
"""
