"""The operators: one module each, with the typed call, the fake and the autograd rule. Only here is torch.ops named."""
