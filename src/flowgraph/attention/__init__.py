"""One forward pass of any Hugging Face causal LM -> aggregated attention rows, streamed in blocks."""
