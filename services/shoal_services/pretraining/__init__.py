"""Pretraining with regularisers: a sweep over kind, weight λ and seed, its results and its page."""
