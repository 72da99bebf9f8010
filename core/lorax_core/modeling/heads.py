"""Heads: what turns rows of hidden into a task's answer.

Decides which rows a task reads and the arithmetic after the backbone. Knows nothing of sampling, of texts or of how rows got
into the batch. Several heads share one backbone.

A long text of a causal model comes in chunks. `forward` therefore answers a step, the engine joins the steps of a text
(sums of pooled rows add up, others follow each other), and `finish` makes the answer of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorax_core.kernels.elementwise import Activation
from lorax_core.modeling.activation import get_activation
from lorax_core.modeling.batch import HeadRows
from lorax_core.modeling.config import ModelConfig, Problem
from lorax_core.modeling.linear import KeepsBits, Linear
from lorax_core.modeling.norm import Norm
from lorax_core.modeling.site import HasAdapters
from lorax_core.types import Pooling, Task
from lorax_core.untrusted import is_number

CLASSIFICATION = (Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION)


class Head(KeepsBits):
    """Base of all heads. Parameters are named as in the checkpoint, for one table fills backbone and heads.

    `pooled` says that `forward` gives one row for each sequence, to be summed over chunks; otherwise one for each row.
    `fewest_bits` is how many bits its weights keep when a model is quantized.
    """

    task: ClassVar[Task]
    pooled: ClassVar[bool] = False
    fewest_bits: ClassVar[int] = 16

    @classmethod
    def build(cls, config: ModelConfig, names: Set[str], stated: Task | None) -> Self | None:
        """The head when the checkpoint has its weights, else None.

        `names` are the checkpoint's tensors under canonical names; `stated` is the task of the class that `config.json`
        names, which decides between heads whose tensors have the same names.
        """
        raise NotImplementedError

    def span(self, ids: Sequence[int], pool_from: int) -> range:
        """Which tokens of a whole text `ids` the head reads; pooling leaves out those before `pool_from`."""
        return range(len(ids) - 1, len(ids))

    if TYPE_CHECKING:

        def __call__(self, hidden: Tensor, rows: HeadRows) -> Tensor: ...

    def forward(self, hidden: Tensor, rows: HeadRows) -> Tensor:
        """hidden `[sum(rows.counts), hidden]`, the rows that were selected, to the step's answers."""
        raise NotImplementedError

    def finish(self, parts: list[Tensor], counts: list[int]) -> list[Tensor]:
        """Answers of whole texts from their joined parts; `counts` are the rows that went into each."""
        raise NotImplementedError

    def raw(self, parts: list[Tensor], counts: list[int]) -> list[Tensor]:
        """The same answers before their last step: logits and no probabilities, vectors of any length."""
        return parts


class LanguageModelHead(Head):
    """Logits over the vocabulary `[rows, vocab]`, in float32.

    With a `soft_cap` they stay between that and its negative (`cap * tanh(logits / cap)`, Gemma 2). A subclass whose layer has
    a bias says so in the class (`bias = True`, Phi).
    """

    task = Task.GENERATE
    fewest_bits = 8
    bias: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, *, soft_cap: float | None = None) -> None:
        super().__init__()
        if soft_cap is not None and not (is_number(soft_cap) and soft_cap > 0):
            raise ValueError(f"a soft cap of {soft_cap!r}; logits are capped at a number above 0")
        self.soft_cap = soft_cap
        self.lm_head = Linear(config.hidden_size, config.vocab_size, self.bias)

    @classmethod
    def build(cls, config: ModelConfig, names: Set[str], stated: Task | None) -> Self | None:
        # A tied head has no tensor of its own in most files.
        has_weight = config.tie_word_embeddings or "lm_head.weight" in names
        # A bias is never tied: without it, the checkpoint is of another class.
        has_all = has_weight and (not cls.bias or "lm_head.bias" in names)
        return cls(config) if has_all and config.generates else None

    def forward(self, hidden: Tensor, rows: HeadRows) -> Tensor:
        logits = self.lm_head(hidden, rows)  # [rows, vocab]
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        # Sampling compares and exponentiates logits; 16 bit would make ties of near ones.
        return logits.float()


