"""The stages, a module each: `run(check)`."""
