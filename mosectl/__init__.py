"""mosectl: edit facts in open language models with orthogonal, portable, revertible patches."""

__version__ = "0.1.0"
