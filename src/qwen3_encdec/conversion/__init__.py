"""Qwen3 into an encoder-decoder, the encoder out of it, and several encoders into one."""
