"""The text of `docs/adapters.md`, made from the table that `tests/adapters/test_matrix.py` proves."""

from __future__ import annotations

from matrix import ARCHS, HEADS, ROWS
from oracles import TOLERANCE

_ADAPTERS = """\
# Adapters

What of PEFT's LoRA is supported on which architecture. A dot is a cell that `tests/adapters/test_matrix.py` proves on small
random models in float32, against PEFT with that adapter alone and unmerged, to {tolerance:.0e} of the largest number: alone, in
one batch with another adapter and the base, and after it was unloaded and loaded again. Architectures that generate are
compared by prompt log-probabilities and by embeddings, the others by embeddings; rows with labels by their classes and by
embeddings. A blank is what an architecture does not have, or PEFT cannot do on it. The page is made from the test's own table:

```sh
PYTHONPATH=tests/support python -c 'import pages; print(pages.adapters(), end="")' > docs/adapters.md
```

{table}

## Heads travel with adapters

An adapter that was trained as `TOKEN_CLS` or `SEQ_CLS` brings its own head, with any number of labels. It loads onto the bare
base or the generating checkpoint, and `engine.classify(text, adapter=name)` answers with that head; with a head of one label
`engine.rerank` does, too. Adapters that generate, embed or classify, whatever their heads, and the base share an `engine.run`.

- The task is the files' `task_type`, else `engine.adapters.load(name, path, task="token-classification")` (or
  `"sequence-classification"`). A head without either is refused.
  `load(..., adapters={{name: {{"source": path, "task": ...}}}})` takes the same.
- `id2label` names the labels; without it they are `LABEL_0`, `LABEL_1` and so on, never the base's names.
- `problem_type="multi_label_classification"` makes the scores of a text independent; one label alone is a raw number.
- An adapter without a head uses the base's, where the base has one. `engine.embed` ignores heads.
- How rows become a vector is not read from an adapter's files: it is the base's way, or what `load` or a request says
  (`pooling`, `normalize`).
- `engine.generate` with an adapter of labels is refused: it was trained under such a head, and that of the base would make
  noise of it.
- BERT's sequence head reads the pooler, which is the base's unless the adapter brings one.

## Tokenizers and chat templates

A chat template beside an adapter's files (`chat_template.jinja`, or in `tokenizer_config.json`) serves the requests that name
the adapter, and so does its tokenizer where its vocabulary is the base's: each token of the base has the same id there.
Tokens that it has beyond those are read and written, as long as the model has rows for their ids; an end token of its own
ends answers, too. A tokenizer of another vocabulary, or files that cannot be read, are an error when the adapter is loaded,
which names what differs. Constrained answers are held by a grammar over that tokenizer. Limits on the length of texts and
prompts of sentence-transformers stay those of the checkpoint. A weighted sum uses what all of its members use, else the
base's. On a base without a tokenizer an adapter's is left aside, with a warning. A merged adapter's serves the whole engine;
`adapters merge --base` does not copy it, and says so.

## Where adapters come from

A source is a folder, a hub id or a URL; only `*.json`, `*.safetensors` and the files of a tokenizer at its top are fetched, and
pickles never.

- **Folder**: the one that PEFT wrote. It has no revision.
- **Hub**: `org/name`, with `revision=` and `token=`. The hub's client keeps the files; offline, what it has is the answer.
- **URL**: any folder that fsspec reads, but for http and https, such as `s3://bucket/folder` (`pip install
  'lorax-core[s3]'`), `memory://` or `file://`. Credentials are the store's own, from the environment. It is listed each time;
  unchanged files are not fetched again. They lie in `$LORAX_CACHE` (else `$XDG_CACHE_HOME/lorax`, `~/.cache/lorax`); a broken
  download leaves nothing there.

`engine.adapters.load(name, source)` finds, reads and checks one. A request may also name a source itself
(`adapter="org/name"`): whatever has a slash and is no loaded name is loaded under that name first, once.
What a request may name so is `load(..., adapter_sources=...)`: kinds ("folder", "hub", "url"), folders with all below them,
and beginnings of URLs. By default folders and hub ids; with `[]` loaded names only. The `max_fetched_adapters` last used stay
loaded, and no source is awaited longer than `adapter_timeout` seconds. What is brought so, or by a client of a server, may have
`max_adapter_bytes` on disk; what the operator loads in Python may have any size.

## Where they are kept

An adapter is known by a hash of its content: two names of one content share its memory, and one that is loaded again under the
same name with other content never meets the pages of the old one. Requests keep the adapter that they began with.

By default every adapter is on the device. `load(..., max_adapters=32)` keeps the 32 that were last used, and copies of four
times as many in host memory (`max_cpu_adapters=`); the others are read from their source again when a request asks. `pin=True`
keeps one on the device. Loading happens beside the running engine: no step waits for it, and requests whose adapters are there
pass those whose are not. Adapters take turns in the queue, so one with a thousand requests delays another by one.

Files that changed on the disk meanwhile are an error for the requests that need them, until the adapter is loaded again.

## Weighted sums

`adapter={{"a": 0.7, "b": 0.3}}` adds 0.7 times what `a` adds and 0.3 times what `b` adds, exactly: their ranks stand side by
side in one product. Members are plain low-rank updates; one with a magnitude (DoRA), a replaced weight or bias, trained
tokens or a head is refused by name. A sum has its own identity, from those of its members and their weights.

## Medusa

A folder with `config.json` (`medusa_num_heads`, `medusa_num_layers`) and one safetensors file of heads is loaded like any
other, alone or with PEFT's files beside it. Its heads draft the tokens that follow the next one, the model verifies them in
the next step, and the answer is the one without them, token for token, sampled or greedy; `usage.accepted_tokens` says how
many drafts were right. Heads have an output layer of their own, or use the base's.

## Merging

`lorax adapters merge A B --out DIR` combines LoRA adapters into an ordinary PEFT adapter;
`lorax_core.merge_adapters` is the same in Python. The numbers are those of PEFT's `add_weighted_adapter`.
`--strategy` (`strategy=`) says how, `linear` where it is left out:

- `cat` is exact and its ranks add up; `svd` is the best approximation of the exact sum by `--rank` ranks; both take any
  ranks;
- `linear`, `ties`, `dare_linear`, `dare_ties` combine A and B each on their own, and need equal ranks module by module;
- `--weight` once for each adapter, negative ones subtract; `--density` for ties and dare; `--seed` for dare, torch's own
  state is untouched. A seed gives the same result each time; it is our own stream of random numbers, not PEFT's, whose order
  depends on the model: given the same masks, the numbers are PEFT's.

Where PEFT loses something silently we do not: rslora, `layers_to_transform`, rank patterns and modules that only some
adapters have come out exact. DoRA, biases, saved modules, heads and trained tokens have no sum and are refused by name.

`lorax adapters merge A --base CHECKPOINT --out DIR` (`merge_into_base`) writes the base with the adapter in its weights: same
files, names and dtypes, computed in float32, a shard at a time. DoRA, biases, saved modules and trained tokens are supported; a
tensor without a place is an error and leaves no folder. A change of one side of a tied weight writes both and sets
`tie_word_embeddings: false`; trained tokens change both sides. A head that travels with the adapter becomes the checkpoint's,
and `config.json` names its class and labels. `lorax adapters inspect A --base CHECKPOINT` says whether it fits.

`load(CHECKPOINT, merge_adapter=A)` does the same while the base is loaded, and writes nothing: each tensor is merged as it is
read, the sum is made in float32 and rounded once to the dtype that is computed with, and `quantize=` comes after it. A is a
source like any other. Requests pay nothing for a merged adapter; their own adapters come on top of it. `engine.info().notes`
says what was merged and what changed: a head and its task, a tie that was parted, a larger vocabulary. Commands that
load a model have `--merge-adapter`. What `adapters merge --base` refuses is refused, and Medusa's heads.

An adapter that was trained with more tokens than its base has (`resize_token_embeddings`) has rows for them in its files: saved
embeddings and an output head, or `trainable_token_indices`. Both ways of merging make the vocabulary larger. Unmerged such an
adapter is refused, with the number of tokens that it adds, as is a merge for which rows are missing.

## What is refused

By name, with the engine unharmed:

- a head without a task; a task, `problem_type` or `id2label` that does not exist, does not fit the head's rows, contradicts
  the files, or comes with an adapter that brings no head;
- a sequence head of BERT on a base that was saved without a pooler, and an adapter of the pooler there. (Where the base has
  one and no loaded task reads it, the adapter is loaded, and `adapters.list()` names the module as `unread`.)
- kinds other than LoRA and Medusa, settings that change the computation and are not in the table, initialisations that changed
  the base and were not converted (`pissa`, `olora`), and settings that the tensors contradict.
"""


def adapters() -> str:
    """The text of `docs/adapters.md`."""
    lines = [f"| adapter | {' | '.join(arch.name for arch in ARCHS)} |", "| --- |" + " :-: |" * len(ARCHS)]
    for name, row in ROWS.items():
        lines.append(f"| {name} | {' | '.join('•' if row.options(arch) else ' ' for arch in ARCHS)} |")
    lines += [f"| {name} | {' | '.join('•' for _ in ARCHS)} |" for name in HEADS]
    return _ADAPTERS.format(tolerance=TOLERANCE, table="\n".join(lines))
