"""From facts to a patch."""
