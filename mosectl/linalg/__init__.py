"""Rotations and spectra: matrices only, no files and no models."""
