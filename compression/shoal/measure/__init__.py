"""What a model is worth: perplexity beside the dense model, size, speed, tasks.

Begin with `perplexity`; `targets` holds what the dense model says, which distillation learns from too. May import
`checkpoints` and what that may.
"""
