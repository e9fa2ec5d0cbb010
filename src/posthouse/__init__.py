"""posthouse: a mail platform from one site file."""

__version__ = "0.1.0"


class PosthouseError(Exception):
    """Something that a person can mend: the message says where, what, and what to do."""
