"""Ways of asking SAM's mask decoder for masks."""
