"""The extracted encoder in use: embedding, finetuning, serving and export."""
