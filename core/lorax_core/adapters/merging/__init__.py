"""Several adapters into one, and one into the weights of its base."""
