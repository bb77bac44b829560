"""A method's name, made from the keys of its config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from muon_rl.cli import ConfigError

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


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "-".join(map(_written, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value)
