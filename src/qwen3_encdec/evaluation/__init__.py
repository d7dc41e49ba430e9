"""Scores of a model, always beside its baselines:

denoising loss, retrieval, geometry, and the report.
"""
