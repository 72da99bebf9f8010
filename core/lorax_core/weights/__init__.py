"""From files to a model: checkpoint folders, name mapping, loading.

Decides which names an author may rely on (`WeightMap`, `post_norm_map`); the rest is for the engine.
"""

from lorax_core.weights.mapping import WeightMap, post_norm_map

__all__ = ["WeightMap", "post_norm_map"]
