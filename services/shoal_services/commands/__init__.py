"""The commands of `shoal`, a file for each kind of work. Heavy imports stand inside them: `--help` answers at once.

May import every other room; only `cli` imports it.
"""
