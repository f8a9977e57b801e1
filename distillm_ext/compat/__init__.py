"""Loss functions of other projects over our kernels: same names, arguments and numbers, one import to change.

`trl`: TRL's `generalized_jsd_loss`. `liger`: Liger-Kernel's KL and JSD losses. `distillm`: DistiLLM's losses.
docs/conventions.md lists how their directions, parameters and reductions map to ours.
"""
