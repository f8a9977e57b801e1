"""Rows of data as people have them: where they are, how they are read, what they may hold, where one came from."""
