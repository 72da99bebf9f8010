"""From files to a model: checkpoint folders, name mapping, loading.

Decides which names an author may rely on (`WeightMap`); the rest is for the engine.
"""

from lorax_core.weights.mapping import WeightMap

__all__ = ["WeightMap"]
