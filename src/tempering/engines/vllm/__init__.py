"""vLLM: attention profiles by a plugin, token policies by a logits processor, a server, a scorer.

vLLM loads the entry points itself, in each of its processes:

plugin       what is changed in vLLM when it starts, and only where it is configured
layers       beta per head multiplied into the queries of every attention layer
processor    policies per request, for both of vLLM's model runners
failing      a request whose row can't be tempered ends alone, with its reason
endpoint     POST /tempering/profile: swap the profile of a running server

The rest is called: `worker` extends vLLM's workers, `swap` changes a running `LLM`, `serve` starts
a server, `scoring` measures costs through prompt log probabilities.

Only this package imports vllm.
"""
