"""What a training step costs on machines that are not here."""
