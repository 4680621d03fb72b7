"""A run of several batches is brought nearer to what all of its edits ask for together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mosectl
from mosectl.editing import session
from mosectl.editing.edited_layers import EditedLayers
from support.facts import CORPUS, FACTS, few
from support.models import make_tokenizer, pico

THIRD = {"prompt": "They saw Brinmouth", "subject": "Brinmouth", "target_new": "of"}


def missed(layers: EditedLayers) -> list[float]:
    """Of each layer ‖(W − T)A½‖², A = λC + P and T A = λW₀C + Q, by dense algebra."""
    found = []
    for p in layers.projections:
        turns, (P, Q) = layers.turns[p.name], layers.moments[p.name]
        assert turns.root is not None
        still = layers.solver_options["preserve"] * turns.root @ turns.root.T
        A = still + P
        off = layers.W[p.name] - torch.linalg.solve(A, (turns.W0 @ still + Q).T).T
        found.append(float(((off @ A) * off).sum()))
    return found


@pytest.mark.parametrize(
    ("how", "every", "expected"),
    [
        ({}, 1, 3), ({}, 2, 2), ({}, 3, 1), ({}, 4, 0), ({"batch_size": 0}, 1, 0), ({"previous_edit_weight": 0.0}, 1, 0),
        ({"form": "dense"}, 1, 0),
    ],
)  # fmt: skip
def test_batches_leave_less_undone(
    how: dict[str, Any], every: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = EditedLayers.consolidate, []

    def consolidate(self: EditedLayers) -> None:
        before, start = missed(self), dict(self.W)
        real(self)
        seen.append((before, missed(self)))
        for p in self.projections:
            assert torch.allclose(torch.linalg.svdvals(self.W[p.name]), torch.linalg.svdvals(self._base(p)), rtol=1e-10)
            assert torch.linalg.matrix_rank(self.W[p.name] - start[p.name], rtol=1e-9) <= 4 * (
                min(self.W[p.name].shape) // 6
            )

    monkeypatch.setattr(EditedLayers, "consolidate", consolidate)
    monkeypatch.setattr(session, "TOGETHER", every)
    (tmp_path / "corpus.txt").write_text(CORPUS)
    options = few(str(tmp_path / "corpus.txt"), **{"layers": "0,1", "batch_size": 1, "form": "compact", **how})
    mosectl.edit([*FACTS, THIRD], pico("llama"), make_tokenizer(), options=options, refuse=False)
    assert len(seen) == expected
    for before, after in seen:
        assert all(b < a for a, b in zip(before, after, strict=True))
