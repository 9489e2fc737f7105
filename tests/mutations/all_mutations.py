"""The whole list."""

import of_kernels
import of_linear
import of_loss
import of_the_rest

MUTATIONS = [*of_kernels.MUTATIONS, *of_linear.MUTATIONS, *of_loss.MUTATIONS, *of_the_rest.MUTATIONS]
