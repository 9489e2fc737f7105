"""From hidden states and an lm_head to log-probabilities or a loss: the public functions and the two schedules."""
