"""The files of adapters, and where each of their tensors goes in a model."""
