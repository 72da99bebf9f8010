"""Ways to compute linear layers, and the choice between them. Knows nothing of modules, checkpoints or adapters."""
