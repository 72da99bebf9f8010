"""The API of LoRAX, at the root."""
