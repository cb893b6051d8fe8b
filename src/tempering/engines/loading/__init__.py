"""Where models come from: the hub's files, GGUF, the embedded one."""
