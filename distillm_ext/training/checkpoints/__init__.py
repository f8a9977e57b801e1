"""Checkpoints: folders that are known to be whole, and the trainer's hooks that write them."""
