"""The defaults of commands that run an engine are those of the engines themselves."""

from __future__ import annotations

import inspect

from tempering.cli.explore import explore
from tempering.cli.shared import engine_options
from tempering.cli.throb import throb
from tempering.engines.providers import provider


def test_commands_and_providers_agree():
    wanted = {
        "concurrency": engine_options.CONCURRENCY,
        "timeout": engine_options.TIMEOUT,
        "retries": engine_options.RETRIES,
        "policy": engine_options.POLICY,
    }
    for function in (throb, explore, provider):
        given = inspect.signature(function).parameters
        assert {name: given[name].default for name in wanted} == wanted, function
