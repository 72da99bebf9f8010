"""Each parameter of LoRAX's API, for the tests of the routes and for those with LoRAX's own client.

Decides what changes an answer over examples/tiny_qwen2. Knows nothing of clients.
"""

from __future__ import annotations

from typing import Any, Final

LONG: Final = "The cat and the dog went to the house and the cat sat"
HONOURED: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "adapter_id": ({"adapter_id": "upper"}, {}),
    "merged_adapters": ({"merged_adapters": {"ids": ["upper"], "weights": [0.7], "density": 0.0}}, {}),
    "repetition_penalty": ({"repetition_penalty": 90.0, "max_new_tokens": 30}, {"max_new_tokens": 30}),
    "frequency_penalty": ({"frequency_penalty": 2.0, "max_new_tokens": 90}, {"max_new_tokens": 90}),
    "presence_penalty": ({"presence_penalty": 2.0, "max_new_tokens": 90}, {"max_new_tokens": 90}),
    "do_sample": ({"do_sample": True, "seed": 1}, {}),
    "temperature": ({"temperature": 2.0, "seed": 1}, {"do_sample": True, "seed": 1}),
    "top_k": ({"do_sample": True, "seed": 1, "top_k": 1}, {"do_sample": True, "seed": 1}),
    "top_p": ({"do_sample": True, "seed": 1, "top_p": 0.01}, {"do_sample": True, "seed": 1}),
    "typical_p": ({"do_sample": True, "seed": 1, "typical_p": 0.01}, {"do_sample": True, "seed": 1}),
    "seed": ({"do_sample": True, "seed": 1}, {"do_sample": True, "seed": 2}),
    "max_new_tokens": ({"max_new_tokens": 3}, {}),
    "stop": ({"stop": ["t"]}, {}),
    "return_full_text": ({"return_full_text": True}, {}),
    "truncate": ({"truncate": 2}, {}),
    "details": ({"details": True}, {}),
    "decoder_input_details": ({"decoder_input_details": True}, {"details": True}),
    "return_k_alternatives": ({"details": True, "return_k_alternatives": 2}, {"details": True}),
    "response_format": ({"response_format": {"type": "json_object", "schema": {"enum": ["yes"]}}}, {}),
}
"""For each parameter one request with it and one without, whose answers must differ."""
TESTED_ALONE: Final = {"best_of", "ignore_eos_token", "adapter_source", "api_token", "watermark", "apply_chat_template"}
