"""Reward functions: plain Python that judges text, found by name and combined by weight."""
