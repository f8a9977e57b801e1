"""Data: rows as people have them, as tokens, as batches; and the named random streams that draw from them."""
