"""The only room that imports mlflow: what happens is written to a spool first, and sent in the background.

Begin with `tracker`. `promote` moves what is served, `registry` finds it. May import the ground alone.
"""