class EmbeddingHead(Head):
    """One vector for a text: pooled rows, then an optional projection, then optionally scaled to unit length."""

    task = Task.EMBED
    pooled = True

    def __init__(self, hidden_size: int, pooling: Pooling, normalize: bool) -> None:
        super().__init__()
        self.pooling = pooling
        self.normalize = normalize
        # Filled after loading, from the files of sentence-transformers (`set_up_embedding`), not from the checkpoint.
        self.projections = nn.ModuleList()
        self._hidden = hidden_size

    @classmethod
    def build(cls, config: ModelConfig, names: Set[str], stated: Task | None) -> Self | None:
        # No weights needed, so every checkpoint has it; `set_up_embedding` replaces the pooling.
        return cls(config.hidden_size, Pooling.CLS, normalize=False)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        projections = [cast("Projection", module) for module in self.projections]
        return projections[-1].linear.out_features if projections else self._hidden

    def span(self, ids: Sequence[int], pool_from: int) -> range:
        return pooled_span(self.pooling, len(ids), pool_from)

    def forward(self, hidden: Tensor, rows: HeadRows) -> Tensor:
        # Sums, not means: chunks of one text add up, and `finish` divides by the count of all of them.
        # In float32, for a 16 bit sum over thousands of rows stops growing.
        sums = [part.sum(0, dtype=torch.float32) for part in torch.split(hidden, list(rows.counts))]
        return torch.stack(sums)  # [sequences, hidden]

    def finish(self, parts: list[Tensor], counts: list[int]) -> list[Tensor]:
        vectors = self._vectors(parts, counts)
        return list(F.normalize(vectors, dim=-1) if self.normalize else vectors)

    def raw(self, parts: list[Tensor], counts: list[int]) -> list[Tensor]:
        return list(self._vectors(parts, counts))

    def _vectors(self, parts: list[Tensor], counts: list[int]) -> Tensor:
        sums = torch.stack(parts)  # [texts, hidden]
        vectors = sums / torch.tensor(counts, device=sums.device)[:, None]  # [texts, hidden]
        for projection in self.projections:
            vectors = projection(vectors)
        return vectors


def pooled_span(pooling: Pooling, length: int, pool_from: int) -> range:
    """Which tokens of a text of `length` are pooled, those before `pool_from` left out."""
    match pooling:
        case Pooling.CLS:
            # A text that is nothing but prompt still needs a row; so below for the mean.
            first = pool_from if pool_from < length else 0
            return range(first, first + 1)
        case Pooling.LAST:
            return range(length - 1, length)
        case Pooling.MEAN:
            return range(min(pool_from, length - 1), length)


