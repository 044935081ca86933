# SPDX-License-Identifier: Apache-2.0
"""Every release of SAELens's list can be used with its model, or is refused by name."""

from __future__ import annotations

from collections import Counter

import coverage_of_public_saes as tool
import pytest
from make_saelens_table import rules_of

from vllm.model_executor.model_loader.sae_formats.saelens_list import releases


def an_id(row: dict) -> str:
    """An id that the release's first rule, or its list, knows."""
    for pattern, _ in row.get("rules", ()):
        return pattern.replace("{}", "5")
    return next(iter(row["listed"]))


def test_no_release_is_unknown() -> None:
    states: Counter[str] = Counter()
    for name, row in releases().items():
        verdict = tool.judge(name, row["model"], an_id(row))
        assert verdict.state != "unknown", f"{name}: {verdict.reason}"
        states[verdict.state] += 1
    # Ten of normalised GPT-2 and Mistral, two temporal, one cross-layer.
    assert states["refused"] <= 13
    assert states["usable"] >= 155


def test_a_model_that_is_in_no_table_is_unknown() -> None:
    verdict = tool.judge(
        "gemma-scope-2b-pt-res", "other", "layer_5/width_16k/average_l0_7"
    )
    assert (verdict.state, verdict.reason) == ("unknown", "model other")


@pytest.mark.parametrize(
    ("pairs", "rules", "listed"),
    [
        ([("l1_8x", "L1-8x"), ("l2_8x", "L2-8x")], [["l{}_8x", "L{0}-8x"]], {}),
        # One id proves no rule, and no rule may map an unknown id to another's path.
        ([("l1", "L1")], [], {"l1": "L1"}),
        ([("a1", "x7"), ("a2", "x9")], [], {"a1": "x7", "a2": "x9"}),
    ],
)
def test_a_rule_is_only_made_of_what_the_ids_prove(
    pairs: list[tuple[str, str]], rules: list[list[str]], listed: dict[str, str]
) -> None:
    assert rules_of(pairs) == (rules, listed)
