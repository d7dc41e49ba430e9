"""HTML pages and model cards of corpora, runs and evaluations."""
