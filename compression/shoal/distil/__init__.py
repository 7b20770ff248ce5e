"""The student learns what the dense model says.

Begin with `run`. `teacher` answers, `losses` says what is learned, `trainable` which weights learn, `descent` how steps are
taken, `places` where the models are meanwhile. May import `measure` and what that may, and `linearity`.
"""
