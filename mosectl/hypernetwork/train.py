"""Training of HORSE's and MALMEN's hypernetwork on one model: told in :func:`train`.

Each step edits a batch of facts by the network as it is, asks the edited model for the new objects behind the facts' own
prompts and behind others that say the same, and compares its predictions elsewhere with the unedited model's. The
gradient of these losses by ΔW comes from the model alone, its way on from ΔW to the network from the network alone
(arXiv 2311.04661, §3.3), so that neither needs the other's memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mosectl.errors import EditFailed, UsageError
from mosectl.facts.corpus import Corpus
from mosectl.facts.records import Fact
from mosectl.hypernetwork.beforehand import AGAIN, RECORD, STATE, TrainOptions, belongs, check_belongs, prepared
from mosectl.hypernetwork.file import Editor, base_of
from mosectl.hypernetwork.network import Hypernet, keys_and_gradients, nll, shifted
from mosectl.model import distributed
from mosectl.model.architecture import resolve
from mosectl.model.edit_site import Projection
from mosectl.model.forward import frozen, input_device
from mosectl.model.loading import Loaded
from mosectl.model.losses import leads, token_nll
from mosectl.model.memory import Part, fitting, halving
from mosectl.model.positions import window
from mosectl.model.scoring import Pair, Rows, encode_pair, log_probabilities, paired
from mosectl.model.tokens import encode
from mosectl.model.weights import weight_of
from mosectl.storage.state_file import damaged, digest, read_state, write_state

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps of each parameter
UNITS = 256  # facts from which the network's units are taken
MATRICES, SCALARS = 0.1, 10.0  # of the rate
WORDS = 8  # of ordinary text before, and after, the place where predictions are compared


@dataclass(frozen=True)
class Losses:
    """What one edit of a batch came to, nats: of the new object behind its own prompts and behind others; KL elsewhere."""

    edit: float
    generalization: float
    locality: float
    reached: float  # share of own prompts whose whole answer is the likeliest
    weight: float  # of the KL

    @property
    def total(self) -> float:
        """What the training minimises."""
        return self.edit + self.generalization + self.weight * self.locality


def train(
    loaded: Loaded,
    facts: Sequence[Fact],
    options: TrainOptions,
    corpus: Corpus,
    *,
    validation: Sequence[Fact] = (),
    on_error: str = "fail",
    state: Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, int], None] | None = None,
    on_validation: Callable[[Mapping[str, float]], None] | None = None,
) -> Editor:
    """Train a hypernetwork that edits ``loaded.model``; the model itself is left as it was.

    Under ``accelerate launch`` every process edits its own batches and the network's gradients are averaged.

    Args:
        validation: facts that are not trained on; without them a share of ``facts`` is.
        on_error: facts and probes that are longer than the model can read: "fail", or "skip" them.
        state: file that keeps the state of the training after each validation.
        resume: go on from that state.
        on_validation: called with the history's newest entry.
    Raises:
        UsageError, FactsError, ModelError, OutputError. EditFailed: the loss is not finite.
    """
    projections, known, unseen = prepared(loaded.model, loaded.tokenizer, facts, validation, options, on_error)
    run = _Training(loaded, projections, known, unseen, options, corpus)
    kept = state if distributed.first() else None
    with frozen(loaded.model):
        if resume and state and state.exists():
            run.load(state)
        else:
            run.begin()
            if kept:
                run.save(kept)
        try:
            while run.step < options.steps and run.waited < options.patience:
                run.advance()
                if run.step % options.every == 0 or run.step == options.steps:
                    run.validate()
                    if on_validation:
                        on_validation(run.history[-1])
                    if kept:
                        run.save(kept)
                if on_step:
                    on_step(run.step, options.steps)
        except EditFailed as e:
            if kept:
                _settle(kept, int(run.history[-1]["step"]), e)
            raise
    return run.finished()


def _settle(kept: Path, learnt: int, error: EditFailed) -> None:
    """What becomes of a training's state after an error: told with it, or deleted where nothing was learnt."""
    if learnt:
        fix = f"{error.fix} and --overwrite, or take what was learnt before: --resume --steps {learnt}"
        raise EditFailed(error.what, where=error.where, fix=fix) from error
    kept.unlink(missing_ok=True)  # it would stand in the way of the next try


