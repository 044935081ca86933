# SPDX-License-Identifier: Apache-2.0
"""The comparison of two builds reads what cuobjdump prints, and sees each change."""

from __future__ import annotations

import compare_sass as tool
import pytest

SASS = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

	code for sm_80
	.target	sm_80

		Function : _Z5clampv
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   S2R R0, SR_CTAID.X ;  /* 0x0000000000007919 */
            /* 0x000ea20000002500 */
        /*0010*/              @!P0 EXIT ;  /* 0x000000000000894d */
            /* 0x000fea0003800000 */
		..........

Fatbin elf code:
================
arch = sm_90a

	code for sm_90a

		Function : _Z5clampv
        /*0000*/                   NOP ;  /* 0x0000000000007918 */
            /* 0x000fc00000000000 */
		Function : _Z4sortv
        /*0000*/                   EXIT ;  /* 0x000000000000794d */
            /* 0x000fea0003800000 */
"""

RESOURCES = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _Z5clampv:
  REG:56 STACK:0 SHARED:80 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z4sortv:
  REG:8 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

CLAMP, SORT = ("sm_90a", "_Z5clampv"), ("sm_90a", "_Z4sortv")
NOP = tool.Code(("0x0000000000007918 NOP ;",), "REG:8")
EXIT = tool.Code(("0x000000000000794d EXIT ;",), "REG:8")


def test_instructions_are_read_with_all_their_bits() -> None:
    found = tool.parse_sass(SASS)
    assert list(found) == [("sm_80", "_Z5clampv"), CLAMP, SORT]
    assert found["sm_80", "_Z5clampv"] == (
        "0x0000000000007919 S2R R0, SR_CTAID.X ;",
        "0x000ea20000002500",
        "0x000000000000894d @!P0 EXIT ;",
        "0x000fea0003800000",
    )
    assert found[SORT] == ("0x000000000000794d EXIT ;", "0x000fea0003800000")


def test_resources_belong_to_their_kernel() -> None:
    found = tool.parse_resources(RESOURCES)
    assert list(found) == [CLAMP, SORT]
    assert found[SORT].startswith("REG:8 STACK:16 SHARED:0 ")


def test_a_renamed_kernel_is_the_same_code() -> None:
    other = ("sm_90a", "_Z5orderv")
    result = tool.compare({CLAMP: NOP, SORT: EXIT}, {CLAMP: NOP, other: EXIT})
    assert result.is_same
    assert result.renamed == [(SORT, other)]


def test_the_same_code_of_another_target_is_no_twin() -> None:
    result = tool.compare({SORT: EXIT}, {("sm_80", "_Z4sortv"): EXIT})
    assert (result.gone, result.added) == ([SORT], [("sm_80", "_Z4sortv")])
    assert not result.is_same


@pytest.mark.parametrize(
    "other",
    [
        tool.Code(("0x0000000000007918 EXIT ;",), "REG:8"),
        tool.Code(("0x0000000000007919 NOP ;",), "REG:8"),
        tool.Code(("0x0000000000007918 NOP ;",) * 2, "REG:8"),
        tool.Code(("0x0000000000007918 NOP ;",), "REG:9"),
    ],
    ids=["text", "bits", "length", "registers"],
)
def test_a_change_is_seen(other: tool.Code) -> None:
    result = tool.compare({CLAMP: NOP}, {CLAMP: other})
    assert result.changed == [CLAMP]
    assert tool.describe(result) == [
        "changed: sm_90a _Z5clampv",
        "0 kernels are the same, 1 are not",
    ]
