"""From text to UL2 rows: reading, tokenizing, corrupting, packing and batching."""
