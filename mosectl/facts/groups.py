"""Groups of probes: what data sets call them, and what mosectl calls those that mean the same."""

from __future__ import annotations

NEIGHBOURS = "neighborhood"  # the same relation of other subjects
SAME_SUBJECT = "same_subject"  # other relations of the edited subject
FORGETFULNESS = "forgetfulness"  # other objects of the edited relation, where a subject has several
MULTI_HOP = "multi_hop"  # what follows from the edit and from other facts
# CounterFact and EasyEdit; RippleEdits (also misspelt in its README) and KnowEdit, whose Relation_Specificity asks other
# relations of the same subject; MQuAKE and WikiBigEdit.
_MEANT = {
    NEIGHBOURS: ("neighborhood", "neighbourhood", "neighbors", "neighbours", "neighborhood_prompts"),
    SAME_SUBJECT: (
        "same_subject", "samesubject", "relation_specificity", "relationspecificity", "relation_specifity",
    ),
    FORGETFULNESS: ("forgetfulness", "preservation"),
    MULTI_HOP: ("multi_hop", "multihop", "mhop"),
}  # fmt: skip
_CANONICAL = {name: group for group, names in _MEANT.items() for name in names}
_SHOWN = {NEIGHBOURS: "neighbours", SAME_SUBJECT: "same subject", MULTI_HOP: "multi-hop"}


def canonical(name: str) -> str:
    """mosectl's name for a group; a name that is not known stays as it is given."""
    return _CANONICAL.get("_".join(name.lower().replace("-", " ").replace("_", " ").split()), name)


def shown(group: str) -> str:
    """A group's name in tables."""
    return _SHOWN.get(group, group)
