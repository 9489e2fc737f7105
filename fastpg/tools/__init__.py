"""What developers measure with; no loss depends on it."""
