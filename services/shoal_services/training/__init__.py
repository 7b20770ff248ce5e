"""What search, pretraining and fine-tuning share: Ray Tune drives trials, Ray Train's workers make the models.

Begin with `tune`, which drives a set of trials, and go on to `train`, which runs one. `folder` keeps what has ended,
`ranks` is what workers do together, `faults` what is done where they end. May import `tracking`, and the ground (`console`,
`complaints`, `interrupts`).
"""
