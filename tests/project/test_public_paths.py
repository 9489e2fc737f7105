"""Where users find what they import. A line that moves or goes missing here breaks somebody's program."""

import importlib
import inspect
import types

import pytest
from programs import run_program

import fastpg

TOP_LEVEL = """
    CISPO ClipCov DPPOKL DPPOTV GSPO IcePop ImportanceWeighted KLCov KLPenalty Kept LMHead LinearPolicyLoss Objective PPOClip
    PolicyLossOutput
    PolicyLossStatistics Reinforce SAPO Support TokenLogprobs TokenStatistics VESPO advantages kept linear_cispo_loss
    linear_cross_entropy linear_logprobs linear_policy_loss masked_mean off_policy_sequence_mask policy_loss rollout
    selective_logprobs top_entropy_mask
"""
PATHS = {
    "fastpg": TOP_LEVEL + "__version__",
    "fastpg.advantages": """
        OnNaN OnSingleton discount_weights gae gigpo grpo monte_carlo_values reinforce_plus_plus reward_to_go rloo spread
        value_baseline vineppo
    """,
    "fastpg.distributed": "global_count",
    "fastpg.rollout": "icepop masked_weights mismatch_metrics token_veto truncated_weights within_band",
    "fastpg.reference": """
        Statistics cispo clip_cov covariances dppo_kl dppo_tv gspo icepop importance_weighted importance_weighted_by kl_cov
        kl_penalty linear_logprobs
        logits of_sequences off_policy_sequence_mask policy_loss ppo_clip reduce reinforce sapo softcap token_distribution
        token_statistics top_entropy_mask vespo
    """,
    "fastpg.crosscheck": "assert_matches_oracle",
    "fastpg.integrations.nemo_rl": "from_parallel_hidden_states_to_logprobs use_fastpg",
    "fastpg.integrations.openrlhf": "use_fastpg",
    "fastpg.integrations.prime_rl": "FastpgOutputLinear use_fastpg",
    "fastpg.integrations.sampling": "Recording recorded_support",
    "fastpg.integrations.skyrl": "fused_lm_head_logprob main replace_fused_lm_head use_fastpg with_fastpg",
    "fastpg.integrations.axolotl": "FastpgArgs FastpgPlugin",
    "fastpg.integrations.swift": "FastpgCallback",
    "fastpg.integrations.torchtitan": "FastpgLoss",
    "fastpg.integrations.transformers": """
        CausalLMLogprobs HeadlessOutput Patch causal_lm_policy_loss patch patched token_logprobs
    """,
    "fastpg.integrations.trl": "FastpgHeads build_trainer use_fastpg",
    "fastpg.integrations.verl": "linear_cross_entropy replace_fused_kernels use_fastpg",
    "fastpg.kernels": "",
    "fastpg.kernels.anchored_exp": "anchored_exp anchored_exp_kernel",
    "fastpg.kernels.dlogits": "dlogits dlogits_kernel",
    "fastpg.kernels.finish": "finish finish_kernel finish_with_loss",
    "fastpg.kernels.logsumexp": "combine combine_kernel finished logsumexp logsumexp_kernel",
    "fastpg.kernels.objectives": "cispo dppo_kl dppo_tv icepop importance_weighted kl_k1 kl_k2 kl_k3 ppo_clip reinforce sapo",
    "fastpg.kernels.target": "target_kernel target_logits",
    "fastpg.__main__": "main",
}
NEEDS = {
    "fastpg.integrations.axolotl": "axolotl.integrations.base",
    "fastpg.integrations.openrlhf": "transformers",
    "fastpg.integrations.sampling": "transformers",
    "fastpg.integrations.swift": "swift.callbacks",
    "fastpg.integrations.torchtitan": "torchtitan",
    "fastpg.integrations.transformers": "transformers",
    "fastpg.integrations.trl": "trl",
}


@pytest.mark.parametrize("module", PATHS)
def test_names_are_where_they_were(module):
    pytest.importorskip(NEEDS.get(module, "torch"))
    found = importlib.import_module(module)
    for name in PATHS[module].split():
        assert hasattr(found, name), f"{module}.{name}"


def test_all_lists_the_top_level():
    assert sorted(fastpg.__all__) == sorted(TOP_LEVEL.split())


def own_docstring(found: object) -> str | None:
    """None where Python has made one up: of a NamedTuple, of a dataclass, of the class that a value belongs to."""
    text = vars(found).get("__doc__") if isinstance(found, type) else getattr(found, "__doc__", None)
    made_up = text is None or (isinstance(found, type) and text.startswith(f"{found.__name__}("))
    return None if made_up else text


@pytest.mark.parametrize("module", PATHS)
def test_every_public_object_has_a_docstring(module):
    """And every public method and property of a class. The documentation shows nothing else of them."""
    pytest.importorskip(NEEDS.get(module, "torch"))
    found = importlib.import_module(module)
    assert found.__doc__
    for name in PATHS[module].split():
        thing = getattr(found, name)
        if not isinstance(thing, (type, types.FunctionType)):  # a kernel, whose launcher says what it does; a choice of words
            continue
        assert own_docstring(thing), f"{module}.{name}"
        for member, value in vars(thing).items() if isinstance(thing, type) else ():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if not member.startswith("_") and inspect.isfunction(function):
                assert inspect.getdoc(getattr(thing, member)), f"{module}.{name}.{member}"


@pytest.mark.xdist_group("programs")
def test_submodules_that_are_used_as_attributes(tmp_path):
    """Of `import fastpg` alone, as before: `fastpg.advantages.grpo`."""
    code = "import fastpg; fastpg.advantages.grpo; fastpg.rollout.icepop; fastpg.distributed.global_count"
    done = run_program("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.xdist_group("programs")
@pytest.mark.parametrize("command", ["demo", "check", "compile-report"])
def test_commands(command, tmp_path):
    done = run_program("-m", "fastpg", command, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"fastpg {command}" in done.stdout
