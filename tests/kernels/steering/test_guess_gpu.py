# SPDX-License-Identifier: Apache-2.0
"""TopK by guess and verify has the bits of the path that stores all scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from steering_reference import (
    DEVICE,
    INTERPRETED,
    check,
    expected,
    make_slot,
    make_step,
    make_stream,
    needs_gpu,
    random_clamps,
    set_row,
    settle,
    stream,
)

from vllm.config.steering import Activation, Tier
from vllm.model_executor.layers import (
    sae_full_reconstruction_kernel as kernel,
)
from vllm.model_executor.layers.steering_kernels import stages_cuda
from vllm.model_executor.layers.steering_kernels.plan import (
    GUESS_SAMPLE,
    most_rows,
)
from vllm.model_executor.layers.steering_state import (
    MetaField,
    SAESlot,
    StepState,
)

pytestmark = [
    pytest.mark.gpu,
    needs_gpu,
    pytest.mark.skipif(
        INTERPRETED or not kernel.extension_is_built(),
        reason="needs the CUDA extension",
    ),
]

APPLY = {Tier.FULL: kernel.full_reconstruction, Tier.DELTA: kernel.sae_clamp}
WIDE, D_MODEL = 65536, 64
TOKENS = 1200


def topk_slot(k: int, d_sae: int = WIDE, **options: object) -> SAESlot:
    """A TopK SAE; row 1 without clamps, row 2 with some of every kind."""
    slot = make_slot(d_sae, D_MODEL, Activation.TOPK, k=k, **options)  # type: ignore[arg-type]
    for table in (slot.full, slot.delta):
        set_row(table, 1, [])
        set_row(table, 2, random_clamps(d_sae, 8))
    return slot


class Both:
    """Runs a step with the guess and without it."""

    def __init__(self, slot: SAESlot, tokens: int = TOKENS, tier: Tier = Tier.FULL):
        rows = [1, 2, 0, 2] if tier is Tier.FULL else [2, 0, 2]
        self.slot, self.tokens, self.tier = slot, tokens, tier
        self.step: StepState = make_step(tokens, tokens, rows, tier)
        self.before = make_stream(tokens, D_MODEL, slot.weights.W_enc.dtype)
        self.workspace = kernel.SteeringWorkspace(tokens, [slot], DEVICE)
        self.failed = 0

    def run(self) -> list[torch.Tensor]:
        for arena in (self.workspace._x, self.workspace._shared, self.workspace._coef):
            arena.fill_(0xFF)
        found = [x.clone() for x in self.before if x is not None]
        self.workspace.failed.fill_(-7)
        APPLY[self.tier](self.slot, self.step, self.workspace, *found)
        self.failed = int((self.workspace.failed[: self.tokens] != 0).sum())
        return found

    def guessed_and_stored(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> list[list[torch.Tensor]]:
        guessed = self.run()
        failed = self.failed
        with monkeypatch.context() as patch:
            patch.setattr(stages_cuda, "takes_guess", lambda run: False)
            stored = self.run()
        self.failed = failed
        return [guessed, stored]

    def compare(self, monkeypatch: pytest.MonkeyPatch) -> int:
        """Both have the same bits; returns how many tokens' guess failed."""
        guessed, stored = self.guessed_and_stored(monkeypatch)
        for x, y in zip(guessed, stored, strict=True):
            assert torch.equal(x.view(torch.int16), y.view(torch.int16))
        edited = self.step.index[self.tier, : self.tokens] != 0
        assert torch.equal(guessed[0][~edited], self.before[0][~edited])
        return self.failed