class _Training:
    """The network, its optimiser and how far the training is."""

    def __init__(
        self,
        loaded: Loaded,
        projections: list[Projection],
        facts: Sequence[Fact],
        validation: Sequence[Fact],
        options: TrainOptions,
        corpus: Corpus,
    ) -> None:
        self.loaded, self.model, self.projections = loaded, loaded.model, projections
        self.arch = resolve(loaded.model)
        self.facts, self.validation, self.options = facts, validation, options
        self.corpus = corpus
        self.texts = [words for t in corpus.texts if len(words := t.split()) >= 2 * WORDS]
        self.rank, self.world = distributed.rank(), distributed.world()
        if self.world > 1:
            distributed.join()
        torch.manual_seed(options.seed)
        p = projections[0]
        device = weight_of(self.model, p).device
        spread = options.method == "horse"
        self.net = Hypernet(len(projections), p.p, p.d, options.rank, options.blocks, spread).to(device)
        self.best = {k: v.clone() for k, v in self.net.state_dict().items()}
        matrices, scalars = [self.net.down, self.net.up, self.net.bias], [self.net.rate, self.net.ridge]
        groups: list[dict[str, Any]] = [
            {"params": [self.net.scale, self.net.shift]},
            {"params": matrices, "lr": MATRICES * options.rate},  # every token passes through these
            {"params": scalars, "lr": SCALARS * options.rate},  # logarithms, which have further to go
        ]
        self.adam = torch.optim.Adam(groups, lr=options.rate)
        self.step = self.waited = 0
        self.history: list[dict[str, float]] = []
        self.recent: list[float] = []  # training losses since the last validation

    def begin(self) -> None:
        """Take the network's units from the model's own keys and gradients."""
        rows = self._rows([paired(f, f.prompt, f.target_new) for f in self.facts[:UNITS]])
        K, G = self._keys(rows)
        weights = [p.oriented(weight_of(self.model, p).detach()) for p in self.projections]
        lengths = torch.stack([(k @ W.T.to(k)).norm(dim=1).mean() for k, W in zip(K, weights, strict=True)])
        self.net.fit(K, G, lengths)
        self.validate()

    def advance(self) -> None:
        """One step of the optimiser."""
        chosen = self._batch(self.step * self.world + self.rank)
        self.adam.zero_grad()
        losses = self.edited(chosen, learn=True)
        if not math.isfinite(losses.total):
            raise EditFailed("the loss is not finite", where=f"step {self.step}", fix="try a smaller --rate")
        if self.world > 1:
            from accelerate.utils import reduce

            for x in self.net.parameters():
                x.grad = reduce(x.grad, "mean")
        nn.utils.clip_grad_norm_(self.net.parameters(), self.options.clip)
        self.adam.step()
        self.step += 1
        self.recent.append(losses.total)

    def validate(self) -> None:
        """Edit the validation facts, batch by batch, and keep the network where it is the best so far."""
        size = min(self.options.batch_size, len(self.validation))
        groups = [self.validation[i : i + size] for i in range(0, len(self.validation) - size + 1, size)]
        found = [self.edited(group, learn=False) for group in groups]
        mean = {
            k: sum(getattr(x, k) for x in found) / len(found) for k in ("edit", "generalization", "locality", "reached")
        }
        total = sum(x.total for x in found) / len(found)
        if not math.isfinite(total):
            raise EditFailed("the validation loss is not finite", where=f"step {self.step}", fix="try a smaller --rate")
        trained = {"training": sum(self.recent) / len(self.recent)} if self.recent else {}
        lowest = min((h["validation"] for h in self.history), default=math.inf)
        self.history.append({"step": self.step, **trained, "validation": total, **mean})
        self.recent = []
        self.waited = 0 if total < lowest else self.waited + 1
        if not self.waited:
            self.best = {k: v.detach().clone() for k, v in self.net.state_dict().items()}

    def edited(self, facts: Sequence[Fact], learn: bool) -> Losses:
        """Edit ``facts`` together and see what that did; with ``learn`` the network's gradients are added to."""
        rng = random.Random(f"{self.options.seed} {self.step if learn else ''} {facts[0].prompt}")
        own = [paired(f, f.prompt, f.target_new) for f in facts]
        worded = [f for f in facts if f.rephrase_prompts]
        others = [paired(f, rng.choice(f.rephrase_prompts), f.target_new) for f in worded] or own
        edits = self._rows(own)
        K, G = self._keys(edits)
        with torch.set_grad_enabled(learn):
            shifts = self.net.shifts(K, self.net(K, G))
        leaves = [x.detach().requires_grad_(learn) for x in shifts]
        hits = 0

        def said(rows: Rows) -> Tensor:
            nonlocal hits
            with shifted(self.model, self.projections, leaves):
                logp = log_probabilities(self.model, rows)
            asked = rows.targets >= 0
            hits += int((leads(logp.detach(), rows.targets, asked) > 0).sum())
            return token_nll(logp, rows.targets, asked).sum() / len(facts)

        def rephrased(rows: Rows) -> Tensor:
            with shifted(self.model, self.projections, leaves):
                return nll(self.model, rows).sum() / len(others)

        def elsewhere(rows: Rows) -> Tensor:
            with torch.no_grad():
                before = log_probabilities(self.model, rows)
            with shifted(self.model, self.projections, leaves):
                now = log_probabilities(self.model, rows)
            return weight * (before.exp() * (before - now)).sum() / tokens

        weight = self.options.locality
        apart = self._rows(self._elsewhere(facts, rng))
        tokens = int((apart.targets >= 0).sum())
        losses = [
            self._sum(rows, loss, learn)
            for rows, loss in ((edits, said), (self._rows(others), rephrased), (apart, elsewhere))
        ]
        if learn:
            torch.autograd.backward(shifts, [leaf.grad for leaf in leaves])
        edit, generalization, locality = losses
        return Losses(edit, generalization, locality / weight if weight else 0.0, hits / len(facts), weight)

    def _sum(self, rows: Rows, loss: Callable[[Rows], Tensor], learn: bool) -> float:
        """A loss over all rows, in parts that fit in memory; its gradient is added up where there is one to take."""

        def work(start: int, end: int) -> float:
            with torch.set_grad_enabled(learn):
                found = loss(rows.part(start, end))
                if learn:
                    found.backward()
            return float(found.detach())

        return sum(self._in_parts(rows, work))

    def _in_parts(self, rows: Rows, work: Callable[[int, int], Part]) -> list[Part]:
        """``work`` on as many rows at once as a backward pass has room for."""
        tokens = float(rows.batch.attention_mask.sum(1).float().mean())
        size = fitting(self.model, self.arch, self.projections[0].layer, tokens, rows.targets.shape[1])
        return [found for _, found in halving(len(rows.targets), size, work)]

    def _keys(self, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
        def work(start: int, end: int) -> tuple[list[Tensor], list[Tensor], float]:
            return keys_and_gradients(self.model, self.projections, rows.part(start, end))

        parts = self._in_parts(rows, work)
        K, G = ([torch.cat(layer) for layer in zip(*(x[i] for x in parts), strict=True)] for i in (0, 1))
        return K, G

    def _elsewhere(self, facts: Sequence[Fact], rng: random.Random) -> list[Pair]:
        """What shall stay: a locality prompt of each fact, and a place in ordinary text for every fourth."""
        known = [[paired(f, p.prompt, p.answer) for p in f.locality if p.answer] for f in facts]
        pairs = [rng.choice(some) for some in known if some]
        for words in rng.sample(self.texts, min(-(-len(facts) // 4), len(self.texts))):
            at = rng.randint(WORDS, len(words) - WORDS)
            pairs.append((" ".join(words[at - WORDS : at]), " ".join(words[at : at + WORDS])))
        if (seen := window(self.model)).hard:
            pairs = [p for p in pairs if not seen.refuses(encode(self.loaded.tokenizer, p[0], None, p[1]).input_ids)]
        if not pairs:
            raise UsageError("nothing tells what shall stay", fix="give facts with locality prompts, or a --corpus")
        return pairs

    def _rows(self, pairs: Sequence[Pair]) -> Rows:
        encoded = [encode_pair(self.loaded.tokenizer, pair) for pair in pairs]
        return Rows.of(encoded, input_device(self.model))

    def _batch(self, number: int) -> list[Fact]:
        """Batch ``number`` of an endless shuffle of the facts, the same whenever it is asked for."""
        size = min(self.options.batch_size, len(self.facts))
        a_round = len(self.facts) // size
        order = list(range(len(self.facts)))
        random.Random(f"{self.options.seed} {number // a_round}").shuffle(order)
        start = number % a_round * size
        return [self.facts[i] for i in order[start : start + size]]

    def finished(self) -> Editor:
        """The best network, with its record."""
        self.net.load_state_dict(self.best)
        checkpoint = self.loaded.checkpoint
        sizes = {"p": self.net.p, "d": self.net.d, "facts": len(self.facts), "validated_on": len(self.validation)}
        return Editor(
            net=self.net.requires_grad_(False),
            method=self.options.method,
            modules=tuple(p.name for p in self.projections),
            base=self.base,
            model=checkpoint.model if checkpoint else type(self.model).__name__,
            revision=checkpoint.revision if checkpoint else None,
            model_type=self.arch.model_type,
            options={**asdict(self.options), **sizes, "corpus": self.corpus.name},
            history=[{k: float(f"{v:.6g}") for k, v in h.items()} for h in self.history],
            facts=digest([f.fields() for f in self.facts]),
        )

    @cached_property
    def base(self) -> dict[str, dict[str, Any]]:
        """The edited weights' fingerprints, which training does not change."""
        return base_of(self.projections, {p.name: weight_of(self.model, p) for p in self.projections})

    # State.

    def _belongs(self) -> dict[str, str]:
        known = belongs(self.facts, self.validation, self.options, self.corpus)
        return known | {"weights": digest(self.base)}

    def _names(self) -> list[str]:
        """The network's parameters as the optimiser numbers them."""
        names = {id(x): name for name, x in self.net.named_parameters()}
        return [names[id(x)] for group in self.adam.param_groups for x in group["params"]]

    def save(self, path: Path) -> None:
        """Write the state atomically."""
        kept = self.adam.state_dict()["state"]
        names = self._names()
        moments = {f"adam.{names[i]}.{k}": v for i, s in kept.items() for k, v in s.items() if isinstance(v, Tensor)}
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()} | moments
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        record = {"step": self.step, "waited": self.waited, "history": self.history, "belongs": self._belongs()}
        write_state(path, STATE, record, tensors)

    def load(self, path: Path) -> None:
        """Go on from a state.

        Raises:
            OutputError: it is damaged, or of another training.
        """
        ours = self.net.state_dict()
        limit = 10**8 + 8 * sum(x.numel() * x.element_size() for x in ours.values())
        record, tensors = read_state(path, STATE, RECORD, AGAIN, limit)
        check_belongs(self._belongs(), path, record)
        forms = {f"{part}.{k}": x.shape for part in ("net", "best") for k, x in ours.items()}
        for k, x in self.net.named_parameters() if record["step"] else ():
            forms |= {f"adam.{k}.{m}": x.shape if m != "step" else torch.Size() for m in MOMENTS}
        if not record["history"] or forms != {k: x.shape for k, x in tensors.items()}:
            raise damaged(path, "a history or tensors of another form", AGAIN)
        self.net.load_state_dict({k: tensors[f"net.{k}"] for k in ours})
        self.best = {k: tensors[f"best.{k}"].to(self.net.mean.device) for k in ours}
        state = {}
        if record["step"]:
            state = {i: {m: tensors[f"adam.{k}.{m}"] for m in MOMENTS} for i, k in enumerate(self._names())}
        self.adam.load_state_dict({"state": state, "param_groups": self.adam.state_dict()["param_groups"]})
        self.step, self.waited, self.history = record["step"], record["waited"], list(record["history"])
