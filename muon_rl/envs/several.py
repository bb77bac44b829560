"""Several environments of one kind, stepped together: in this process, or each in its own."""

from __future__ import annotations

import signal
from functools import partial
from typing import Any

import torch
from torchrl.envs import EnvBase, ParallelEnv, SerialEnv, TransformedEnv

from muon_rl.envs.base import EnvFactory


class _KeepsThreads:
    """Leaves torch's threads as they are when it is closed, which may be whenever it is collected.

    TorchRL's own set them to more than the user may have allowed (torchrl 0.14).
    """

    def close(self, **options: Any) -> None:
        threads = torch.get_num_threads()
        try:
            super().close(**options)  # type: ignore[misc]
        finally:
            torch.set_num_threads(threads)


class _Serial(_KeepsThreads, SerialEnv):
    pass


class _Parallel(_KeepsThreads, ParallelEnv):
    pass


def make_several(
    factory: EnvFactory, number: int, *, seed: int | None = None, processes: bool = False
) -> EnvBase:
    """Make so many environments as one, whose tensors have a leading dim of that size.

    Args:
        factory: makes each of them.
        number: of environments, >= 1; one alone stays as it is, without that dim.
        seed: of the first environment; the others' follow from it.
        processes: whether each steps in a process of its own (quicker where a step of the
            simulator is slow and cores are free) rather than in turn in this one.

    Returns:
        An environment of batch size ``(number,)``, or of none if ``number`` is 1.
    """
    if number == 1 and not processes:
        return factory.make(seed=seed)
    if processes:
        make = partial(_build_in_worker, factory)
        env: EnvBase = _Parallel(number, make, num_threads=torch.get_num_threads())
    else:
        env = _Serial(number, factory.build)
    env = factory.count(env)  # once for all: a transform of each takes longer than a small world
    if seed is not None:
        env.set_seed(seed)
    return env


def states_of(factory: EnvFactory, env: EnvBase) -> Any:
    """Return the state of a running environment, or a list of those of several.

    Args:
        factory: made the environment.
        env: of :func:`make_several`.

    Returns:
        What :func:`load_states` takes, or ``None`` where it cannot be told: a simulator that does
        not say, or one in another process.
    """
    several = _several(env)
    if isinstance(several, ParallelEnv):
        return None
    if not isinstance(several, SerialEnv):
        return factory.env_state(env)
    states = [factory.env_state(one) for one in several._envs]
    return None if None in states else states


def load_states(factory: EnvFactory, env: EnvBase, states: Any) -> None:
    """Set running environments to what :func:`states_of` returned.

    Args:
        factory: made the environment.
        env: of :func:`make_several`, of as many environments.
        states: of :func:`states_of`.
    """
    several = _several(env)
    if not isinstance(several, SerialEnv):
        factory.load_env_state(env, states)
        return
    for one, state in zip(several._envs, states, strict=True):
        factory.load_env_state(one, state)


def _several(env: EnvBase) -> EnvBase:
    """Return what lies below the counters."""
    return env.base_env if isinstance(env, TransformedEnv) else env


def _build_in_worker(factory: EnvFactory) -> EnvBase:
    """Build an environment in a worker, which leaves Ctrl-C to the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return factory.build()
