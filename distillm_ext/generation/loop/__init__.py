"""The decode loop: prompts in groups, one forward pass a token, rows leave when they are done."""
