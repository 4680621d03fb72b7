"""Groups of probes: what data sets call them, and what mosectl calls those that mean the same."""

from __future__ import annotations

NEIGHBOURS = "neighborhood"  # the same relation of other subjects
SAME_SUBJECT = "same_subject"  # other relations of the edited subject
FORGETFULNESS = "forgetfulness"  # other objects of the edited relation, where a subject has several
# CounterFact and EasyEdit; RippleEdits and KnowEdit (its Relation_Specificity asks other relations of the same subject).
_MEANT = {
    NEIGHBOURS: ("neighborhood", "neighbourhood", "neighbors", "neighbours", "neighborhood_prompts"),
    SAME_SUBJECT: ("same_subject", "samesubject", "relation_specificity", "relationspecificity"),
    FORGETFULNESS: ("forgetfulness", "preservation"),
}
_CANONICAL = {name: group for group, names in _MEANT.items() for name in names}
_SHOWN = {NEIGHBOURS: "neighbours", SAME_SUBJECT: "same subject"}


def canonical(name: str) -> str:
    """mosectl's name for a group; a name that is not known stays as it is given."""
    return _CANONICAL.get("_".join(name.lower().replace("-", " ").replace("_", " ").split()), name)


def shown(group: str) -> str:
    """A group's name in tables."""
    return _SHOWN.get(group, group)
