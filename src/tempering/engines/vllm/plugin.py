"""The entry point `vllm.general_plugins`, which vLLM runs when it starts, in all its processes.

Where no profile is configured and no request asks for a policy, vLLM behaves as without the plugin:
each wrapper checks that, and calls the method that it wraps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tempering.engines.vllm.wrapping import wrap
from tempering.others import check_release


def register() -> None:
    """Wrap the places where vLLM takes in requests, starts workers and loads models, once."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.worker_base import WorkerBase

    from tempering.engines.vllm import admission, presence, settings, step, templates

    check_release("vllm")
    templates.wrap_rendering()
    wrap(EngineArgs, "create_engine_config", settings.create_engine_config)
    wrap(InputProcessor, "__init__", _init_frontend)
    wrap(InputProcessor, "process_inputs", admission.process_inputs)
    wrap(ParentRequest, "_get_child_sampling_params", admission.child_params)
    wrap(WorkerBase, "__init__", _init_worker)
    wrap(Executor, "__init__", presence.start_executor)
    wrap(Scheduler, "update_from_output", step.update_from_output)


def _init_frontend(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    """vLLM's `InputProcessor.__init__`: this process takes in requests, perhaps over HTTP."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.output_processor import (
        OutputProcessor,
        RequestOutputCollector,
        RequestState,
    )

    from tempering.engines.vllm import admission, failing, tracing
    from tempering.engines.vllm.trace_replies import wrap_replies

    original(self, *args, **kwargs)
    wrap(RequestOutputCollector, "put", failing.put)
    wrap(OutputProcessor, "process_outputs", tracing.process_outputs)
    wrap(RequestState, "_new_completion_output", tracing.completion_output)
    wrap(RequestOutput, "add", tracing.add_output)
    wrap_replies()
    for kind in (ChatCompletionRequest, CompletionRequest):
        wrap(kind, "to_beam_search_params", admission.beam_params)
        wrap(kind, "to_sampling_params", admission.request_params)
    wrap(ResponsesRequest, "to_sampling_params", admission.untraced_params)


def _init_worker(
    original: Callable[..., Any], self: Any, vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    """vLLM's `WorkerBase.__init__`, which runs before any layer is built."""
    from vllm.v1.worker.gpu_input_batch import InputBatch

    from tempering.engines.vllm.by_row import init_batch, wrap_speculation
    from tempering.engines.vllm.layers import temper_layers
    from tempering.engines.vllm.settings import settings_of
    from tempering.engines.vllm.step import sample_tokens

    wrap(InputBatch, "__init__", init_batch)
    if vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner:
        wrap_speculation()
    wrap(type(self), "sample_tokens", sample_tokens)
    settings = settings_of(vllm_config)
    if settings is not None:
        temper_layers(vllm_config, settings)
        wrap(type(self), "load_model", _load_model)
    original(self, vllm_config, *args, **kwargs)


def _load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's `Worker.load_model`, after which all layers are built."""
    from tempering.engines.vllm.layers import length_table, token_places
    from tempering.engines.vllm.length_table import LengthProfiles
    from tempering.engines.vllm.profile_rows import RowsOfTokens, follow_requests
    from tempering.engines.vllm.settings import settings_of
    from tempering.engines.vllm.worker import write_configured

    result = original(self, *args, **kwargs)
    settings = settings_of(self.vllm_config)
    if settings is None:
        return result
    write_configured(self.vllm_config, settings, self.rank)
    table, places = length_table(self.vllm_config), token_places(self.vllm_config)
    if table is not None:
        follow_requests(self.model_runner, LengthProfiles(settings.rows, table))
    elif places is not None:
        follow_requests(self.model_runner, RowsOfTokens(settings.rows, *places))
    return result
