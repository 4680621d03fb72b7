"""The patch: its format, what it changes in a weight, how patches are composed and compared."""
