"""A run from a file at a terminal: settings, models and rows, the trainer or the capture, progress."""
