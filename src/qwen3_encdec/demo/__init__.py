"""The whole pipeline at nano size, from a causal parent that it trains itself to a report."""
