"""What `benchmarks/device_check.py` is made of.

Divided by thing. The runner (`runner`, `process`, `book`, `plan`) needs the standard library alone and never imports
torch, so that nothing which a stage breaks can take it along. A stage (`stages/<name>.py`, started by `stage`) is a
process of its own. What stages share: `clock` (times), `inputs` (logits and how often they rotate), `operators` (every
operator as a call).
"""
