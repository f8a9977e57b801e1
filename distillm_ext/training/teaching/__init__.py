"""Where the teacher's part of the loss comes from: the model, kept output, a cache on disk."""
