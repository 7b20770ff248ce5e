"""The cluster that trials run on: connecting, what its nodes hold, the checks before work, jobs.

Begin with `connect` and `preflight`. May import `training`, `tracking` and the ground.
"""
