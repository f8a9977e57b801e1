"""Checks of what callers hand over: each names the argument, what was expected and what came."""
