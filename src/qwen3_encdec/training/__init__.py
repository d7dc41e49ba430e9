"""Training: a strict config, an accelerate loop, and checkpoints that resume exactly."""
