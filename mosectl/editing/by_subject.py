"""Facts of one subject: the key of the subject's last token is the same for all of them, so they share a value.

Searched for one by one, the values of a batch ask different things of one key, and the solve meets each of them halfway
(MEMIT-Merge, arXiv 2502.07322); a later batch's would overwrite an earlier one's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import torch

from mosectl.editing.contexts import Contexts, rows_of
from mosectl.editing.targets import Targets
from mosectl.facts.records import Fact

ALONG = 20  # earlier facts of a batch's subjects that are edited along with it, at most


def sharing(subjects: Sequence[str], contexts: Contexts, search: Callable[[Contexts, bool], Targets]) -> Targets:
    """Targets of the contexts' facts, those of one subject searched for together.

    Args:
        subjects: of each fact, in the contexts' order.
        search: finds targets for contexts; with False it only says how their facts are as the model stands.
    Returns:
        Targets; loss, margin and steps of a fact are its subject's, loss and margin before any step its own.
    """
    numbers: dict[str, int] = {}
    group = torch.tensor([numbers.setdefault(s.casefold(), len(numbers)) for s in subjects])  # (facts,)
    if len(numbers) == len(subjects):
        return search(contexts, True)
    own = search(contexts, False)
    of_row = group.to(contexts.fact.device)[contexts.fact]  # (B,)
    order = of_row.argsort(stable=True)
    found = search(rows_of(replace(contexts, fact=of_row), order), True)
    back = order[contexts.is_edit[order]].argsort()  # where each of the contexts' edit rows went
    V = [v[back.to(v.device)] for v in found.V]
    told = (found.loss[group], found.margin[group], found.converged[group], found.steps[group])
    return Targets(V, *told, own.loss_before, own.margin_before)


def companions(facts: Sequence[Fact], edited: Collection[int], among: Iterable[int]) -> list[int]:
    """Numbers of the facts ``among`` these that are about a subject of the ``edited`` ones and are none of them, the last
    ALONG.
    """
    subjects = {facts[i].subject.casefold() for i in edited}
    return [i for i in among if i not in edited and facts[i].subject.casefold() in subjects][-ALONG:]
