"""Adapters x architectures x tasks: each alone, in one batch with others, and after it was unloaded and loaded again.

The oracle is PEFT in float32 with that adapter alone and unmerged. `matrix` has the rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from builders import change_json, change_tensors
from matrix import (
    ARCHS,
    HEADS,
    ROWS,
    TEXTS,
    Answers,
    Arch,
    HeadRow,
    Row,
    answers,
    make_cell,
    make_head_cell,
)
from oracles import TOLERANCE

import lorax_core as lorax
from lorax_core.errors import AdapterError, RequestError
from lorax_core.types import Classification, Completion, Embedding

OTHER = Row(lambda arch: {"target_modules": "all-linear", "use_dora": True, "r": 3})
REQUESTS = {
    "generate": lambda ids, name: lorax.GenerateRequest(prompt=ids, adapter=name, max_tokens=1, prompt_logprobs=0),
    "embed": lambda ids, name: lorax.EmbedRequest(input=ids, adapter=name),
    "classify": lambda ids, name: lorax.ClassifyRequest(input=ids, adapter=name),
}


@dataclass
class Bench:
    """An engine of one architecture's base, and what is expected of the base and of adapters by name."""

    arch: Arch
    model: Any
    engine: lorax.Engine
    expected: dict[str | None, Answers]
    worst: float = 0.0

    def load(self, name: str, made: tuple[Path, Answers], **options: Any) -> None:
        folder, self.expected[name] = made
        self.engine.adapters.load(name, folder, **options)

    def check(self, *names: str | None) -> None:
        """Every kind of answer of every text with each of these adapters, all in one run."""
        asked = [(name, kind, at) for at in range(len(TEXTS)) for name in names for kind in sorted(self.expected[name])]
        results = self.engine.run([REQUESTS[kind](TEXTS[at], name) for name, kind, at in asked])
        for (name, kind, at), result in zip(asked, results, strict=True):
            labels, theirs = self.expected[name][kind][at]
            found, ours = told(result)
            assert found == labels, (name, kind, at)
            assert ours.shape == theirs.shape
            off = float((ours - theirs).abs().max() / theirs.abs().max())
            self.worst = max(self.worst, off)
            assert off < TOLERANCE, (name, kind, at, off)


def told(result):
    """Labels and numbers of an answer."""
    match result:
        case Completion():
            return None, torch.tensor([one.logprob for one in result.prompt_logprobs[1:]])
        case Embedding():
            return None, torch.from_numpy(result.vector)
        case Classification():
            return result.labels, torch.tensor(result.scores)


def make_engine(arch, folder, host):
    return lorax.load(folder, pooling="mean", kv_cache_tokens=2048 if arch.generates else None, host=host)


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: arch.name)
def bench(request, tmp_path_factory, host):
    arch, root = request.param, tmp_path_factory.mktemp("matrix")
    model = arch.model()
    model.save_pretrained(root / "base")
    with make_engine(arch, root / "base", host) as engine:
        made = Bench(arch, model, engine, {None: answers(model)})
        made.load("other", make_cell(arch, model, OTHER, root / "other", seed=9))
        yield made
    print(f"\n{arch.name}: the largest difference is {made.worst:.1e}")


def prove(bench, made, **options):
    """Alone, with others in one batch, gone, and back."""
    bench.load("it", made, **options)
    bench.check("it")
    bench.check(None, "it", "other")
    bench.engine.adapters.unload("it")
    with pytest.raises(AdapterError, match="'it'"):
        bench.engine.run([REQUESTS["embed"](TEXTS[0], "it")])
    bench.load("it", made, **options)
    bench.check("other", "it", None)
    bench.engine.adapters.unload("it")


def differ(one: Answers, other: Answers) -> bool:
    return any(
        (a - b).abs().max() > 1e-3 for kind in one for (_, a), (_, b) in zip(one[kind], other[kind], strict=True)
    )


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_an_adapter_computes_what_peft_computes(bench, tmp_path, row):
    made = make_cell(bench.arch, bench.model, row, tmp_path)
    if made is None:
        pytest.skip("the architecture has nothing of the kind")
    assert differ(made[1], bench.expected[None])

    prove(bench, made)


@pytest.mark.parametrize("row", HEADS.values(), ids=HEADS)
def test_a_head_travels_with_its_adapter(bench, tmp_path, row):
    prove(bench, make_head_cell(bench.arch, bench.model, row, tmp_path), **row.load)


def test_every_task_shares_one_batch(bench, tmp_path):
    for name, row in HEADS.items():
        bench.load(name, make_head_cell(bench.arch, bench.model, row, tmp_path / str(row.labels)), **row.load)

    bench.check(*HEADS, "other", None)

    for name in HEADS:
        bench.engine.adapters.unload(name)


@pytest.mark.parametrize("task", ["token-classification", "sequence-classification"])
def test_the_task_may_be_told_at_loading(bench, tmp_path, task):
    kind = "TOKEN_CLS" if task.startswith("token") else "SEQ_CLS"
    row = HeadRow(kind, 3, lambda arch: {"target_modules": [arch.part]})
    made = make_head_cell(bench.arch, bench.model, row, tmp_path)
    change_json(made[0] / "adapter_config.json", task_type=None)
    head = bench.arch.last if kind == "SEQ_CLS" or bench.arch.name.startswith("qwen2") else "classifier"

    with pytest.raises(AdapterError, match=rf"has a head \('{head}.*does not say for which task") as caught:
        bench.engine.adapters.load("it", made[0])

    assert task in caught.value.hint
    bench.load("it", made, task=task)
    bench.check("it", None)
    bench.engine.adapters.unload("it")


