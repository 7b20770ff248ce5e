"""What does not fit in memory: blocks on disk, streams of a model run block by block, weights shared out over ranks.

Begin with `on_disk`. May import `models`, `text` and the ground.
"""
