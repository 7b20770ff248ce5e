"""Who makes tokens: continuous batching over a KV cache of rows, or vLLM.

Begin with `engine`; `generation` has the values of a request. In the order of a token: `engine`, `decoder` with `kv_cache`
and `packed` (its logits), `sampling` (its choice), `running` with `spelling` and `text_stream` (its text). vLLM:
`vllm_engine`, and `vllm_plugin`, which it loads itself. May import nothing of Shoal's services but `settings`.
"""
