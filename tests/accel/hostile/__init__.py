"""Hostile guests for the translator: made from a seed, run through the accelerator's seam, watched from outside.

``python tests/accel/hostile_fuzz.py`` is the command; docs/translator.md says what it looks for.
"""
