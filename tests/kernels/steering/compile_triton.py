# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for a card, without a GPU; the interpreter checks fewer
things than the compiler. Run by test_interpreted.py, in a process with Triton:

    python compile_triton.py [CAPABILITY]

CAPABILITY is a key of `SHARED_KIB`; Hopper's is the default.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from triton.backends import backends

# vLLM's CPU build turns Triton off unless it has a backend of this name.
driver = SimpleNamespace(is_active=lambda: False)
compiler = SimpleNamespace(supports_target=lambda target: False)
backends.setdefault("cpu", SimpleNamespace(driver=driver, compiler=compiler))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vllm.model_executor.layers.steering_kernels import (  # noqa: E402
    clamp,
    combine,
    compact,
    dense,
    encode,
    flags,
    plan,
    readout,
    resolve,
    select,
    shared,
    shared_clamp,
    shared_read,
    skip,
)

# Shared memory of a block: A100, L40S, H100, B200, RTX PRO 6000.
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
CAPABILITY = int(sys.argv[1]) if len(sys.argv) > 1 else 90
MODEL = ("hidden", "residual", "source", "x", "w_enc", "w_dec", "w_skip", "columns")
INT32 = (
    "index", "flags", "table", "meta", "tokens", "records", "sync", "count",
    "places", "rows_of", "active",
)  # fmt: skip
INT64 = ("entries", "kth", "saturated", "packed")
READ = {"D": 96, "GATE": -1, "BF": 64, "BK": 64}
FLOAT32 = (
    "norm_limit", "b_enc", "threshold", "b_dec", "coef", "acts", "scores", "scores_of",
    "skip", "out",
)  # fmt: skip
CLAMP = {
    "D": 96, "HAS_RESIDUAL": True, "GATED": False, "MAX_CLAMPS": 8, "NC": 8,
    "BLOCK_D": 64, "ROW_D": 128,
}  # fmt: skip
COMBINE = {
    "LIST_MAX": 512, "D": 96, "HAS_RESIDUAL": True, "MAX_CLAMPS": 8, "NB": 16, "BD": 64,
}  # fmt: skip
DENSE = {"D": 96, "HAS_RESIDUAL": True, "MAX_CLAMPS": 8, "BT": 64, "BF": 64, "BD": 64}
SELECT = {"LIST_MAX": 512, "MAX_CLAMPS": 8, "CLAMP_BLOCK": 8}


def types(element: str) -> dict[str, str]:
    """Types of the kernels' arguments by name; any other one is an int."""
    found = dict.fromkeys(MODEL, f"*{element}")
    for names, kind in ((INT32, "i32"), (INT64, "i64"), (FLOAT32, "fp32")):
        found |= dict.fromkeys(names, f"*{kind}")
    return found


