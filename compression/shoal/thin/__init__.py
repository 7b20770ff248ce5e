"""What is made smaller inside the blocks that stay: weights pruned to zero, weights factored.

Begin with `projections`, the walk that both share. May import `replace` and what that may.
"""
