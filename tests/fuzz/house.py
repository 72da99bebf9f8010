"""What a worker keeps for all of its cases: the installed plugins, engines that must go on serving, and the references.

An engine of the house is attacked by requests and adapters, and answers a probe after every case: the same numbers as at first.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import AutoTokenizer

import lorax_core as lorax
from fuzz.bases import BASES, Base, quiet
from fuzz.judge import Answer, CannotJudge
from lorax_core.plugins.host import PluginHost

TEXTS = [
    [5, 9, 2, 77, 13],
    [30, 3, 11, 8, 60, 61, 62, 7, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55],
]
PROBE = [5, 6, 7, 80]
CACHE = 256
OPTIONS: dict[str, Any] = {"dtype": "float32", "kv_cache_tokens": CACHE, "pooling": "mean"}
CAUSAL = ("qwen2", "gpt2", "neox", "qwen2-texts", "sharded")


class House:
    """Of one worker. `root` holds the bases, `scratch` a folder for each case."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root = root
        self.scratch = scratch
        self._engines: dict[str, lorax.Engine] = {}
        self._probes: dict[str, Answer] = {}
        self._references: dict[str, Any] = {}

    @cached_property
    def host(self) -> PluginHost:
        """The installed plugins."""
        return PluginHost.discover()

    def copy(self, name: str) -> Path:
        """A folder of this case with the files of a base."""
        target = Path(tempfile.mkdtemp(dir=self.scratch)) / "files"
        shutil.copytree(self.root / name, target)
        return target

    def clear(self) -> None:
        """Drop the folders of the case."""
        for folder in self.scratch.iterdir():
            shutil.rmtree(folder, ignore_errors=True)

    def load(self, folder: Path, name: str, **options: Any) -> lorax.Engine:
        """An engine over a folder of a case, which began as the base `name`."""
        return lorax.load(folder, host=self.host, **{**self.options(name), **options})

    def options(self, name: str) -> dict[str, Any]:
        """What engines over a base are loaded with."""
        return {key: value for key, value in OPTIONS.items() if name in CAUSAL or key != "kv_cache_tokens"}

    def engine(self, name: str) -> lorax.Engine:
        """The engine of a base, with the adapter "good" where there is one."""
        if name not in self._engines:
            engine = self.load(self.root / name, name)
            good = self.root / "adapters" / f"{name}-plain"
            if good.is_dir():
                engine.adapters.load("good", good)
            self._engines[name] = engine
            self._probes[name] = self._probe(name)
        return self._engines[name]

    def probe_failed(self, names: tuple[str, ...]) -> str:
        """What is no longer as it was in the engines of these names; empty when all is."""
        for name in names:
            self.engine(name)
            try:
                now = self._probe(name)
            except BaseException as error:
                return f"the engine of {name} no longer answers: {type(error).__name__}: {error}"
            if now != self._probes[name]:
                return f"the engine of {name} answers {now!r:.300} and not {self._probes[name]!r:.300}"
        return ""

    def _probe(self, name: str) -> Answer:
        engine = self._engines[name]
        info = engine.info()
        found: dict[str, Any] = {"adapters": [one.name for one in engine.adapters.list()]}
        adapter = "good" if "good" in engine.adapters else None
        if "generate" in info.tasks:
            requests: list[Any] = [
                lorax.GenerateRequest(prompt=PROBE, adapter=one, max_tokens=3, logprobs=0, ignore_eos=True)
                for one in (None, adapter)
            ]
            for at, done in enumerate(engine.run(requests)):
                found[f"tokens {at}"] = done.token_ids
                found[f"logprobs {at}"] = [round(one.logprob, 3) for one in done.logprobs]
        if "embed" in info.tasks:
            found["vector"] = [round(float(number), 3) for number in engine.embed(PROBE, adapter=adapter)]
        return found

    def close(self) -> None:
        """Close the engines."""
        for engine in self._engines.values():
            engine.close()

    # --- references ---

    def reference(self, name: str) -> Any:
        """The unmutated oracle of a base."""
        if name not in self._references:
            self._references[name] = read_reference(BASES[name], self.root / name, 0)
        return self._references[name]

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """The unmutated tokenizers, by base."""
        with quiet():
            return {name: AutoTokenizer.from_pretrained(str(self.root / name), local_files_only=True) for name in BASES}


