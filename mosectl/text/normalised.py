"""Text as question answering compares it; of SQuAD (arXiv 1606.05250), `normalize_answer` of its evaluate script."""

from __future__ import annotations

import re
import string
import unicodedata

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_CITY = re.compile(r"^city of (?=\S)")


def normalised(text: str) -> str:
    """In lower case, without punctuation, articles, a leading "city of", and spaces that say nothing."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return _CITY.sub("", " ".join(_ARTICLE.sub(" ", kept).split()))
