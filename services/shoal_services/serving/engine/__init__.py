"""Who makes tokens: continuous batching over a KV cache of rows, or vLLM.

Begin with `engine`; `generation` has the values of a request. May import nothing of Shoal's services but `settings`.
"""
