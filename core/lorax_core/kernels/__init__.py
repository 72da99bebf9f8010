"""Kernels: readable forms, and compiled ones where this machine has a compiler. Knows nothing of models."""
