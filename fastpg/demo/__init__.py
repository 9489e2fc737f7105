"""`fastpg demo`: a language model learns from a loss that never built its logits."""