def compiles(
    kernel: Any,
    constants: dict[str, Any],
    launch: dict[str, int] | None = None,
    **others: str,
) -> str:
    """Raise unless the kernel compiles with these constants and fits a block.

    Returns its TTIR, which has one line for each operation.
    """
    known = types("bf16") | others
    names = [p.name for p in kernel.params]
    if "PDL" in names:
        constants = {**constants, "PDL": CAPABILITY >= 90}
    signature = {
        n: "constexpr" if n in constants else known.get(n, "i32") for n in names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", CAPABILITY, 32)
    made = triton.compile(source, target=target, options=launch or {"num_warps": 4})
    assert made.metadata.shared <= SHARED_KIB[CAPABILITY] * 1024, kernel.__name__
    print("compiled", kernel.__name__, flush=True)
    return made.asm["ttir"]


def encoders() -> None:
    """The encoder, which has tiles for short and for long steps.

    All of them must add the bias at the same end of the sum, or a token's bits would
    depend on the length of its step.
    """
    tma, width = CAPABILITY >= 90, 96
    bias_is_added_last = set()
    for tokens in (16, 64, 256):
        p = plan.plan_encode(tokens, 2, width)
        first, last = p.token_tiles[0], p.token_tiles[-1]
        middle = p.token_tiles[1] if len(p.token_tiles) > 1 else first
        rows = {"x_narrow": first, "x_middle": middle, "x_wide": last}
        rows["w"] = p.block_f
        types = {
            name: f"tensordesc<bf16[{n}, {p.block_k}]>" if tma else "*bf16"
            for name, n in rows.items()
        }
        tiles = {"BT_NARROW": first, "BT_MIDDLE": middle, "BT_WIDE": last}
        constants = {**tiles, "BF": p.block_f, "BK": p.block_k, "D": width, "TMA": tma}
        launch = {"num_warps": p.num_warps, "num_stages": p.num_stages}
        for out in ("*i64", "*fp32"):
            chosen = {**constants, "GROUP": 16, "DENSE": out == "*fp32"}
            text = compiles(encode.encode_kernel, chosen, launch, out=out, **types)
            bias_is_added_last.add(text.count("addf") == text.count("tt.dot "))
    assert len(bias_is_added_last) == 1, "the bias is added first or last, by the tiles"


def shared_kernels() -> None:
    """What ranks that share an SAE run besides the others."""
    compiles(shared.pack_kernel, {"LIST_MAX": 512})
    compiles(shared.merge_kernel, {"LIST_MAX": 512, "RANKS": 2})
    compiles(shared.order_dense_kernel, {"LIST_MAX": 512, "BLOCK": 1024})
    columns = {"W": 48, "HAS_RESIDUAL": True, "BLOCK": 64}
    compiles(shared.place_kernel, {**columns, "FILL": True})
    compiles(shared.write_kernel, {**columns, "RANKS": 2}, limit="fp32")
    steered = {"D": 96, "GATED": True, "ROW_D": 128, "BLOCK_D": 64}
    for source in (False, True):
        streams = {"HAS_RESIDUAL": not source, "HAS_SOURCE": source}
        compiles(shared.steered_kernel, {**steered, **streams})
    compiles(
        shared_read.merge_reads_kernel,
        {"RANKS": 4, "MAX_READ": 64, "OUT_ROW": 130, "N": 256},
        parts="*i32", keys="*i64", out="*i32",
    )  # fmt: skip
    clamps = {"HAS_RESIDUAL": True, "MAX_CLAMPS": 8, "NC": 8}
    compiles(shared_clamp.clamp_acts_kernel, {**clamps, "D": 96, "BLOCK_D": 64})
    compiles(shared_clamp.clamp_columns_kernel, {**clamps, "W": 48, "ROW_W": 64})


def main() -> None:
    """Every kernel, with the constants that change its code most."""
    sources = ({"D_IN": 96, "HAS_SOURCE": False}, {"D_IN": 40, "HAS_SOURCE": True})
    for source in sources:
        compiles(clamp.clamp_kernel, {**CLAMP, **source, "ENCODES": True})
        delta = {"DELTA": True, "HAS_SOURCE": source["HAS_SOURCE"], "HAS_SKIP": False}
        compiles(combine.combine_kernel, {**COMBINE, **delta})
    vectors = {**CLAMP, **sources[0], "ENCODES": False}
    compiles(clamp.clamp_kernel, vectors, w_dec="*fp32")
    full = {"DELTA": False, "HAS_SOURCE": True, "HAS_SKIP": True}
    compiles(combine.combine_kernel, {**COMBINE, **full})
    for topk in (False, True):
        both = {"TOPK": topk, "HAS_SKIP": topk}
        compiles(dense.decode_dense_kernel, {**DENSE, **both})
    tiles = {"BT": 64, "BK": 64}
    compiles(dense.encode_dense_kernel, {"D": 96, "BF": 64, **tiles})
    compiles(skip.skip_kernel, {"D_IN": 96, "D_OUT": 40, "BD": 64, **tiles})
    for topk, overflow in ((False, False), (False, True), (True, True)):
        reading = {**READ, "TOPK": topk, "OVERFLOW": overflow}
        compiles(readout.readout_kernel, reading, out="*i32", scale="*fp32")
    compiles(
        flags.flags_kernel, {"VOCAB": 100, "BLOCK": flags.BLOCK, "SLOTS": flags.SLOTS},
        tokens="i32", **dict.fromkeys(("ids", "tables", "counts"), "*i64"),
        **dict.fromkeys(("bits", "delta_rows", "full_rows", "starts", "masks"), "*i32"),
    )  # fmt: skip
    shared_kernels()
    encoders()
    compiles(resolve.resolve_kernel, SELECT)
    compiles(select.select_kernel, {**SELECT, "BLOCK": 2048})
    compiles(
        compact.compact_kernel,
        {"D": 96, "HAS_RESIDUAL": True, "GATE": -1, "PER_PROGRAM": 1, "SCAN": 256,
         "BLOCK_D": 128},
    )  # fmt: skip


if __name__ == "__main__":
    main()
