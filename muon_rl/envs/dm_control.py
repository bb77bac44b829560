"""The DeepMind Control Suite."""

from __future__ import annotations

import ctypes.util
import difflib
import os
import sys
from typing import Any

import numpy as np
import torch
from torchrl.envs import CatTensors, Compose, DoubleToFloat, EnvBase, TransformedEnv
from torchrl.envs.libs.dm_control import DMControlEnv

from muon_rl.envs.base import EnvFactory

# Tasks place their targets and obstacles by writing to the model, so it is part of the state.
_MODEL_ARRAYS = (
    "geom_pos", "geom_quat", "geom_size", "body_pos", "body_quat", "site_pos", "site_size",
    "light_pos", "wrap_prm", "dof_damping", "jnt_stiffness", "hfield_data",
)  # fmt: skip


class DMControl(EnvFactory):
    """A task of the DeepMind Control Suite, its observations joined in the order of their names.

    Args:
        domain: such as ``cheetah``.
        task: such as ``run``.
        action_repeat: frames that each action is held for; rewards are summed over them.
        time_limit: simulated seconds after which an episode is truncated, > 0; the task's own
            where it is left out, mostly the 1000 frames that published returns are of.

    Raises:
        ValueError: if the suite has no such task, or ``time_limit`` is not above 0.

    Example:
        >>> factory = DMControl("cartpole", "swingup", action_repeat=2)
        >>> factory.make(seed=0).rollout(3)["observation"].shape
        torch.Size([3, 5])

    Source: Tunyasuvunakool et al. 2020, arXiv:2006.12983.
    """

    def __init__(
        self, domain: str, task: str, action_repeat: int = 1, time_limit: float | None = None
    ) -> None:
        super().__init__(action_repeat)
        if time_limit is not None and not time_limit > 0:
            raise ValueError(f"env.time_limit must be above 0, but is {time_limit}.")
        suite = _suite()
        tasks = [f"{d}-{t}" for d, t in suite.ALL_TASKS]
        if f"{domain}-{task}" not in tasks:
            close = difflib.get_close_matches(f"{domain}-{task}", tasks)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(tasks)}."
            raise ValueError(f"The DeepMind Control Suite has no task {domain}-{task}; {hint}")
        self.domain = domain
        self._task = task
        self.time_limit = time_limit

    @property
    def task(self) -> str:
        """The task's name: ``cheetah-run``."""
        return f"{self.domain}-{self._task}"

    def build(self) -> EnvBase:
        """Make the environment without counters."""
        options = {} if self.time_limit is None else {"time_limit": self.time_limit}
        env = DMControlEnv(self.domain, self._task, frame_skip=self.action_repeat, **options)
        names = sorted(env.observation_spec.keys())
        # unsqueeze_if_oor: some observations (a height) are scalars.
        join = CatTensors(names, out_key="observation", unsqueeze_if_oor=True)
        return TransformedEnv(env, Compose(join, DoubleToFloat()))

    def env_state(self, env: EnvBase) -> dict[str, Any]:
        """Return physics, model arrays, episode counters and random state."""
        import mujoco

        control = _control(env)
        physics = control.physics
        integration = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(physics.model.ptr, integration))
        mujoco.mj_getState(physics.model.ptr, physics.data.ptr, state, integration)
        _, keys, position, has_gauss, gauss = control.task.random.get_state()
        return {
            "physics": torch.from_numpy(state),
            "model": {
                name: torch.from_numpy(getattr(physics.model, name).copy())
                for name in _MODEL_ARRAYS
            },
            "random": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "step_count": control._step_count,
            "reset_next_step": control._reset_next_step,
        }

    def load_env_state(self, env: EnvBase, state: dict[str, Any]) -> None:
        """Set physics, model arrays, episode counters and random state."""
        import mujoco

        control = _control(env)
        physics = control.physics
        for name, array in state["model"].items():
            getattr(physics.model, name)[:] = array.numpy()
        mujoco.mj_setState(
            physics.model.ptr,
            physics.data.ptr,
            state["physics"].numpy(),
            mujoco.mjtState.mjSTATE_INTEGRATION,
        )
        # dm_control steps as mj_step2, mj_step1: the state lies between them. mj_forward would
        # move the solver's warm start, and with it the last bits of what follows.
        mujoco.mj_step1(physics.model.ptr, physics.data.ptr)
        keys, position, has_gauss, gauss = state["random"]
        control.task.random.set_state(
            ("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss)
        )
        control._step_count = state["step_count"]
        control._reset_next_step = state["reset_next_step"]


def _suite() -> Any:
    """Import the suite; where there is no screen, with EGL as its renderer or with none."""
    if sys.platform == "linux" and not {"DISPLAY", "MUJOCO_GL"} & set(os.environ):
        os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "disable"
    from dm_control import suite

    return suite


def _control(env: EnvBase) -> Any:
    """Return dm_control's own environment inside a TorchRL one."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    return env._env
