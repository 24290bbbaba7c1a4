"""What a student learns from a teacher that computes beside it: its logits, and how its tokens relate.

Wraps the loss of a task, which knows nothing of it: the teacher reads each batch as the student does, with the same
ids. Knows nothing of optimisers, of files, or of targets that a teacher has written (``training.targets``).
"""

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.transformer import Layer, Transformer
from training.errors import TrainingError
from training.parents import ParentModel
from training.recipe import DistilRecipe
from training.tasks import Batch, Loss, span_positions

_LOGITS = ("label_logits", "span_logits", "word_logits")
"""Of these heads logits are learned; marks on sentences are not."""


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` over the last axis (Hinton et al. 2015, section 2).

    Both are ``(..., n)``, minus infinity at the same places or nowhere; the sum over all else, float32. The square
    keeps gradients as large as those of the task's own loss, whatever the temperature.
    """
    wanted = F.log_softmax(teacher.float() / temperature, dim=-1)
    found = F.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * _divergence(wanted, found)


def relation_loss(student: Tensor, teacher: Tensor, real: Tensor, heads: int) -> Tensor:
    """How far the relations among a layer's tokens are from the teacher's (Wang et al. 2021, equations 4 to 6).

    ``student`` is ``(3, b, s, d)``, queries, keys and values over all attention heads, ``teacher`` the same with a
    width of its own; each is cut anew into ``heads``. ``real`` ``(b, s)`` is True at tokens. A relation is
    ``softmax(A A^T / sqrt(d / heads))``. Returns the mean divergence over relations and heads, summed over real
    tokens.
    """
    # Mixed precision would round the scores, and on a CPU their logarithms, by more than the two differ in the end.
    with torch.autocast(real.device.type, enabled=False):
        wanted, found = (_relations(each, real, heads) for each in (teacher, student))
    rows = real[None, :, None, :, None]
    return _divergence(wanted.masked_fill(~rows, -torch.inf), found) / (3 * heads)


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """The sum of ``p (log p - log q)`` of log-probabilities; what has no probability adds nothing."""
    difference = (wanted - found).masked_fill(wanted == -torch.inf, 0.0)
    return (wanted.exp() * difference).sum()


def _relations(x: Tensor, real: Tensor, heads: int) -> Tensor:
    """Logarithms of the relations of ``x`` ``(3, b, s, d)`` to real tokens: ``(3, b, heads, s, s)``."""
    parts = x.float().reshape(*x.shape[:-1], heads, -1).transpose(2, 3)  # (3, b, heads, s, d / heads)
    scores = parts @ parts.transpose(-2, -1) / parts.size(-1) ** 0.5
    return F.log_softmax(scores.masked_fill(~real[None, :, None, None, :], -torch.inf), dim=-1)


def reading_as(teacher: ParentModel, tokenizer: Tokenizer) -> Transformer:
    """The teacher, in the ids of ``tokenizer``, whose tokens must all be the teacher's too.

    So it reads and scores what the student does, token by token. Raises ``TrainingError`` where it lacks a token.
    """
    theirs, ours = teacher.tokenizer.get_vocab(), tokenizer.get_vocab()
    missing = sorted(ours.keys() - theirs.keys())
    if missing:
        raise TrainingError(
            f"the teacher {teacher.name} lacks {len(missing):,} of the student's {len(ours):,} tokens, such as "
            f"{missing[0]!r}: a student that learns its logits or relations takes its tokenizer ([init], "
            "tokenizer.kind = 'parent') or that of the same trunk; one that learns from what it writes need not"
        )
    kept = torch.tensor([theirs[token] for token in sorted(ours, key=ours.__getitem__)])
    model = Transformer(teacher.model.config.model_copy(update={"vocab_size": len(ours)}))
    state = teacher.model.state_dict()
    # Of a teacher of several tasks, the first one's weights.
    state = {name: state[name] for name in model.state_dict()}
    state["embed.token.weight"] = state["embed.token.weight"][kept]
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


class Watched:
    """A model that is used as any other, and keeps the logits that it was asked for and one layer's q, k and v."""

    def __init__(self, model: Transformer, layer: int) -> None:
        self._model = model
        self._qkv = cast(Layer, _stack(model)[layer]).attn.qkv
        self.logits: Tensor | None = None
        self.qkv: Tensor | None = None

    def __enter__(self) -> Self:
        self._hook = self._qkv.register_forward_hook(self._keep_qkv)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _keep_qkv(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.qkv = torch.stack(output.chunk(3, dim=-1))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        if name not in _LOGITS:
            return found

        def kept(*inputs: Tensor) -> Tensor:
            self.logits = found(*inputs)
            return self.logits

        return kept


class Distilled:
    """A task's loss beside a teacher's: ``1 - weight`` of the one, ``weight`` of each kind of the other."""

    def __init__(self, task: Loss, teacher: Transformer, distil: DistilRecipe) -> None:
        self.task, self.teacher, self.distil = task, teacher, distil

    def count(self, batch: Batch) -> Sequence[float]:
        """As the task's; then places with logits, or tokens that relate to others."""
        counts = list(self.task.count(batch))
        # A class weighs what its label weighs only in the task's own loss.
        places = float(len(batch["lengths"])) if self.teacher.config.head == "classify" else counts[0]
        kinds = {"logits": places, "relations": float(batch["lengths"].sum())}
        return counts + [kinds[kind] for kind in self.distil.kinds]

    def loss(self, model: Transformer, batch: Batch) -> Sequence[Tensor]:
        """As the task's; then one part for each kind."""
        with Watched(model, -1) as student:
            parts = [(1 - self.distil.weight) * part for part in self.task.loss(cast(Transformer, student), batch)]
        layer = -1 if self.distil.layer is None else self.distil.layer
        self.teacher.to(batch["ids"].device)
        with torch.no_grad(), Watched(self.teacher, layer) as teacher:
            self.task.loss(cast(Transformer, teacher), batch)
        kinds = {"logits": self._logits, "relations": self._relations}
        return parts + [self.distil.weight * kinds[kind](student, teacher, batch) for kind in self.distil.kinds]

    def _logits(self, student: Watched, teacher: Watched, batch: Batch) -> Tensor:
        assert student.logits is not None
        assert teacher.logits is not None
        both = student.logits, teacher.logits
        if self.teacher.config.head == "span":
            allowed = span_positions(batch)[..., None]
            both = tuple(each.masked_fill(~allowed, -torch.inf).transpose(1, 2) for each in both)  # type: ignore[assignment]
        return soft_cross_entropy(*both, self.distil.temperature)

    def _relations(self, student: Watched, teacher: Watched, batch: Batch) -> Tensor:
        assert student.qkv is not None
        assert teacher.qkv is not None
        real = torch.arange(batch["ids"].size(1), device=batch["ids"].device) < batch["lengths"][:, None]
        return relation_loss(student.qkv, teacher.qkv, real, self.distil.relation_heads)


def _stack(model: Transformer) -> nn.ModuleList:
    """The layers whose tokens relate: those that read."""
    return model.encoder if model.config.has_encoder else model.decoder


def with_teacher(
    task: Loss,
    student: Transformer,
    tokenizer: Tokenizer,
    teacher: ParentModel,
    distil: DistilRecipe,
    labels: tuple[str, ...],
) -> Distilled:
    """The task as a student of ``teacher`` learns it, its ``labels`` in the order of its logits.

    Raises ``TrainingError`` where the two do not fit together.
    """
    ours, theirs = student.config, teacher.model.config
    for name in ("architecture", "head", "n_labels"):
        wanted, found = getattr(theirs, name), getattr(ours, name)
        if wanted != found:
            raise TrainingError(f"model.{name}: the teacher {teacher.name} has {wanted}, the recipe {found}")
    if teacher.labels != labels and theirs.head == "classify":
        raise TrainingError(
            f"labels: the teacher {teacher.name} has {', '.join(teacher.labels)}; "
            "name the same in the same order, for logits are compared one by one"
        )
    heads = distil.relation_heads
    for width in (ours.d_model, theirs.d_model) if "relations" in distil.kinds else ():
        if width % heads:
            raise TrainingError(f"distil.relation_heads: {heads} do not divide d_model {width}")
    depth = len(_stack(teacher.model))
    if distil.layer is not None and distil.layer >= depth:
        raise TrainingError(f"distil.layer: the teacher {teacher.name} has {depth} layers, counted from 0")
    return Distilled(task, reading_as(teacher, tokenizer), distil)
