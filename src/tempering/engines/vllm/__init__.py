"""vLLM: attention profiles by a plugin, token policies by a logits processor, a server, a scorer.

vLLM loads the entry points itself, in each of its processes:

plugin       wraps a few methods of vLLM when it starts
layers       beta per head multiplied into the queries of every attention layer
processor    policies per request, for both of vLLM's model runners, drafted tokens included
step         what a step says beside vLLM's results: failures and traces
failing      a request whose policy fails ends alone, with the reason
tracing      what each token was drawn from, on its way into replies
endpoint     POST /v1/tempering/profile: swap the profile of a running server

Users and the command line call the rest: `worker` extends vLLM's workers, `swap` changes a running
`LLM`, `client` a server over HTTP, `serve` starts a server, `scoring` measures costs through prompt
log probabilities.

Only this package imports vllm.
"""