def read_reference(base: Base, folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a folder. Raises CannotJudge when the files leave numbers to chance."""
    torch.manual_seed(seed)
    with quiet():
        model, account = _oracle(base, folder).from_pretrained(
            str(folder),
            attn_implementation="eager",
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    missing = [
        key for key in account["missing_keys"] if "pooler" not in key or base.oracle.__name__.endswith("Classification")
    ]
    if missing or account["mismatched_keys"]:
        raise CannotJudge(f"the reference fills {sorted(missing)[:3]} at random")
    return model.eval()


def _oracle(base: Base, folder: Path) -> Any:
    """The class of transformers for a base's task: of the base's architecture, or of the one that the files name instead."""
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if named == base.oracle.config_class.model_type:
        return base.oracle
    autos = {
        "ForCausalLM": hf.AutoModelForCausalLM,
        "LMHeadModel": hf.AutoModelForCausalLM,
        "ForTokenClassification": hf.AutoModelForTokenClassification,
        "ForSequenceClassification": hf.AutoModelForSequenceClassification,
    }
    return next((auto for ending, auto in autos.items() if base.oracle.__name__.endswith(ending)), hf.AutoModel)


def our_answer(engine: lorax.Engine, adapter: Any = None, texts: list[list[int]] | None = None) -> dict[str, Any]:
    """What an engine says of the texts, by every task that it has."""
    tasks, found = engine.info().tasks, {}
    for at, ids in enumerate(TEXTS if texts is None else texts):
        if "generate" in tasks:
            done = engine.generate(ids, adapter=adapter, max_tokens=3, ignore_eos=True, logprobs=0, prompt_logprobs=0)
            found[f"tokens {at}"] = list(done.token_ids)
            found[f"logprobs {at}"] = [float(one.logprob) for one in [*done.prompt_logprobs[1:], *done.logprobs]]
            found[f"greedy {at}"] = [0.0] * len(done.token_ids)
        if "embed" in tasks:
            found[f"vector {at}"] = [float(number) for number in engine.embed(ids, adapter=adapter)]
        if "token-classification" in tasks or "sequence-classification" in tasks:
            classes = engine.classify(ids, adapter=adapter)
            found[f"labels {at}"] = list(classes.labels)
            found[f"scores {at}"] = [float(score) for score in classes.scores]
    return found


@torch.inference_mode()
def their_answer(
    model: Any, answer: Answer, texts: list[list[int]] | None = None, types: list[int] | None = None
) -> dict[str, Any]:
    """What the oracle says of the same, along the tokens of `answer`: its own choice may differ by the last bit."""
    found: dict[str, Any] = {}
    for at, ids in enumerate(TEXTS if texts is None else texts):
        if f"tokens {at}" in answer:
            tokens = answer[f"tokens {at}"]
            logits = model(torch.tensor([[*ids, *tokens]])).logits[0].double()
            logprobs = logits.log_softmax(-1)
            rows = [float(logprobs[place, token]) for place, token in enumerate([*ids[1:], *tokens])]
            found[f"tokens {at}"], found[f"logprobs {at}"] = tokens, rows
            best = [float(logprobs[len(ids) - 1 + step].max()) for step in range(len(tokens))]
            # A choice as good as the best one, as far as rounding goes, is the best one.
            behind = [one - row for one, row in zip(best, rows[len(ids) - 1 :], strict=True)]
            found[f"greedy {at}"] = [0.0 if one < 1e-3 * max(1.0, abs(best[0])) else one for one in behind]
        if f"vector {at}" in answer:
            base = model.base_model
            rows = base(torch.tensor([ids]), **_typed(types)).last_hidden_state[0].float()
            found[f"vector {at}"] = rows.mean(0).tolist()
        if f"labels {at}" in answer:
            found[f"labels {at}"], found[f"scores {at}"] = _classes(model, ids, types)
    return found


def _typed(types: list[int] | None) -> dict[str, torch.Tensor]:
    return {} if types is None else {"token_type_ids": torch.tensor([types])}


def _classes(model: Any, ids: list[int], types: list[int] | None) -> tuple[list[str], list[float]]:
    logits = model(torch.tensor([ids]), **_typed(types)).logits[0].float()
    names = [model.config.id2label[index] for index in sorted(model.config.id2label)]
    if logits.ndim == 2:  # of tokens
        scores, best = logits.softmax(-1).max(-1)
        return [names[index] for index in best.tolist()], scores.tolist()
    kind = model.config.problem_type or ("regression" if len(names) == 1 else "single_label_classification")
    scores = {"regression": logits, "multi_label_classification": logits.sigmoid()}.get(kind, logits.softmax(-1))
    order = sorted(range(len(names)), key=lambda index: -float(scores[index]))
    return [names[index] for index in order], [float(scores[index]) for index in order]
