"""Data: what training, capture, evaluation and demo make of token rows alike."""
