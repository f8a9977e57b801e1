"""Models: where they are and how they load, which tokens they know, how logits are read off a student and a teacher."""