class Projection(nn.Module):
    """A dense layer on finished vectors, in float32, as sentence-transformers' `Dense` module."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: Activation) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
        self.linear.weight = nn.Parameter(weight.float(), requires_grad=False)
        if bias is not None:
            self.linear.bias = nn.Parameter(bias.float(), requires_grad=False)
        self.activation = activation

    def forward(self, vectors: Tensor) -> Tensor:
        return self.activation(self.linear(vectors))


class HeadTransform(nn.Module):
    """What some heads compute before the layer that gives the labels: a dense layer, an activation and a norm (ModernBERT)."""

    def __init__(self, hidden: int, act: str, norm: Norm, *, bias: bool = True) -> None:
        super().__init__()
        self.dense = Linear(hidden, hidden, bias)
        self._act = get_activation(act)
        self.norm = norm

    if TYPE_CHECKING:

        def __call__(self, hidden: Tensor, rows: HasAdapters) -> Tensor: ...

    def forward(self, hidden: Tensor, rows: HasAdapters) -> Tensor:
        """hidden `[rows, hidden]` to the same shape."""
        return self.norm(self._act(self.dense(hidden, rows)), rows)


class TokenClassificationHead(Head):
    """The probability of each label for each token `[rows, labels]`. The linear layer is called `layer` in checkpoints, and a
    `transform` before it `transform`."""

    task = Task.TOKEN_CLASSIFICATION
    layer: ClassVar[str] = "classifier"

    def __init__(self, config: ModelConfig, transform: HeadTransform | None = None) -> None:
        super().__init__()
        self.labels = config.labels
        self.transform = transform
        self.add_module(self.layer, Linear(config.hidden_size, len(self.labels)))

    @classmethod
    def build(cls, config: ModelConfig, names: Set[str], stated: Task | None) -> Self | None:
        if stated in CLASSIFICATION and stated is not cls.task:
            return None
        head = cls(config)
        return head if {name for name, _ in head.named_parameters()} <= names else None

    def span(self, ids: Sequence[int], pool_from: int) -> range:
        return range(len(ids))

    def forward(self, hidden: Tensor, rows: HeadRows) -> Tensor:
        classifier = cast("Linear", self.get_submodule(self.layer))
        if self.transform is not None:
            hidden = self.transform(hidden, rows)
        return classifier(hidden, rows).float()  # [rows, labels]

    def finish(self, parts: list[Tensor], counts: list[int]) -> list[Tensor]:
        # Each part is [tokens of one text, labels].
        return [part.softmax(-1) for part in parts]


class SequenceClassificationHead(Head):
    """The score of each label for a text `[labels]`: probabilities, independent ones when multi-label, raw for regression.

    Subclasses give `logits` and the row that it reads; `needed` are the tensors that make up the head.
    """

    task = Task.SEQUENCE_CLASSIFICATION
    pooled = True
    needed: ClassVar[tuple[str, ...]]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.labels = config.labels
        self.problem = config.problem

    @classmethod
    def build(cls, config: ModelConfig, names: Set[str], stated: Task | None) -> Self | None:
        if stated in CLASSIFICATION and stated is not cls.task:
            return None
        # BERT's classifier of tokens has `classifier` too; the pooler is what it lacks.
        return cls(config) if set(cls.needed) <= names else None

    def logits(self, hidden: Tensor, rows: HasAdapters) -> Tensor:
        """hidden `[sequences, hidden]`, one row for each, to `[sequences, labels]`."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, rows: HeadRows) -> Tensor:
        return self.logits(hidden, rows).float()

    def finish(self, parts: list[Tensor], counts: list[int]) -> list[Tensor]:
        logits = torch.stack(parts)  # [texts, labels]
        match self.problem:
            case Problem.REGRESSION:
                return list(logits)
            case Problem.MULTI_LABEL:
                return list(logits.sigmoid())
            case Problem.SINGLE_LABEL:
                return list(logits.softmax(-1))


