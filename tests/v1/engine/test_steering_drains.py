# SPDX-License-Identifier: Apache-2.0
"""Several callers drain one module, and some of them leave."""

from __future__ import annotations

from vllm.v1.engine.steering_drains import Drains


def test_the_last_caller_to_leave_opens_the_module() -> None:
    drains = Drains()
    for caller in ("a", "b", "a"):
        drains.join("sea", caller)
    drains.join("gg", "c")
    assert not drains.leave("sea", "a")
    # One that does not drain: its call was refused, or ended while it loaded.
    assert not drains.leave("sea", "d")
    assert drains.leave("sea", "b")
    assert not drains.leave("gg", "b")


def test_a_change_ends_the_drains_of_its_module() -> None:
    drains = Drains()
    for name in ("sea", "gg"):
        drains.join(name, "a")
    drains.end("sea")
    assert drains.leave("sea", "b")
    assert not drains.leave("gg", "b")
