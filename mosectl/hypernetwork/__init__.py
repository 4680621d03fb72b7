"""The network of HORSE and MALMEN, its training and its file."""
