"""What a method is: its name and settings, how it finds values, its update, its cost, what it needs and what may help.

A method is a subclass of :class:`Solver` (from keys and values to a new weight, layer by layer) or of :class:`Trainer` (it
trains on the model itself). One in a file of this package is found by the file's name; one of another package by an entry
point of the group ``mosectl.methods`` (docs/how-to/add-a-method.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor, nn

from mosectl.errors import UsageError
from mosectl.linalg.rotation import Compact
from mosectl.model.edit_site import Projection
from mosectl.model.moe import block_name

if TYPE_CHECKING:
    from mosectl.editing.contexts import Contexts
    from mosectl.editing.low_rank import Gram
    from mosectl.editing.second_moments import Moments
    from mosectl.facts.records import Fact
    from mosectl.hypernetwork.file import Editor
    from mosectl.model.architecture import Architecture

# Where the values come from that a layer shall write.
PER_LAYER = "per-layer"  # a target for each edited layer's output
SPREAD = "spread"  # one residual at the topmost edited layer, shared out among them (MEMIT §4.3)
NONE = "none"  # none are needed

# What the additive methods have in common as published: targets of any length, one solve, no care for earlier edits; and the
# search's settings for models of Llama's and Qwen's kind (EasyEdit's hparams; docs/explanation/methods.md lists others).
PUBLISHED: Mapping[str, Any] = {
    "preserve_norm": 0, "rounds": 1, "previous_edit_weight": 0.0, "optimizer": "published", "prefixes": 5,
    "steps": 25, "step_size": 0.5, "max_displacement": 4.0, "decay": 1e-3, "kl_weight": 0.0625,
}  # fmt: skip
BLOCK, FFN = "block", "ffn"  # whose output the published search moves

# What methods that train on the model have in common as published: the facts' own prompts, one pass, no care for earlier
# edits but what the method carries itself.
TRAINED: Mapping[str, Any] = {"rounds": 1, "previous_edit_weight": 0.0, "optimizer": "published", "prefixes": 0}


@dataclass(frozen=True)
class Published:
    """What a method's own code does, where not all do the same: which layers, and how it finds values (published.py)."""

    # By model type, "" = others: the first and the last edited layer, of how many.
    layers: Mapping[str, tuple[int, int, int]] = field(
        default_factory=lambda: {"gpt2": (13, 17, 48), "gptj": (3, 8, 28), "": (4, 8, 32)}
    )
    lengths: tuple[int, ...] = (10,)  # tokens of the prefixes that the model writes
    bare: float = 0.5  # the bare prompt's share in a fact's key; 0: as much as any prefixed one's
    site: str = BLOCK
    batch: int = 0  # facts a batch, where no batch size is given; 0: all

    def edited(self, model_type: str, n: int) -> tuple[int, ...]:
        """The layers at the published share of the depth, of a model of ``n`` layers."""
        first, last, of = self.layers.get(model_type, self.layers[""])
        width = min(last - first + 1, max(1, n - 1))
        start = min(first * n // of, n - width)
        return tuple(range(start, start + width))


@dataclass(frozen=True)
class Option:
    """One setting of a method: a number, and what it does."""

    default: float
    help: str
    whole: bool = False  # only whole numbers make sense


@dataclass(frozen=True)
class LayerProblem:
    """One layer's part of an edit, in the y = W k orientation, float64 and on one device but for C."""

    W: Tensor  # (d, p) the weight as it is now
    W0: Tensor  # (d, p) the weight before any edit of this run
    C: Tensor  # (p, p) second moment of the layer's keys over a corpus, E[k kᵀ]; any type, on any device: see kept()
    P: Tensor  # (p, p) sum of k kᵀ over earlier edits, which must keep still
    Q: Tensor  # (d, p) sum of v kᵀ over earlier edits, v being what the layer wrote when they were made
    K: Tensor  # (p, m) the facts' keys, one column a context
    V: Tensor  # (d, m) what the layer should write for them
    weight: Tensor  # (m,) weight of each column; a fact's columns sum to 1
    options: Mapping[str, float] = field(default_factory=dict)
    name: str = ""  # the layer's module path
    keep: float = 1.0  # scales C
    bare: Tensor | None = None  # (p, m) keys of the bare prompts alone, where K's are means over contexts

    def kept(self, scale: float = 1.0) -> Tensor:
        """A new (p, p) ``scale``·``keep``·C like W: gigabytes in a large model, so made where it is used and only once."""
        return self.C.to(self.W, copy=True).mul_(scale * self.keep)


@dataclass(frozen=True)
class Columns:
    """Keys, and what the layer should write for them."""

    K: Tensor  # (p, m) float64, one column a context
    V: Tensor  # (d, m)
    weight: Tensor  # (m,)


@dataclass(frozen=True)
class Still:
    """What must keep still, ordinary text and earlier edits, as one square: ‖(X − T) B½‖² with B = ``scale``·S Sᵀ."""

    S: Tensor  # (p, p) lower triangular
    scale: float
    T: Tensor  # (d, p) what serves it best: W₀ where nothing was edited before
    missing: Tensor | None = None  # (d, p) T − W of the weight W that a batch begins with; None: nothing
    weighed: Tensor | None = None  # (p, d) B (T − W)ᵀ


@dataclass(frozen=True)
class TurnProblem:
    """One layer's part of a batch for a method that seeks compact rotations: nothing of it is (p, p) but a factor."""

    W: Tensor  # (d, p) float64, the weight before this batch
    still: Still
    gram: Gram  # W Wᵀ
    facts: Columns
    options: Mapping[str, float] = field(default_factory=dict)
    name: str = ""  # the layer's module path
    keep: float = 1.0  # scales what must keep still


@dataclass(frozen=True)
class ModelProblem:
    """A batch's part of an edit, for a method that trains on the model itself."""

    model: nn.Module
    arch: Architecture
    projections: Sequence[Projection]
    contexts: Contexts
    W: Mapping[str, Tensor]  # (d, p) float64 by module path, the weights as they are in the live model
    options: Mapping[str, float]
    editor: Editor | None = None  # the trained editor, where the method needs one
    moments: Moments | None = None  # of ordinary text, where they were taken (needs_moments)
    earlier: Contexts | None = None  # of the facts edited so far
    # What the method left here in the batch before, as declared by Method.carries; it may leave other tensors.
    carried: dict[str, Tensor] = field(default_factory=dict)
    ending: int | None = None  # the tokenizer's end-of-text token
    seed: int = 0
    on_step: Callable[[int, int], None] | None = None  # is told how much of the fit is done, of how much


class Work(Protocol):
    """What an edit has to do, as the plan counts it; see :mod:`mosectl.editing.plan`."""

    def search_bytes(self) -> int: ...
    def search_seconds(self) -> dict[str, float]: ...
    def one_pass_bytes(self) -> int: ...
    def one_pass_seconds(self) -> dict[str, float]: ...
    def training_bytes(self) -> int: ...
    def training_seconds(self) -> dict[str, float]: ...


class Method(ABC):
    """One way to edit. The class attributes say what it is; an instance has no state."""

    name: ClassVar[str]
    side: ClassVar[str]  # what its patches hold, a key of mosectl.patch.change.SIDES
    source: ClassVar[str]  # publication
    placement: ClassVar[str]  # where values come from: PER_LAYER, SPREAD or NONE
    options: ClassVar[Mapping[str, Option]] = {}  # its own settings
    published: ClassVar[Published] = Published()
    settings: ClassVar[Mapping[str, Any]] = {}  # defaults of the edit and its targets that differ from the general ones
    editor: ClassVar[str] = ""  # the method for which an editor must be trained that this one needs
    remedy: ClassVar[str] = "more --rounds or other --layers"  # what may help where facts are not reached (advice.py)
    gentler: ClassVar[str] = (
        "a larger --set preserve=…, fewer facts, a hundred at once at most (--batch-size 100)"  # … where an edit does harm
    )

    @property
    def defaults(self) -> dict[str, float]:
        """Its own settings' defaults."""
        return {name: option.default for name, option in self.options.items()}

    @property
    def searches(self) -> bool:
        """It needs values, which an optimiser searches for."""
        return self.placement != NONE

    def form(self, asked: str) -> str:
        """The form of rotations that is sought, ``asked`` being one of options.FORMS."""
        return asked

    def needs_moments(self, form: str) -> bool:
        """Statistics over a corpus are of use to it (to a rotation that trains on the model: for its compact form)."""
        return self.searches or (self.side != "additive" and self.form(form) != "dense")

    def carries(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """Shapes of what it carries from batch to batch, by name; ``shapes``: (d, p) of edited weights by module path."""
        return {}

    def finish(self, W0: Tensor, W: Tensor, options: Mapping[str, float]) -> Tensor:
        """The weight (d, p) that the edit leaves, from the base W0 and the W of all batches: once, at the end."""
        return W

    def side_on(self, projections: Sequence[Projection]) -> str:
        """What the patch holds: a mixture of experts can only be turned, and from the output side.

        Raises:
            UsageError: the method, or these layers together, cannot do that.
        """
        mixed = [p for p in projections if not p.single_matrix]
        if not mixed:
            return self.side
        where = block_name(mixed[0].name)
        if self.side == "additive":
            fix = "use --method isospectral or mose"
            raise UsageError(f"'{self.name}' adds to one matrix, a mixture of experts has many", where=where, fix=fix)
        if len(mixed) < len(projections) and self.side != "output":
            what = "layers that are mixtures of experts and layers that are not, in one edit"
            raise UsageError(what, where=where, fix="choose --layers of one kind, or --method mose")
        return "output"

    # What it costs, for `edit --dry-run`.

    def columns(self, facts: Sequence[Fact]) -> int:
        """How many outputs a layer writes for these facts: the rank of an additive patch."""
        return len(facts)

    def peak_bytes(self, work: Work) -> int:
        """Memory beyond the model's weights."""
        return work.search_bytes()

    def seconds(self, work: Work) -> dict[str, float]:
        """Time by phase."""
        return work.search_seconds()


class Solver(Method):
    """From the keys an edited layer sees and what it should write for them to a new weight."""

    placement: ClassVar[str] = PER_LAYER

    @abstractmethod
    def update(self, problem: LayerProblem) -> Tensor:
        """The new weight W' (d, p) float64 of one layer."""

    def settle(self, before: Tensor, after: Tensor, options: Mapping[str, float]) -> Tensor:
        """The weight (d, p) that a batch leaves, from those before and after its solves, once all layers are solved."""
        return after


class Turner(Solver):
    """A solver that can also seek compact rotations from the start, which is faster and makes small patches."""

    @abstractmethod
    def turns(self, problem: TurnProblem) -> tuple[Compact, Compact]:
        """L and R with W' = L W R, W being the weight before this batch."""


SMALL = 512  # hidden size up to which a dense solve takes a second, reaches more and can be cut down afterwards


def seeks_compact(solver: Method, form: str, d: int) -> bool:
    """Are compact rotations sought from the start, by this method in this form (of options.FORMS) at hidden size ``d``?"""
    wanted = solver.form(form)
    return isinstance(solver, Turner) and (wanted == "compact" or (wanted == "auto" and d > SMALL))


class Trainer(Method):
    """A method that trains on the model itself."""

    placement: ClassVar[str] = NONE

    @abstractmethod
    def fit(self, problem: ModelProblem) -> dict[str, Tensor]:
        """The new weights (d, p) float64 by module path, for one batch of facts."""
