"""How linear each block is: sums over tokens (`moments`), scores from them, errors token by token.

Begin with `scores`. `accumulate` fills the moments, `sinks` tells the tokens that are kept apart, `profile` tells the whole
story for one model. May import `checkpoints` and what that may.
"""
