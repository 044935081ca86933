# SPDX-License-Identifier: Apache-2.0
"""Every stock symbol that steering replaces, by name, and each of them binds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

from vllm.plugins.steering.seam import exists

# Stock module -> what is wrapped, declared or given a mixin there.
SEAMS: dict[str, tuple[str, ...]] = {
    "vllm.engine.arg_utils": (
        "EngineArgs.add_cli_args",
        "EngineArgs.create_engine_config",
        "EngineArgs.from_cli_args",
    ),
    "vllm.entrypoints.anthropic.protocol": ("AnthropicMessagesRequest",),
    "vllm.entrypoints.cohere.protocol": ("CohereChatV2Request",),
    "vllm.entrypoints.generate.beam_search.offline": (
        "BeamSearchOfflineMixin.beam_search",
    ),
    "vllm.entrypoints.generate.beam_search.online": ("SamplingParams",),
    "vllm.entrypoints.generate.generative_scoring.serving": (
        "GenerativeScoringRequest",
    ),
    "vllm.entrypoints.generate.structured_decisions.protocol": (
        "StructuredDecisionRequest",
    ),
    "vllm.entrypoints.launchers.app": ("init_entrypoints_middleware",),
    "vllm.entrypoints.launchers.run_batch": (
        "BatchTranscriptionRequest",
        "BatchTranslationRequest",
    ),
    "vllm.entrypoints.openai.chat_completion.batch_serving": (
        "OpenAIServingChatBatch.chat_completion_full_generator_batch",
        "OpenAIServingChatBatch.create_batch_chat_completion",
        "OpenAIServingChatBatch.render_batch_chat_request",
    ),
    "vllm.entrypoints.openai.chat_completion.protocol": (
        "BatchChatCompletionRequest",
        "BatchChatCompletionRequest.to_chat_completion_request",
        "ChatCompletionRequest",
        "ChatCompletionRequest.to_beam_search_params",
        "ChatCompletionRequest.to_sampling_params",
    ),
    "vllm.entrypoints.openai.chat_completion.serving": (
        "OpenAIServingChat.chat_completion_full_generator",
        "OpenAIServingChat.chat_completion_stream_generator",
        "OpenAIServingChat.create_chat_completion",
        "OpenAIServingChat.render_chat_request",
    ),
    "vllm.entrypoints.openai.chat_completion.api_router": ("JSONResponse",),
    "vllm.entrypoints.openai.completion.api_router": ("JSONResponse",),
    "vllm.entrypoints.openai.responses.api_router": ("JSONResponse",),
    "vllm.entrypoints.openai.completion.protocol": (
        "CompletionRequest",
        "CompletionRequest.to_beam_search_params",
        "CompletionRequest.to_sampling_params",
    ),
    "vllm.entrypoints.openai.completion.serving": (
        "OpenAIServingCompletion.completion_stream_generator",
        "OpenAIServingCompletion.create_completion",
        "OpenAIServingCompletion.render_completion_request",
        "OpenAIServingCompletion.request_output_to_completion_response",
    ),
    "vllm.entrypoints.openai.models.serving": (
        "OpenAIServingModels.show_available_models",
    ),
    "vllm.entrypoints.openai.responses.context": (
        "HarmonyContext.append_output",
        "HarmonyContext.sae_reading",
        "ParsableContext.append_output",
        "ParsableContext.sae_reading",
        "SimpleContext.append_output",
        "SimpleContext.sae_reading",
    ),
    "vllm.entrypoints.openai.responses.protocol": (
        "ResponsesRequest",
        "ResponsesRequest.to_sampling_params",
    ),
    "vllm.entrypoints.openai.responses.serving": (
        "OpenAIServingResponses._render_resolved_response_inputs",
        "OpenAIServingResponses.create_responses",
        "OpenAIServingResponses.responses_full_generator",
        "OpenAIServingResponses.responses_stream_generator",
    ),
    "vllm.entrypoints.pooling.classify.protocol": (
        "ClassificationChatRequest",
        "ClassificationCompletionRequest",
    ),
    "vllm.entrypoints.pooling.embed.protocol": (
        "CohereEmbedRequest",
        "EmbeddingBatchChatInputRequest",
        "EmbeddingBatchChatRequest",
        "EmbeddingChatInputRequest",
        "EmbeddingChatRequest",
        "EmbeddingCompletionRequest",
    ),
    "vllm.entrypoints.pooling.pooling.protocol": (
        "IOProcessorRequest",
        "PoolingChatRequest",
        "PoolingCompletionRequest",
    ),
    "vllm.entrypoints.pooling.scoring.protocol": (
        "RerankRequest",
        "ScoreDataRequest",
        "ScoreQueriesDocumentsRequest",
        "ScoreQueriesItemsRequest",
        "ScoreTextRequest",
    ),
    "vllm.entrypoints.scale_out.token_in_token_out.protocol": (
        "GenerateRequest",
        "GenerateRequest.model_fields",
    ),
    "vllm.entrypoints.scale_out.token_in_token_out.serving": (
        "ServingTokens.serve_tokens",
    ),
    "vllm.entrypoints.speech_to_text.realtime.connection": (
        "RealtimeConnection.handle_event",
    ),
    "vllm.entrypoints.speech_to_text.transcription.protocol": ("TranscriptionRequest",),
    "vllm.entrypoints.speech_to_text.translation.protocol": ("TranslationRequest",),
    "vllm.outputs": ("RequestOutput.add",),
    "vllm.platforms.interface": ("Platform.validate_environ",),
    "vllm.v1.core.kv_cache_utils": ("generate_block_hash_extra_keys",),
    "vllm.v1.core.sched.scheduler": (
        "Scheduler.sae_step_reads",
        "Scheduler.update_from_output",
    ),
    "vllm.v1.engine.core": (
        "EngineCore.add_request",
        "EngineCore.collective_rpc",
        "EngineCore.preprocess_add_request",
        "EngineCore.steering_registry",
        "EngineCoreProc._handle_request_preproc_error",
    ),
    "vllm.v1.engine.core_client": (
        "AsyncMPClient.collective_rpc_async",
        "MPClient.shutdown",
        "SyncMPClient.collective_rpc",
    ),
    "vllm.v1.engine.input_processor": (
        "InputProcessor._validate_params",
        "InputProcessor.process_inputs",
        "InputProcessor.sae_parsed",
    ),
    "vllm.v1.engine.output_processor": (
        "OutputProcessor.add_request",
        "OutputProcessor.process_outputs",
        "OutputProcessor.sae_read_log",
    ),
    "vllm.v1.engine.utils": ("wait_for_engine_startup",),
    "vllm.v1.request": (
        "Request.sae_reads",
        "Request.steering_config",
    ),
    "vllm.v1.worker.cpu_model_runner": ("CPUModelRunner.load_model",),
    "vllm.v1.worker.gpu.model_runner": (
        "GPUModelRunner._dummy_run",
        "GPUModelRunner.add_requests",
        "GPUModelRunner.capture_model",
        "GPUModelRunner.finish_requests",
        "GPUModelRunner.load_model",
        "GPUModelRunner.prepare_inputs",
        "GPUModelRunner.reload_weights",
        "GPUModelRunner.sample_tokens",
    ),
    "vllm.v1.worker.gpu_model_runner": (
        "GPUModelRunner._dummy_run",
        "GPUModelRunner._prepare_inputs",
        "GPUModelRunner._update_states",
        "GPUModelRunner.load_model",
        "GPUModelRunner.reload_weights",
        "GPUModelRunner.sample_tokens",
    ),
    "vllm.v1.worker.worker_base": ("WorkerWrapperBase.init_device",),
}
# Also with graphs for idle steps.
IDLE_GRAPHS = (
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch",
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.get_capture_descs",
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.idle_graphs",
    "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.initialize_cudagraph_keys",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.capture",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.idle_graphs",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.run_fullgraph",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.run_pw_graph",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._warmup_and_capture",
)
# Symbols that not every supported release has.
SOMETIMES = {
    "vllm.v1.engine.core": ("EngineCoreProc._handle_request_validation_error",),
}
# An optional distribution; without it vLLM does not serve the route.
OPTIONAL = {"vllm.entrypoints.cohere.protocol": "cohere"}
CODE = """
import importlib, json, os, sys
import vllm.plugins.steering as plugin
from vllm.plugins.steering.seam import BOUND, resolve
from vllm.plugins.steering.v1.worker import gpu_model_runner, worker_base
from vllm.plugins.steering.v1.worker.gpu import model_runner
plugin.register()
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
def install():
    for v2 in (False, True):
        worker_base.install_runner_seams(v2)
    return sorted(BOUND)
usual = install()
os.environ["VLLM_STEERING_IDLE_GRAPHS"] = "1"
runners = [resolve(seam.RUNNER)[2] for seam in (gpu_model_runner, model_runner)]
mixins = [[base.__name__ for base in runner.__bases__] for runner in runners]
print(json.dumps([usual, install(), mixins]))
"""


def test_all_seams_bind_and_no_other() -> None:
    modules = {
        module: names
        for module, names in SEAMS.items()
        if module not in OPTIONAL or importlib.util.find_spec(OPTIONAL[module])
    }
    for module, names in SOMETIMES.items():
        here = tuple(name for name in names if exists(f"{module}:{name}"))
        modules[module] += here
    # A process of its own: the runners of both generations are changed there.
    said = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(list(modules))],
        check=True,
        capture_output=True,
        text=True,
        timeout=500,
    ).stdout
    bound, with_twins, mixins = json.loads(said.strip().splitlines()[-1])
    expected = {
        f"{module}:{name}" for module, names in modules.items() for name in names
    }
    assert set(bound) == expected
    assert set(with_twins) == expected | set(IDLE_GRAPHS)
    assert "SteeringModelRunnerV1Mixin" in mixins[0]
    assert "SteeringModelRunnerV2Mixin" in mixins[1]
