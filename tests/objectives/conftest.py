"""Seeds the tests of losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

# TorchRL's advice to those who train; under -W error the filters of pyproject.toml do not hold.
ADVICE = ["ignore:No target network updater:UserWarning", "ignore:Found an eps value:UserWarning"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for advice in ADVICE:
                item.add_marker(pytest.mark.filterwarnings(advice))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
