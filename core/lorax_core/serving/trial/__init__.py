"""Tried before trusted: kernels of a GPU compute small steps in a process of their own before an engine relies on them."""
