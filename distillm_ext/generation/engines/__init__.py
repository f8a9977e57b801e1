"""Engines: what the trainer generates through, on the student itself or with a copy of its weights."""
