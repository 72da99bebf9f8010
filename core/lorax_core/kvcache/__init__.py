"""The paged cache of keys and values: its memory, and who holds which page."""
