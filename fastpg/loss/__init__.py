"""From log-probabilities to a loss. Nothing here sees hidden states or the vocabulary."""
