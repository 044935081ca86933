# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 on a CPU: its own code for requests and inputs, without a forward.

The runner's `finish_requests`, `add_requests`, `update_requests`,
`gather_batch_req_state` and `prepare_inputs` are stock, with our seams bound; so are
the request states, block tables and input buffers. Only what is a Triton kernel there
is plain PyTorch here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.plugins.steering.v1.worker.gpu import model_runner as seam
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu import model_runner as stock
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.steering_runtime import SteeringRuntime

CPU = torch.device("cpu")


def apply_write(self: StagedWriteTensor) -> None:
    """`StagedWriteTensor.apply_write` in a loop."""
    start = 0
    for at, index in enumerate(self._staged_write_indices):
        end = self._staged_write_cu_lens[at]
        values = torch.tensor(self._staged_write_contents[start:end], dtype=self.dtype)
        row, column = self.gpu[index], self._staged_write_starts[at]
        (row if row.ndim else row[None])[column : column + len(values)] = values
        start = end
    self.clear_staged_writes()


def prepare_prefill_inputs(
    input_ids: torch.Tensor,
    next_prefill_tokens: torch.Tensor,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    all_token_ids: torch.Tensor,
    prefill_len: torch.Tensor,
    num_computed_tokens: torch.Tensor,
) -> None:
    """Ids of the positions that are known when a request is added."""
    for at, index in enumerate(idx_mapping.tolist()):
        start, end = query_start_loc[at : at + 2].tolist()
        done = int(num_computed_tokens[index])
        count = min(end - start, max(int(prefill_len[index]) - done, 0))
        ids = all_token_ids[index, done : done + count]
        input_ids[start : start + count] = ids


def prepare_pos_seq_lens(
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    pos: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Positions of the step's tokens."""
    for at, index in enumerate(idx_mapping.tolist()):
        start, end = query_start_loc[at : at + 2].tolist()
        done = int(num_computed_tokens[index])
        pos[start:end] = torch.arange(done, done + end - start)
        seq_lens[at] = done + end - start


def combine_sampled_and_draft_tokens(
    input_ids: torch.Tensor, *args: Any
) -> torch.Tensor:
    """Where logits come from; the sampled ids play no part in these tests."""
    query_start_loc = args[2]
    return query_start_loc[1:] - 1


def use_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the runner's Triton kernels for the length of a test."""
    monkeypatch.setattr(StagedWriteTensor, "apply_write", apply_write)
    for function in (
        prepare_prefill_inputs,
        prepare_pos_seq_lens,
        combine_sampled_and_draft_tokens,
    ):
        monkeypatch.setattr(stock, function.__name__, function)


def make_runner(config: VllmConfig, model: Any, steering: SteeringRuntime) -> Any:
    """A V2 runner with the state that its requests and inputs need."""
    seam.install()
    runner = object.__new__(stock.GPUModelRunner)
    scheduler, length = config.scheduler_config, config.model_config.max_model_len
    reqs, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    vocab = config.model_config.get_vocab_size()
    size = config.cache_config.block_size
    values: dict[str, Any] = {
        "vllm_config": config,
        "model_config": config.model_config,
        "device": CPU,
        "steering": steering,
        "max_num_reqs": reqs,
        "decode_query_len": 1,
        "is_last_pp_rank": False,
        "use_pp": False,
        "req_states": RequestState(reqs, length, tokens, 0, vocab, CPU),
        "input_buffers": InputBuffers(reqs, tokens, CPU),
        "block_tables": BlockTables([size], reqs, tokens, [length // size], CPU),
        "lora_state": LoraState(reqs),
        "model_state": DefaultModelState(config, model, None, CPU),
    }
    unused = ("adaptive_verification", "encoder_cache", "fast_prefill", "pcp_manager",
              "pooling_runner", "pp_handler", "prompt_logprobs_worker", "sampler",
              "kv_block_zeroer")  # fmt: skip
    for name, value in {**dict.fromkeys(unused), **values}.items():
        setattr(runner, name, value)
    return runner


def prepare(runner: Any, planned: SchedulerOutput) -> InputBatch | None:
    """What `execute_model` does with a plan before its forward."""
    runner.finish_requests(planned)
    runner.add_requests(planned)
    runner.update_requests(planned)
    runner.block_tables.apply_staged_writes()
    if not planned.total_num_scheduled_tokens:
        return None
    state, _ = runner.gather_batch_req_state(planned, False)
    shape = BatchExecutionDescriptor(CUDAGraphMode.NONE, state.num_tokens, None)
    return runner.prepare_inputs(planned, state, shape, 0)


def sampled(runner: Any, batch: InputBatch, token: int) -> ModelRunnerOutput:
    """The step's output: `token` for each request whose tokens are all computed."""
    states, ids = runner.req_states, batch.req_ids
    tokens: list[list[int]] = []
    for at, index in enumerate(batch.idx_mapping_np):
        done = int(
            states.num_computed_tokens_np[index] + batch.num_scheduled_tokens[at]
        )
        states.num_computed_tokens.gpu[index] = done
        tokens.append([token] if done >= int(states.total_len.gpu[index]) else [])
        states.total_len.gpu[index] += len(tokens[-1])
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={req_id: at for at, req_id in enumerate(ids)},
        sampled_token_ids=tokens,
    )
