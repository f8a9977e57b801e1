"""`distillm demo`: a whole distillation, with a real teacher or in a world made locally."""
