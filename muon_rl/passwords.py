"""Passwords in addresses, which no record of a run is to hold."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"""(\w://[^\s/:@]*:)[^\s/"']+(?=@)""")


def without_passwords(text: str) -> str:
    """Return a text in which the passwords of all addresses are three stars.

    Args:
        text: an address, a command, a whole config.

    Example:
        >>> without_passwords("--uri=http://ada:secret@host:80/a sqlite:///mlflow.db")
        '--uri=http://ada:***@host:80/a sqlite:///mlflow.db'
    """
    return _PASSWORD.sub(r"\1***", text)
