"""The marking protocol holds in every order of its steps, and each step is needed."""

from __future__ import annotations

import pytest
from support.marking_model import LONG, MUTANTS, QUICK, search


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_every_order_of_the_steps_keeps_the_rules(name: str) -> None:
    found = search((QUICK | LONG)[name])
    assert found.fault is None, "; ".join(found.steps)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_step_that_is_changed_breaks_a_rule(mutant: str) -> None:
    found = search(MUTANTS[mutant], mutant)
    assert found.fault is not None, f"{found.states} states, and none breaks a rule"
