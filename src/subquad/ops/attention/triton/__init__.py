"""Attention over any mask as Triton kernels, fed by lists of key blocks for rows of queries."""
