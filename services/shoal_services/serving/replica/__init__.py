"""A variant's process: weights, tokenizer, an engine, and the channel that its pieces of text go back by.

Begin with `variant`. May import `engine`.
"""
