"""How good a model is, always beside its baselines:

denoising loss, retrieval, geometry, and the report.
"""
