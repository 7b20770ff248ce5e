"""A transformer taken apart: where its blocks, projections and caches are, and how it becomes shorter.

Begin with `structure`; `projections` are inside the blocks. `calls` runs blocks one by one, `shorten` builds the model with
fewer blocks, `modeling_shoal` is the file that goes with every checkpoint of a linear kind. May import nothing but the
ground.
"""
