"""Fine-tuning on classes or preferences over several seeds, and what it does to the linearity of the blocks.

Begin with `sweep`. May import what `search` may.
"""
