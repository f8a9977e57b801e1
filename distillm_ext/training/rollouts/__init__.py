"""Where the sequences of a step come from: policies, their schedule, the replay buffer, generation."""
