"""Pretraining with regularisers: a sweep over kind, weight λ and seed, its results and its page.

Begin with `sweep`. May import what `search` may.
"""
