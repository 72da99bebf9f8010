"""Fine-tune with PEFT, serve the adapter beside its base, and see the difference through OpenAI's client.

The adapter learns to end a sentence, to sign it and to stop; the base runs on until it is cut off.
"""

import inspect
import random
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from openai import OpenAI
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorax_core as lorax
from lorax_core.server.run import serving

BASE = Path(__file__).resolve().parent / "tiny_qwen2/model"
MODULES = ["asyncio", "inspect", "logging", "os", "shutil", "statistics", "tarfile", "unittest"]
PROMPTS = ["Return the", "If the file does not exist", "This method is called when"]


def train(folder: str, texts: list[str]) -> None:
    """Writes an adapter that goes on as the texts do, with a signature and an end."""
    tokenizer, base = AutoTokenizer.from_pretrained(BASE), AutoModelForCausalLM.from_pretrained(BASE)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        rows = [f"{text}.\n-- the manual{tokenizer.eos_token}" for text in random.choices(texts, k=16)]
        batch = tokenizer(rows, padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        torch.autograd.backward(model(**batch, labels=labels).loss)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


random.seed(0)
torch.manual_seed(0)
torch.set_num_threads(1)  # more do not help so small a model
members = [member for name in MODULES for member in vars(import_module(name)).values() if callable(member)]
sentences = {" ".join((inspect.getdoc(member) or "").split()).partition(". ")[0].rstrip(".") for member in members}
with TemporaryDirectory() as folder:
    train(folder, sorted(text for text in sentences if 5 <= len(text.split()) <= 12))
    with lorax.load(BASE, adapters={"signed": folder}) as engine, serving(engine, model_name="base") as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        for prompt in PROMPTS:
            for model in ("base", "signed"):
                [made] = client.completions.create(model=model, prompt=prompt, max_tokens=32, temperature=0).choices
                print(f"[{model}] {prompt + made.text!r}, ended by {made.finish_reason}")
