# SPDX-License-Identifier: Apache-2.0
"""Both runners capture each graph twice, and replay the one that a step needs.

vLLM's dispatcher, manager and wrappers are its own; only CUDA's graphs are recorders.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from steering_testing.recorded_graphs import (
    EVERY_LAUNCH,
    SIZES,
    Model,
    Recorder,
    record_graphs,
    small_config,
)
from steering_testing.recorded_runners import (
    FULL,
    PIECEWISE,
    Decision,
    FirstRunner,
    SecondRunner,
)

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.config.steering_environment import IDLE_GRAPHS_ENV
from vllm.forward_context import BatchDescriptor
from vllm.plugins.steering.v1.worker import gpu_model_runner
from vllm.plugins.steering.v1.worker.gpu import cudagraph_utils as seam
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker import steering_idle_graphs
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.steering_idle_graphs import IdleBatchDescriptor, IdleGraphs

BOTH = CUDAGraphMode.FULL_AND_PIECEWISE
BATCHES = [
    (tokens, uniform) for tokens in range(1, SIZES[-1] + 3) for uniform in (True, False)
]


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    gpu_model_runner.install_idle_graphs()
    seam.install()
    return record_graphs(monkeypatch)


def descending(descs: list[Any]) -> bool:
    sizes = [desc.num_tokens for desc in descs]
    return sizes == sorted(sizes, reverse=True)


def test_v1_captures_every_graph_with_and_without_launches(recorder: Recorder) -> None:
    stock, ours = FirstRunner(BOTH, has_twins=False), FirstRunner(BOTH)
    stock.capture(), ours.capture()
    before, found = stock.graphs(), ours.graphs()
    assert {mode for mode, _ in before} == {FULL, PIECEWISE}
    assert len(found) == 2 * len(before)
    for (mode, desc), graph in before.items():
        assert graph.launches == found[mode, desc].launches == EVERY_LAUNCH
        assert found[mode, IdleBatchDescriptor.of(desc)].launches == []
    # Nothing was in use, so warm-ups and captures launched nothing else.
    assert recorder.launches == [] and recorder.replayed == []
    assert not ours.model.step.idle_graph


def test_v1_replays_the_graph_that_the_step_needs(recorder: Recorder) -> None:
    runner = FirstRunner(BOTH)
    runner.capture()
    graphs = runner.graphs()
    for num_tokens, uniform in BATCHES:
        for idle in (False, True, False):
            runner.decision.idle = idle
            recorder.replayed.clear(), recorder.launches.clear()
            desc = runner.forward(num_tokens, uniform_decode=uniform)
            if num_tokens > SIZES[-1]:
                assert recorder.replayed == [] and type(desc) is BatchDescriptor
                continue
            (graph,) = recorder.replayed
            assert isinstance(desc, IdleBatchDescriptor) == idle
            assert graph in [graphs.get((mode, desc)) for mode in (FULL, PIECEWISE)]
            assert graph.launches == ([] if idle else EVERY_LAUNCH)


def test_v1_pads_alike_whether_a_step_is_idle_or_not() -> None:
    """So data-parallel ranks that choose different twins still agree."""
    runner = FirstRunner(BOTH)
    for num_tokens, uniform in BATCHES:
        for modes in (None, {FULL}, {PIECEWISE}, {CUDAGraphMode.NONE}):
            found = []
            for idle in (False, True):
                runner.decision.idle = idle
                try:
                    mode, desc = runner.dispatcher.dispatch(
                        num_tokens, uniform, valid_modes=modes
                    )
                except AssertionError:  # no graph of a mode that was asked for
                    found.append(None)
                    continue
                assert (type(desc) is IdleBatchDescriptor) == (
                    idle and mode is not CUDAGraphMode.NONE
                )
                found.append((mode, vars(desc)))
            assert found[0] == found[1]


@pytest.mark.parametrize("mode", [FULL, PIECEWISE, BOTH, CUDAGraphMode.NONE])
@pytest.mark.parametrize("has_lora", [False, True])
def test_v1_captures_the_largest_first_and_twins_last(
    mode: CUDAGraphMode, has_lora: bool
) -> None:
    config = small_config()
    if has_lora:
        config.lora_config = LoRAConfig(max_loras=2)
    groups = []
    for twins in (False, True):
        dispatcher = CudagraphDispatcher(config)
        if twins:
            step = Model(config).step
            dispatcher.idle_graphs = IdleGraphs(step, Decision())
        dispatcher.initialize_cudagraph_keys(mode)
        groups.append(dict(dispatcher.get_capture_descs()))
    stock, ours = groups
    assert set(stock) == set(ours)
    assert bool(stock) == (mode is not CUDAGraphMode.NONE)
    for at, descs in ours.items():
        busy, idle = descs[: len(stock[at])], descs[len(stock[at]) :]
        assert set(busy) == set(stock[at])
        assert set(idle) == {IdleBatchDescriptor.of(desc) for desc in busy}
        assert descending(busy) and descending(idle)


def test_v1_a_drafter_captures_its_graphs_once() -> None:
    """It replays none while the second graph of a batch is captured."""
    runner = FirstRunner(PIECEWISE)
    drafter = object.__new__(SpecDecodeBaseProposer)
    drafter.cudagraph_dispatcher = CudagraphDispatcher(small_config())
    drafter.cudagraph_dispatcher.initialize_cudagraph_keys(PIECEWISE)
    runner.runner.drafter = drafter
    seen, forward = [], runner.forward

    def dummy_run(num_tokens: int, **options: Any) -> BatchDescriptor:
        drafted = drafter.cudagraph_dispatcher.dispatch(num_tokens)
        found = forward(num_tokens, **options)
        if options.get("is_graph_capturing"):
            seen.append((type(found), type(drafted[1]), drafted[0]))
        return found

    runner.runner._dummy_run = dummy_run
    runner.capture()
    busy = (BatchDescriptor, BatchDescriptor, PIECEWISE)
    idle = (IdleBatchDescriptor, BatchDescriptor, CUDAGraphMode.NONE)
    assert seen == [busy] * len(SIZES) + [idle] * len(SIZES)
    mode, _ = drafter.cudagraph_dispatcher.dispatch(2)
    assert mode is PIECEWISE


@pytest.mark.parametrize("mode", [FULL, PIECEWISE, BOTH])
def test_v2_captures_every_graph_with_and_without_launches(
    mode: CUDAGraphMode, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = SecondRunner(mode, monkeypatch)
    stock = SecondRunner(mode, monkeypatch, has_twins=False)
    runner.capture(), stock.capture()
    entries = [
        r.model.piece.concrete_cudagraph_entries.values() for r in (stock, runner)
    ]
    before = [*stock.manager.graphs.values(), *(e.cudagraph for e in entries[0])]
    found = [*runner.manager.graphs.values(), *(e.cudagraph for e in entries[1])]
    assert [graph.launches for graph in before] == [EVERY_LAUNCH] * len(before)
    by_launches = [[], EVERY_LAUNCH]
    counts = [sum(g.launches == one for g in found) for one in by_launches]
    assert counts == [len(before), len(before)] and len(found) == 2 * len(before)
    assert recorder.launches == [] and not runner.model.step.idle_graph


@pytest.mark.parametrize("mode", [FULL, PIECEWISE, BOTH])
def test_v2_replays_the_graph_that_the_step_needs(
    mode: CUDAGraphMode, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = SecondRunner(mode, monkeypatch)
    runner.capture()
    for num_tokens, uniform in BATCHES:
        for idle in (False, True, False):
            runner.decision.idle = idle
            recorder.replayed.clear()
            runner.step(num_tokens, uniform)
            if num_tokens > SIZES[-1]:
                assert recorder.replayed == []
                continue
            (graph,) = recorder.replayed
            assert graph.launches == ([] if idle else EVERY_LAUNCH)


def test_v2_dispatches_as_stock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """So data-parallel ranks that choose different twins still agree."""
    runner = SecondRunner(BOTH, monkeypatch)
    stock = SecondRunner(BOTH, monkeypatch, has_twins=False)
    runner.capture(), stock.capture()
    for batch in BATCHES:
        for runner.decision.idle in (False, True):
            assert runner.dispatch(*batch) == stock.dispatch(*batch)


def test_v2_captures_the_largest_first_and_twins_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The estimate of memory multiplies the second FULL graph by their number."""
    runner = SecondRunner(BOTH, monkeypatch)
    stock = SecondRunner(BOTH, monkeypatch, has_twins=False)
    runner.capture()
    for mode, descs in stock.manager._capture_descs.items():
        ours = runner.manager._capture_descs[mode]
        busy, idle = ours[: len(descs)], ours[len(descs) :]
        assert busy == descs and len(ours) == 2 * len(descs)
        assert idle == [seam.IdleExecutionDescriptor.of(desc) for desc in descs]
        assert descending(busy) and descending(idle)


