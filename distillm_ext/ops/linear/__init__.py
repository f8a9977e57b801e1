"""The operator `linear_divergence`, written in Python: its arguments in `call`, its computation in `chunks` and
`gradients`, and in `operator` what PyTorch knows of it (schema, fake, autograd)."""
