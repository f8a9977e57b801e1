"""Conversations as tokens: chat templates, and which tokens of a rendered conversation are the assistant's."""
