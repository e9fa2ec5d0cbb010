"""posthouse: a mail platform from one site file."""

__version__ = "0.1.0"
