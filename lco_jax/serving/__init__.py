"""The embeddings server: what clients send, and the lanes in which it is embedded."""
