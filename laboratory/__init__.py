"""The paper's law in a laboratory: worlds made by rule, a tiny omnimodal model, and what it learns of them."""
