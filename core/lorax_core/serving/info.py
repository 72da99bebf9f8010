"""What an engine is made of, as its users see it.

Decides which facts are shown. Knows nothing of how they came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorax_core.engine.stats import StepStats, Totals


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is made of.

    `max_tokens` is the longest sequence, `max_text_tokens` the longest input to embed or classify (tokenizers and sentence
    files may allow less than the model), `kv_cache_tokens` what all sequences share. `step_bytes`, known after `warmup`: what
    the largest step took beyond weights and cache (on a CPU, the growth of the process, 0 when it had been as large before).
    `totals` has the numbers of all steps so far, and `last_step` those of the last one. `linear_methods` counts the layers that
    each linear method computes, `linear_notes` say why others were passed over, and `lora_kernel` is the kernel of low-rank
    products with the reason for it; `elementwise` that of norms, gates and rotations. `graphs` says why decoding steps are not
    captured, None where they are. `weight_bytes` were read from files and made ready in `load_seconds`; `linear_bytes` have the
    prepared linear layers, which every step reads. `chat_template` says whether chat messages can be given. `notes` say what
    was chosen otherwise than the checkpoint states it. `labels` are those of its classification head, and `pooling` is how its
    vectors are pooled where a request does not say it.
    """

    model_type: str
    tasks: tuple[str, ...]
    dtype: str
    device: str
    attention: str
    passed_over: tuple[tuple[str, str], ...]
    max_tokens: int
    max_text_tokens: int
    kv_cache_tokens: int | None
    kv_cache_bytes: int
    linear_methods: Mapping[str, int] = field(default_factory=dict)
    linear_notes: tuple[str, ...] = ()
    lora_kernel: tuple[str, str] | None = None
    elementwise: tuple[str, str] | None = None
    graphs: str | None = None
    vocab_size: int = 0
    chat_template: bool = False
    weight_bytes: int = 0
    linear_bytes: int = 0
    load_seconds: float = 0.0
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    pooling: str | None = None
    step_bytes: int | None = None
    totals: Totals = field(default_factory=Totals)
    last_step: StepStats | None = None

    @property
    def load_bytes_per_second(self) -> float:
        """How fast the weights came, from files to where they are used."""
        return self.weight_bytes / self.load_seconds if self.load_seconds else 0.0
