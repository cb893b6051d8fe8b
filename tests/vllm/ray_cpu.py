"""What vLLM's CPU build lacks for Ray, as a plugin of vLLM's own kind, for tests alone.

The CPU build names no resource of Ray's that a worker takes. And it makes the buffers between
pipeline stages in a warm-up, which it leaves out with --enforce-eager. Nothing else is changed.
"""

from __future__ import annotations

import os

import ray
import vllm.v1.executor.ray_executor_v2 as executor
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker


class CpuWorkerProc(executor.RayWorkerProc):
    """vLLM's own actor, which looks up numbers of devices; a CPU has none."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), [0]


def accept_ray() -> None:
    """The plugin: runs in each of vLLM's processes. RAY_CPU_RESOURCE names the resource."""
    type(current_platform).ray_device_key = os.environ.get("RAY_CPU_RESOURCE", "")
    executor.RayWorkerProc = CpuWorkerProc
    CPUWorker._should_warm_up_model = lambda self: True
    CPUModelRunner.warming_up_model = lambda self: self.profile_run()
