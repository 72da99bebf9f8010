"""Defects on purpose."""


def plant(name: str) -> None:
    """Nothing yet."""