class LastTokenClassificationHead(SequenceClassificationHead):
    """Reads the last token that is not padding, as causal models are trained: `score`, without bias."""

    needed = ("score.weight",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.pad_token_id = config.pad_token_id
        self.score = Linear(config.hidden_size, len(self.labels), bias=False)

    def span(self, ids: Sequence[int], pool_from: int) -> range:
        if self.pad_token_id is None:
            return super().span(ids, pool_from)
        # Padding ids inside the text count as padding too: transformers looks at ids only.
        # All padding: row 0, so that the span is never empty.
        last = next((at for at in reversed(range(len(ids))) if ids[at] != self.pad_token_id), 0)
        return range(last, last + 1)

    def logits(self, hidden: Tensor, rows: HasAdapters) -> Tensor:
        return self.score(hidden, rows)


class LogitScoreHead(SequenceClassificationHead):
    """One number for a text, as rerankers give it: the logit of one token as the next, less that of another (yes and no).

    `score_tokens` of the configuration are their ids. Where there are none, or the checkpoint has `score`, the head is a
    `LastTokenClassificationHead`. For models whose logits are those of `lm_head`, without a bias or a cap.

    A subclass may name the `pair_template`, a chat template that puts a query and a document (messages of these roles) into
    what the model was trained on. It is used where the checkpoint's own template leaves them out.
    """

    pair_template: ClassVar[str | None] = None
    needed = LastTokenClassificationHead.needed
    fewest_bits = 8  # of the layer that generating reads

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        # Where a file names a class that generates, its labels are the two that transformers makes up.
        self.labels = self.labels[:1]
        self.problem = Problem.REGRESSION
        self.tokens = config.score_tokens or ()
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def build(cls, config: ModelConfig, names: Set[str], stated: Task | None) -> Self | None:
        if config.score_tokens is None or set(cls.needed) <= names:
            # Another class and no subclass: it keeps more bits.
            return cast("Self | None", LastTokenClassificationHead.build(config, names, stated))
        # A tied head has no tensor of its own in most files.
        return cls(config) if config.tie_word_embeddings or "lm_head.weight" in names else None

    def logits(self, hidden: Tensor, rows: HasAdapters) -> Tensor:
        # In float32 before the difference: near logits of 16 bit would leave little of it.
        logits = self.lm_head(hidden, rows).float()  # [sequences, vocab]
        wanted, *other = (logits[:, [token]] for token in self.tokens)
        return wanted - other[0] if other else wanted  # [sequences, 1]


class PooledClassificationHead(SequenceClassificationHead):
    """Reads the first row of a text or the mean of all: a `transform`, then `classifier`.

    For models that see both sides, whose texts come in one chunk.
    """

    needed = ("transform.dense.weight", "classifier.weight", "classifier.bias")

    def __init__(
        self, config: ModelConfig, transform: HeadTransform, *, pooling: Literal["cls", "mean"] = "cls"
    ) -> None:
        super().__init__(config)
        self.pooling = Pooling(pooling)
        self.transform = transform
        self.classifier = Linear(config.hidden_size, len(self.labels))

    def span(self, ids: Sequence[int], pool_from: int) -> range:
        return pooled_span(self.pooling, len(ids), 0)

    def forward(self, hidden: Tensor, rows: HeadRows) -> Tensor:
        if self.pooling is Pooling.MEAN:
            # In float32, as the sums of `EmbeddingHead`.
            means = [part.mean(0, dtype=torch.float32) for part in torch.split(hidden, list(rows.counts))]
            hidden = torch.stack(means).to(hidden.dtype)  # [sequences, hidden]
        return super().forward(hidden, rows.pooled())

    def logits(self, hidden: Tensor, rows: HasAdapters) -> Tensor:
        return self.classifier(self.transform(hidden, rows), rows)


class FirstTokenClassificationHead(SequenceClassificationHead):
    """Reads the first row, as encoders are trained: a dense layer, an activation, and the layer that gives the labels.

    A subclass names the two layers as checkpoints do (`dense`, `output`, dotted names allowed) and may change `act`.
    """

    dense: ClassVar[str]
    output: ClassVar[str]
    act: ClassVar[str] = "tanh"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.needed = tuple(f"{layer}.{leaf}" for layer in (cls.dense, cls.output) for leaf in ("weight", "bias"))

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self._place(self.dense, Linear(config.hidden_size, config.hidden_size))
        self._place(self.output, Linear(config.hidden_size, len(self.labels)))
        self._act = get_activation(self.act)

    def span(self, ids: Sequence[int], pool_from: int) -> range:
        return range(1)

    def logits(self, hidden: Tensor, rows: HasAdapters) -> Tensor:
        dense, output = (cast("Linear", self.get_submodule(path)) for path in (self.dense, self.output))
        return output(self._act(dense(hidden, rows)), rows)  # [sequences, labels]

    def _place(self, path: str, layer: Linear) -> None:
        """Add a layer under a dotted name."""
        module: nn.Module = self
        *parents, name = path.split(".")
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.add_module(name, layer)