def test_v2_graphs_that_were_released_get_their_twins_again(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = SecondRunner(FULL, monkeypatch)
    runner.capture()
    count = len(runner.manager.graphs)
    runner.manager.release_graphs()
    runner.capture()
    assert len(runner.manager.graphs) == count
    runner.decision.idle = True
    runner.step(2, True)
    assert recorder.replayed[-1].launches == []


@pytest.mark.parametrize("mode", [FULL, PIECEWISE])
def test_v2_without_a_twin_the_full_graph_runs(
    mode: CUDAGraphMode, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after vLLM's estimate, which captures no twin of FULL mode."""
    runner = SecondRunner(mode, monkeypatch)
    runner.capture()
    graphs = runner.manager.graphs
    for desc in [d for d in graphs if isinstance(d, seam.IdleExecutionDescriptor)]:
        del graphs[desc]
    runner.manager.idle_graphs.piecewise.clear()
    runner.decision.idle = True
    runner.step(4, True)
    assert recorder.replayed[-1].launches == EVERY_LAUNCH


def test_a_failed_capture_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FirstRunner(FULL), SecondRunner(FULL, monkeypatch)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    first.runner._dummy_run, second.run = fail, fail
    for runner in (first, second):
        with pytest.raises(RuntimeError, match="out of memory"):
            runner.capture()
        runner.decision.idle = True
        assert not runner.model.step.idle_graph


def test_a_twin_is_no_other_descriptors_equal() -> None:
    desc = BatchDescriptor(4, 2, True)
    twin = IdleBatchDescriptor.of(desc)
    assert twin != desc and desc != twin and len({twin, desc}) == 2
    assert twin == IdleBatchDescriptor.of(BatchDescriptor(4, 2, True))
    full = BatchExecutionDescriptor(FULL, 4, 4)
    other = seam.IdleExecutionDescriptor.of(full)
    assert other != full and {full: 1}.get(other) is None
    assert other == seam.IdleExecutionDescriptor.of(full)


def test_stock_dispatchers_are_left_alone() -> None:
    config: VllmConfig = small_config()
    dispatcher = CudagraphDispatcher(config)
    dispatcher.initialize_cudagraph_keys(BOTH)
    assert dispatcher.idle_graphs is None
    assert type(dispatcher.dispatch(3)[1]) is BatchDescriptor
    assert all(
        type(d) is BatchDescriptor
        for _, descs in dispatcher.get_capture_descs()
        for d in descs
    )


@pytest.mark.parametrize("own", ["0", "1"])
@pytest.mark.parametrize("other", ["0", "1"])
def test_ranks_have_twins_only_if_all_are_asked(
    own: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = SimpleNamespace(world_size=2, cpu_group="the ranks' group")

    def all_reduce(asked: torch.Tensor, op: Any, group: str) -> None:
        assert group == "the ranks' group"
        assert op is torch.distributed.ReduceOp.MIN
        asked.clamp_(max=int(other))

    monkeypatch.setenv(IDLE_GRAPHS_ENV, own)
    monkeypatch.setattr(steering_idle_graphs, "get_tp_group", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    found = steering_idle_graphs.ranks_want_idle_graphs()
    assert found == (own == other == "1")
