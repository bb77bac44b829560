"""A method's name, made from the keys of its config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from muon_rl.cli import ConfigError

LONGEST = 200  # bytes; most file systems take 255
_FIELD = re.compile(r"\$\{([^}]*)\}")


def fill(template: str, config: Mapping[str, Any]) -> str:
    """Return a name with each ``${key}`` replaced by the config's value.

    Args:
        template: such as ``SAC_${model.optimizer.actor.case}``.
        config: values by dotted key, ``init_args`` left out of them.

    Raises:
        ConfigError: if there is no such key, or it holds further keys.

    Example:
        >>> fill("sac_${env.domain}_${model.actor.hidden}", {"env.domain": "cartpole",
        ...      "model.actor.hidden": [256, 256]})
        'sac_cartpole_256-256'
    """

    def value(match: re.Match[str]) -> str:
        key = match[1].strip().replace(".init_args", "")
        if key not in config:
            close = difflib.get_close_matches(key, config, n=2)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(f"method_name={template} names {key}, but no key is that.{hint}")
        return _written(config[key])

    name = _FIELD.sub(value, template)
    if "${" in name:
        raise ConfigError(f"method_name={template} opens a ${{ that nothing closes.")
    return name


def check(name: str) -> None:
    """Raise if a method's name cannot be that of a folder.

    Args:
        name: filled in.

    Raises:
        ConfigError: if it is blank, too long, has a slash or what cannot be printed, or is a dot
            or two.
    """
    if name in (".", "..") or set("/\\") & set(name):
        raise ConfigError(f"method_name names a folder, so it takes no slash, but is {name!r}.")
    if name != name.strip() or not name or not name.isprintable():
        raise ConfigError(
            "method_name names a folder, so it takes neither blanks at its ends nor what cannot be "
            f"printed, but is {name!r}."
        )
    if len(name.encode()) > LONGEST:
        raise ConfigError(
            f"method_name names a folder, so it has at most {LONGEST} bytes, but {name[:40]}... "
            f"has {len(name.encode())}: take fewer keys."
        )


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "-".join(map(_written, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value)
