"""What verl imports in every worker: actor_rollout_ref.model.external_lib=fastpg.integrations.verl_fused.

Importing this module calls `replace_fused_kernels` of `fastpg.integrations.verl`. For its options, let verl import a module of
your own that calls it with them.
"""

from .verl import replace_fused_kernels

replace_fused_kernels()
