"""How long the rows of a run are where nobody says so.

A teacher's output is found by the tokens of a row. A capture, a run that reads it and an evaluation that cut rows at
different places would not meet, so all of them take their defaults from here.
"""

MAX_PROMPT_LENGTH = 256
MAX_LENGTH = 512
