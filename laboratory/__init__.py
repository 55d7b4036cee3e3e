"""The paper's law in a laboratory: generate, then represent."""
