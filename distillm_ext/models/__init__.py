"""Models: where they are and how they load, what they must be, which tokens they know, how a student is cut."""
