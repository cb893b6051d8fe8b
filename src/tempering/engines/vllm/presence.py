"""Whether every worker of an engine runs this plugin: one without would serve untempered.

vLLM's workers may live on other hosts (Ray, --nnodes), and each host has an environment of its own.
So an engine doesn't start unless all of its workers say that they have the plugin; of Ray's nodes
it is asked before any model is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from tempering.engines.vllm.wrapping import wrap
from tempering.errors import RefusedError


def start_executor(
    original: Callable[..., Any], self: Any, config: Any, *args: Any, **kwargs: Any
) -> None:
    """vLLM's `Executor.__init__`, which starts the workers of an engine.

    Raises
    ------
    RefusedError: workers or Ray nodes without the plugin; names them. Then all workers are ended.
    """
    if self.uses_ray:
        for kind in type(self).__mro__:
            module = sys.modules.get(kind.__module__)
            if module is not None and hasattr(module, "initialize_ray_cluster"):
                wrap(module, "initialize_ray_cluster", join_ray)
    original(self, config, *args, **kwargs)
    if getattr(config.parallel_config, "node_rank_within_dp", 0) > 0:
        return  # the first host asks all workers
    try:
        refuse_absent(dict(enumerate(self.collective_rpc(_of_worker))))
    except RefusedError:
        self.shutdown()
        raise


def join_ray(original: Callable[..., Any], parallel: Any, *args: Any, **kwargs: Any) -> None:
    """vLLM's `initialize_ray_cluster`, after which it is known on which nodes workers will run.

    parallel: vLLM's `ParallelConfig`.

    Raises
    ------
    RefusedError: nodes where tempering isn't installed, or in another release; names them.
    """
    given = parallel.placement_group
    original(parallel, *args, **kwargs)
    import ray
    from ray.util import (
        get_current_placement_group,
        placement_group_table,
        remove_placement_group,
    )
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = parallel.placement_group
    bundle_on = {
        node: bundle for bundle, node in placement_group_table(group)["bundles_to_node_id"].items()
    }
    address_of = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    asked = {
        f"{address_of.get(node, 'unknown address')}, node {node}": ray.remote(_of_node)
        .options(
            num_cpus=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=int(bundle)
            ),
            runtime_env=getattr(parallel, "ray_runtime_env", None),
        )
        .remote()
        for node, bundle in bundle_on.items()
    }
    try:
        refuse_other(dict(zip(asked, ray.get(list(asked.values())), strict=True)))
    except RefusedError:
        if given is None and get_current_placement_group() is None:
            remove_placement_group(group)  # vLLM's own; it would hold the nodes' devices
            parallel.placement_group = None
        raise


def refuse_absent(answers: Mapping[int, tuple[str, bool]]) -> None:
    """RefusedError unless the worker of every rank has the plugin.

    answers: rank -> (its host, whether it has loaded the plugin).
    """
    absent = [f"rank {rank} on {host}" for rank, (host, loaded) in answers.items() if not loaded]
    if absent:
        raise RefusedError(
            f"these workers run without tempering's plugin and would serve untempered: "
            f"{', '.join(absent)}; install tempering there beside vLLM, and let VLLM_PLUGINS name "
            f"'tempering' there, or unset it. {_WITHOUT}"
        )


def refuse_other(answers: Mapping[str, str | None]) -> None:
    """RefusedError unless every Ray node has this release of tempering.

    answers: name of a node -> its release; None without tempering.
    """
    own = version("tempering")
    others = [
        f"{node} ({'no tempering' if found is None else f'tempering {found}'})"
        for node, found in answers.items()
        if found != own
    ]
    if others:
        raise RefusedError(
            f"tempering {own} runs here, but not on these Ray nodes, whose workers would not do "
            f"as asked: {'; '.join(others)}. Install tempering {own} on each, beside vLLM. "
            f"{_WITHOUT}"
        )


_WITHOUT = "To serve without tempering, let VLLM_PLUGINS leave it out here."


def _of_worker(worker: Any) -> tuple[str, bool]:
    """The host of a vLLM worker, and whether the plugin was loaded there; imports no tempering."""
    import socket

    from vllm.v1.worker.worker_base import WorkerBase

    return socket.gethostname(), hasattr(WorkerBase.__init__, "_tempering")


def _of_node() -> str | None:
    """The release of tempering whose plugin vLLM would find on a Ray node; imports no tempering."""
    from importlib.metadata import entry_points

    found = [
        point.dist.version
        for point in entry_points(group="vllm.general_plugins", name="tempering")
        if point.dist is not None
    ]
    return found[0] if found else None


# Pickled by name, these would be looked for in a tempering that may not be there. What belongs to
# __main__ is pickled by value.
_of_worker.__module__ = _of_node.__module__ = "__main__"
