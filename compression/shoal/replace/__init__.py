"""Which blocks go, and what takes their place.

Begin with `in_order`: blocks fitted one after the other on the stream that the changed model gives. `choose` ranks, `fit`
has the closed forms, `maps` the replacements themselves. May import `linearity`, `measure`, and what those
may.
"""
