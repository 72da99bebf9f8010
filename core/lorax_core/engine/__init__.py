"""The step loop: who runs next, one forward pass, and what its answers mean."""
