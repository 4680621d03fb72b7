"""The version; apart, so that what writes it into a record need not import the package's face."""

__version__ = "0.1.0"
