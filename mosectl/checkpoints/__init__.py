"""Patches on a checkpoint folder or a live model: apply, revert, journal, audit, conflicts, export."""
