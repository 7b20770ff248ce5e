"""The search for the size/quality frontier, from a file of `tune_configs/` to a page.

Begin with `run`: check → `prepare` → `trials` → frontier → pages. `trial` is what one trial's workers do, `searcher` what
is tried next; `plan` tells beforehand what a search takes, `submit` sends it to a cluster. May import `training`,
`cluster`, `pages`, and what those may.
"""
