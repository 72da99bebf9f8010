"""A Qwen2, GPT-2 or GPT-NeoX checkpoint as a GGUF file for llama.cpp, without a vocabulary: prompts are token ids.

Decides which tensor goes where. Knows nothing of how files are computed with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

TYPES = {"float32": "F32", "bfloat16": "BF16"}
QWEN2 = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    **{f"self_attn.{one}_proj.{kind}": f"attn_{one}.{kind}" for one in "qkv" for kind in ("weight", "bias")},
    **{f"mlp.{one}_proj.weight": f"ffn_{one}.weight" for one in ("gate", "up", "down")},
}
GPT2 = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in {
        "ln_1": "attn_norm",
        "ln_2": "ffn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }.items()
    for kind in ("weight", "bias")
}

NEOX = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
    }.items()
    for kind in ("weight", "bias")
}
LAYERS = {"qwen2": QWEN2, "gpt2": GPT2, "gpt_neox": NEOX}


def gguf_of(folder: str, precision: str) -> str:
    """The file of a checkpoint at a precision, written once."""
    made = Path(f"{folder}-{precision}.gguf")
    if not made.exists():
        part = made.with_suffix(".part")
        if precision in TYPES:
            write(Path(folder), part, TYPES[precision])
        else:
            quantize(gguf_of(folder, "float32"), part, precision)
        part.rename(made)
    return str(made)


def quantize(wide: str, file: Path, precision: str) -> None:
    """A file in fewer bits by llama.cpp's own quantizer, which keeps some tensors wider: a tied head in 8 bits beside q4_0."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{precision.upper()}")
    if llama_cpp.llama_model_quantize(wide.encode(), str(file).encode(), settings) != 0:
        raise RuntimeError(f"llama.cpp could not make {precision} of {wide}")


def write(folder: Path, file: Path, kind: str) -> None:
    """One file with all tensors in `kind`; vectors stay in float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(file), config["model_type"].replace("_", ""))
    writer.add_file_type(int(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}")))
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    _describe(writer, config)
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a dict
            there = _name(name, config["model_type"])
            if there is not None:
                numbers = tensors.get_tensor(name).float().numpy()
                _add(writer, there, _arranged(numbers, there, config), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: dict[str, Any]) -> None:
    if config["model_type"] == "qwen2":
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_rope_freq_base(config.get("rope_parameters", config).get("rope_theta", 10_000.0))
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    elif config["model_type"] == "gpt_neox":
        width, heads = config["hidden_size"], config["num_attention_heads"]
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(width)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_rope_dimension_count(int(width // heads * config["rope_parameters"]["partial_rotary_factor"]))
        writer.add_parallel_residual(config["use_parallel_residual"])
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    else:
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_block_count(config["n_layer"])
        writer.add_feed_forward_length(4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def _arranged(numbers: Any, there: str, config: dict[str, Any]) -> Any:
    """A tensor as llama.cpp has it: GPT-2's linear layers are transposed, GPT-NeoX's q, k and v lie head by head."""
    if config["model_type"] == "gpt2" and there.startswith("blk.") and numbers.ndim == 2:
        return numbers.T
    if config["model_type"] == "gpt_neox" and ".attn_qkv." in there:
        heads, rest = config["num_attention_heads"], numbers.shape[1:]
        return numbers.reshape(heads, 3, -1, *rest).swapaxes(0, 1).reshape(numbers.shape)
    return numbers


def _name(name: str, model_type: str) -> str | None:
    """llama.cpp's name of a tensor; None for one that it has no use for."""
    path = name.removeprefix("model.").removeprefix("transformer.").removeprefix("gpt_neox.")
    whole = {
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "wte.weight": "token_embd.weight",
        "wpe.weight": "position_embd.weight",
        "ln_f.weight": "output_norm.weight",
        "ln_f.bias": "output_norm.bias",
        "embed_in.weight": "token_embd.weight",
        "embed_out.weight": "output.weight",
        "final_layer_norm.weight": "output_norm.weight",
        "final_layer_norm.bias": "output_norm.bias",
    }
    if path in whole:
        return whole[path]
    _, _, rest = path.partition(".")
    number, _, last = rest.partition(".")
    found = LAYERS[model_type].get(last)
    return f"blk.{number}.{found}" if found else None


def _add(writer: Any, name: str, numbers: Any, kind: str) -> None:
    numbers = np.ascontiguousarray(numbers, np.float32)
    if numbers.ndim == 1 or kind == "F32" or name == "position_embd.weight":
        writer.add_tensor(name, numbers)
        return
    quant = getattr(gguf.GGMLQuantizationType, kind)
    writer.add_tensor(name, gguf.quants.quantize(numbers, quant), raw_dtype=quant)
