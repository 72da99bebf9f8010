"""The low-rank products of many adapters in one batch."""
