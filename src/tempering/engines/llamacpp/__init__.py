"""llama.cpp as an engine, through the prebuilt wheel `cyllama`: pip install 'tempering[llamacpp]'.

model.py      a GGUF file in llama.cpp: log probabilities of prompts, logits step by step
writing.py    samples of one prompt side by side, each with a policy and a seed of its own
server.py     an OpenAI-compatible server with policies per request
scoring.py    costs of profiles, each folded into a copy of the file
"""
