"""From a name to a model in memory, and from a model to a folder that loads everywhere.

Begin with `load` on the way in and `store` on the way out. `names` says what a name means, `config` what a model tells
without its weights, `device` where it is computed, `hashes` which weights it has. `readable`, `plain_stream` and
`companions` know what checkpoints hold besides weights; `read_back` compares what was written with what was measured;
`packaged` has the models of Python packages. May import `large`, `text`, `models` and the ground.
"""
