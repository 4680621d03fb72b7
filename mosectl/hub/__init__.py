"""Patches and editors on the Hugging Face Hub."""
