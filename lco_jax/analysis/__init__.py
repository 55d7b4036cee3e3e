"""What the layers of a model do to paired inputs of two modalities: measures and pictures."""