WRONG = {
    "too few labels": ({"id2label": {0: "A", 1: "B"}}, r"has 3 labels; id2label names \[0, 1\]"),
    "a gap in the labels": ({"id2label": {0: "A", 1: "B", 3: "C"}}, r"has 3 labels; id2label names \[0, 1, 3\]"),
    "labels that are not numbered": ({"id2label": {"A": 0}}, "id2label maps numbers to names"),
    "an unknown task": ({"task": "token-clasification"}, "there is no task 'token-clasification'"),
    "an unknown problem": ({"problem_type": "ranking"}, "there is no problem_type 'ranking'"),
    "another task than the files say": ({"task": "sequence-classification"}, "is for 'token-classification', not"),
}


@pytest.mark.parametrize(("options", "told"), WRONG.values(), ids=WRONG)
def test_what_is_wrongly_said_of_a_head_is_refused(bench, tmp_path, options, told):
    folder, _ = make_head_cell(bench.arch, bench.model, HeadRow("TOKEN_CLS", 3, ROWS["rank 1"].options), tmp_path)

    with pytest.raises(AdapterError, match=told):
        bench.engine.adapters.load("it", folder, **options)

    assert "it" not in bench.engine.adapters
    bench.check("other")


def test_labels_for_an_adapter_without_a_head_are_refused(bench, tmp_path):
    folder, _ = make_cell(bench.arch, bench.model, ROWS["rank 1"], tmp_path)

    with pytest.raises(AdapterError, match="has no head of its own, so id2label"):
        bench.engine.adapters.load("it", folder, id2label={0: "A"})


def test_a_saved_module_that_the_head_has_no_use_for_is_refused_by_name(bench, tmp_path):
    folder, _ = make_head_cell(bench.arch, bench.model, HeadRow("TOKEN_CLS", 3, ROWS["rank 1"].options), tmp_path)
    file = folder / "adapter_model.safetensors"
    change_tensors(file, lambda found: {**found, "base_model.model.extra.weight": torch.ones(3, 64)})

    with pytest.raises(AdapterError, match="changes 'extra'"):
        bench.engine.adapters.load("it", folder)


def test_a_base_without_a_head_cannot_classify(bench):
    with pytest.raises(RequestError, match="no head for"):
        bench.engine.classify(TEXTS[0], adapter="other")


@pytest.mark.parametrize("task", ["token", "sequence"])
@pytest.mark.parametrize("arch", ARCHS[:5], ids=lambda arch: arch.name)
def test_an_adapter_without_a_head_uses_the_one_of_the_base(arch, task, tmp_path, host):
    row = HeadRow("TOKEN_CLS" if task == "token" else "SEQ_CLS", 3, ROWS["rank 1"].options)
    model = arch.task_model(getattr(arch, task), arch.model(), row.labels)
    model.save_pretrained(tmp_path / "base")
    head = next(name for name in ("classifier.out_proj", "classifier", "score") if has(model, name))
    expected = {None: answers(model, row)}
    lora = Row(lambda arch: {"target_modules": [arch.dense, head]})
    made = make_cell(arch, model, lora, tmp_path / "lora", head=row)

    with make_engine(arch, tmp_path / "base", host) as engine:
        bench = Bench(arch, model, engine, expected)
        bench.load("it", made)
        bench.check("it")
        bench.check(None, "it")


def has(model, name):
    return any(path == name for path, _ in model.named_modules())


def make_base_without_pooler(arch, folder):
    whole = arch.model()
    whole.save_pretrained(folder)
    change_tensors(
        folder / "model.safetensors",
        lambda found: {name: tensor for name, tensor in found.items() if not name.startswith("pooler.")},
    )
    return whole


def test_a_head_that_needs_a_pooler_is_refused_by_a_base_without(tmp_path, host):
    whole = make_base_without_pooler(ARCHS[0], tmp_path / "base")
    row = HeadRow("SEQ_CLS", 3, ROWS["rank 1"].options)
    folder, _ = make_head_cell(ARCHS[0], whole, row, tmp_path / "lora")

    with (
        lorax.load(tmp_path / "base", host=host) as engine,
        pytest.raises(AdapterError, match=r"'pooler\.dense\.weight'"),
    ):
        engine.adapters.load("it", folder)


def test_an_adapter_may_bring_its_own_pooler(tmp_path, host):
    whole = make_base_without_pooler(ARCHS[0], tmp_path / "base")
    row = HeadRow("SEQ_CLS", 3, lambda arch: {"target_modules": [arch.part], "modules_to_save": ["pooler"]})
    made = make_head_cell(ARCHS[0], whole, row, tmp_path / "lora")

    with make_engine(ARCHS[0], tmp_path / "base", host) as engine:
        bench = Bench(ARCHS[0], whole, engine, {None: answers(whole)})
        bench.load("it", made)
        bench.check(None, "it")


def test_the_committed_page_is_the_one_that_is_made(repository):
    assert (repository / "docs/adapters.md").read_text(encoding="utf-8") == pages.adapters(), (
        "the page is old; `PYTHONPATH=tests/support python -c 'import pages; print(pages.adapters(), end=\"\")'` makes it"
    )
