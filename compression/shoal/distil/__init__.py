"""The student learns what the dense model says.

Begin with `run`. `losses` says what is learned, `trainable` which weights learn, `descent` how steps are taken. May import
`measure` and what that may, and `linearity`.
"""
