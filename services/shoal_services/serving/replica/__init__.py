"""A variant's process: weights, tokenizer, an engine, and the channel that its pieces of text go back by.

Begin with `variant`. In the order of a call: `model_cache` (where variants share a process), `variant`, `prompts`, the
engine, `meters`, `channel`. May import `engine`.
"""
