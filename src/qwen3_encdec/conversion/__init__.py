"""Initialize an encoder-decoder from Qwen3, extract its encoder, and merge encoders."""
