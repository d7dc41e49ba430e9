"""Scores of a model, always beside its baselines."""
