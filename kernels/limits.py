"""Numbers and names that kernels and PyTorch code must agree on. Plain Python: either side may read them without triton."""

# exp of this is 0 in every dtype, and unlike -inf it can be multiplied by 0.
EXP_IS_ZERO = -1e4

# The one-pass schedule anchors a row at its old log-probability, but not below this: exp(60) leaves E room on both
# sides, before it overflows or underflows.
LOWEST_ANCHOR = -60.0

# A row whose sum S is not in [SMALLEST_SUM, LARGEST_SUM) has left the range of fp32, or is about to; it is recomputed.
SMALLEST_SUM, LARGEST_SUM = 2.0**-90, 2.0**99

# So is a row with a gradient (g != 0) whose |u|, the factor of that gradient, is not in this range.
SMALLEST_FACTOR, LARGEST_FACTOR = 2.0**-110, 2.0**110

# The token id that means "not a token", as in transformers and torch.
IGNORED_TOKEN = -100

# What kernel 11 makes of the sums of a step, by place. The last is the number of flagged rows.
SUMMARY = ("ratio_mean", "ratio_max", "clip_fraction", "ess", "kl_k1", "kl_k3", "entropy", "flagged")