@pytest.mark.parametrize("tier", [Tier.FULL, Tier.DELTA])
@pytest.mark.parametrize("k", [1, 8, 64, 200])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("tokens", [513, 1200])
def test_random_scores_are_guessed(
    tier: Tier, k: int, relu: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Both(topk_slot(k, topk_relu=relu), tokens, tier)
    assert both.compare(monkeypatch) <= 2


def test_the_reference_agrees() -> None:
    both = Both(topk_slot(32), 700)
    settle(both.slot, both.step, both.tier, stream(*both.before))
    found = both.run()
    assert both.failed <= 1
    want = expected(both.slot, both.tier, both.step, *both.before)
    check(want, both.before, (found[0], found[1]))


@pytest.mark.parametrize("d_sae", [65536, 65537, 70001, 131072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_width_is_guessed(
    d_sae: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = topk_slot(16, d_sae, dtype=dtype)
    tokens = most_rows(D_MODEL, D_MODEL, d_sae, 8, 2, topk=True) + 3
    assert Both(slot, tokens).compare(monkeypatch) <= 2


def test_a_smaller_module_in_a_wide_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    slot = topk_slot(16, 20001, capacity=WIDE)
    assert Both(slot).compare(monkeypatch) <= 2
    narrow = topk_slot(16, 900, capacity=WIDE)
    both = Both(narrow)
    assert both.compare(monkeypatch) == int((both.step.index[Tier.FULL] != 0).sum())


@pytest.mark.parametrize("k", [400, 513, 1500])
def test_a_large_k_is_left_to_stored_scores(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = Both(topk_slot(k), 700)
    assert both.compare(monkeypatch) == int((both.step.index[Tier.FULL] != 0).sum())


def sampled(d_sae: int) -> torch.Tensor:
    """The features that a guess samples: pairs of tiles at equal distances."""
    pairs = GUESS_SAMPLE // 256
    starts = [i * (d_sae // 256) // pairs * 256 for i in range(pairs)]
    return torch.cat([torch.arange(s, s + 256) for s in starts]).to(DEVICE)


def all_equal(slot: SAESlot) -> None:
    slot.weights.W_enc.zero_()
    slot.weights.b_enc.fill_(0.5)


def equal_at_the_end(slot: SAESlot) -> None:
    """Ties between features in and outside the sample; more than a list holds."""
    all_equal(slot)
    slot.weights.b_enc[:3] = 0.75
    slot.weights.b_enc[5000:5040] = 0.75


def a_tie_at_the_bar(slot: SAESlot) -> None:
    """Two hundred equal scores around the k-th, all of them candidates."""
    slot.weights.b_enc.mul_(0.01)
    slot.weights.W_enc.mul_(0.01)
    slot.weights.b_enc[torch.arange(0, WIDE, 330, device=DEVICE)] = 4.0
    slot.weights.W_enc[torch.arange(0, WIDE, 330, device=DEVICE)] = 0.0


def large_inside(slot: SAESlot) -> None:
    """The sample has all the large scores: the bar is far too high."""
    slot.weights.b_enc[sampled(WIDE)[:40]] += 50.0


def large_outside(slot: SAESlot) -> None:
    """The sample has none: the bar is far too low."""
    slot.weights.b_enc += 9.0
    slot.weights.b_enc[sampled(WIDE)] -= 9.0


def few_positive(slot: SAESlot) -> None:
    slot.weights.b_enc -= 4.0


def none_positive(slot: SAESlot) -> None:
    slot.weights.b_enc -= 40.0


def not_finite(slot: SAESlot) -> None:
    """Scores that are infinite, of both signs, and NaN."""
    slot.weights.b_enc[7] = float("inf")
    slot.weights.b_enc[9] = float("nan")
    slot.weights.b_enc[40001] = float("-inf")


SCORES = {
    f.__name__: f
    for f in (
        all_equal, equal_at_the_end, a_tie_at_the_bar, large_inside, large_outside,
        few_positive, none_positive, not_finite,
    )
}  # fmt: skip
FAIL = {"all_equal", "equal_at_the_end", "large_inside", "large_outside"}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("k", [5, 64])
def test_unlikely_scores_have_the_same_bits(
    name: str, relu: bool, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = topk_slot(k, topk_relu=relu)
    change: Callable[[SAESlot], None] = SCORES[name]
    change(slot)
    both = Both(slot)
    failed = both.compare(monkeypatch)
    if name in FAIL and (name, k) != ("large_inside", 5):
        assert failed == int((both.step.index[Tier.FULL] != 0).sum())


def test_tokens_past_the_norm_limit_and_skipped_ones_keep_their_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slot = topk_slot(16, norm_limit=40.0, skip_mask=2)
    both = Both(slot)
    both.step.flags[5] = 2
    both.before[0][7] = 30.0
    both.before[0][9, 3] = float("nan")
    both.compare(monkeypatch)
    found = both.run()
    for token in (5, 7, 9):
        bits = [x[0][token].view(torch.int16) for x in (found, both.before)]
        assert torch.equal(*bits)


def test_a_module_without_topk_in_a_slot_of_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = frozenset({Activation.TOPK, Activation.JUMPRELU})
    slot = make_slot(WIDE, D_MODEL, Activation.JUMPRELU, activations=kinds)
    set_row(slot.full, 1, [])
    set_row(slot.full, 2, [])
    assert Both(slot).compare(monkeypatch) == 0


def test_a_captured_guess_follows_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of one module runs another k, and scores whose guess fails."""
    slot = topk_slot(64)
    both = Both(slot, 700)
    now = [x.clone() for x in both.before if x is not None]

    def apply() -> None:
        kernel.full_reconstruction(slot, both.step, both.workspace, *now)

    apply()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        apply()
    for change in (None, 7, all_equal):
        if isinstance(change, int):
            slot.weights.meta[MetaField.K] = change
        elif change is not None:
            change(slot)
        for x, y in zip(now, both.before, strict=True):
            assert y is not None
            x.copy_(y)
        graph.replay()
        stored = both.guessed_and_stored(monkeypatch)[1]
        for x, y in zip(now, stored, strict=True):
            assert torch.equal(x.view(torch.int16), y.view(torch.int16))
