"""The command `distillm`. Imports nothing: `python -m distillm_ext` uses a part of it without typer or rich."""
