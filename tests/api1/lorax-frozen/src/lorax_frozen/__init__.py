"""A plugin as somebody published it for plugin API 1: it uses every public name, and is never edited."""

__version__ = "1.0"
