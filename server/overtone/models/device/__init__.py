"""Adapters, attention and decoder layers on a GPU, by the Triton kernels of `overtone.kernels.gpu`."""
