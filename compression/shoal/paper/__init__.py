"""Experiments of arXiv 2405.12250 and around it: pretraining with regularisers, fine-tuning, probes, splices, skills.

Begin with `pretrain`. May import every other room; nothing imports it.
"""
