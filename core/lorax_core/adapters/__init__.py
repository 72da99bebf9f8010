"""Adapters: what changes a model for some rows of a batch."""
