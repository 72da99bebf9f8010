"""Kernels in Triton, for NVIDIA GPUs. Imported late and by name: all but `available` need the package triton."""
