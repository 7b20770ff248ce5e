"""Text, from a name to token windows of each role.

Begin with `corpus`, which deals documents out to calibration, distillation, selection and evaluation. `sources` and `rows`
read, `windows` cuts, `leakage` checks that evaluation text was not seen, `labelled` reads classes and preferences.
May import `models` and the ground.
"""
