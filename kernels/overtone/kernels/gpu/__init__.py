"""Triton kernels: the transforms of all adapters as products of small matrices, their cores read where they lie in a
pool.

Each module has one operator: its contract, its launcher, its kernel. Nothing here is imported by a server without a GPU.
"""
