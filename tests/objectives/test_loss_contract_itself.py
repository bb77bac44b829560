"""The contract refuses suites that leave something out."""

from __future__ import annotations

import pytest
from loss_contract import MISSING, LossContract

FACTS = {name: None for name, value in vars(LossContract).items() if value is MISSING}
WHOLE = {**FACTS, "test_ends_of_episodes": print}


def test_a_suite_that_lacks_a_test_is_refused():
    facts = {**WHOLE, "test_ends_of_episodes": MISSING}
    with pytest.raises(TypeError, match="TestIt must define test_ends_of_episodes"):
        type("TestIt", (LossContract,), facts)


def test_a_suite_that_takes_a_test_away_is_refused():
    with pytest.raises(TypeError, match="must define test_reductions"):
        type("TestIt", (LossContract,), {**WHOLE, "test_reductions": None})
    assert type("Whole", (LossContract,), WHOLE)
