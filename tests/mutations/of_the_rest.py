"""Mutations of ranks, integrations, the command line and the bench."""

from mutation import Mutation

MUTATIONS = [
    Mutation(
        "accuracy: no factor of H on tensor cores",
        "fastpg/crosscheck/accuracy.py",
        "terms = max(1.0, hidden_size / TENSOR_CORE_TERMS) if on_tensor_cores else 1.0",
        "terms = 1.0",
        "accuracy crosscheck",
        "promise or tolerances_are_the_stated",
    ),
    Mutation(
        "bench: a peer may raise a RuntimeError and nothing else",
        "bench/measure.py",
        "except Exception as error:",
        "except RuntimeError as error:",
        "bench",
        "raises",
    ),
    Mutation(
        "bench: peers end in policy_loss",
        "bench/peers.py",
        "return plain_cispo_loss(logprobs, b.old_logprobs, b.advantages, b.mask)",
        "return policy_loss(logprobs, b)",
        "bench_endings",
        "ends_in_what",
    ),
    Mutation(
        "check: a GPU's kernels are not compiled before",
        "fastpg/crosscheck/command.py",
        'if small and "triton gpu" in places:',
        "if False:",
        "crosscheck_compile",
    ),
    Mutation(
        "small work: as many threads as there are",
        "fastpg/tools/threads.py",
        "torch.set_num_threads(1)",
        "torch.set_num_threads(before)",
        "crosscheck demo",
        "one_thread",
    ),
    Mutation(
        "demo: on the CPU, whatever there is",
        "fastpg/demo/command.py",
        'device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")',
        'device = "cpu"',
        "demo",
        "device",
    ),
    Mutation(
        "patched: the loss is a sum over a count of 0",
        "fastpg/integrations/transformers.py",
        "loss = mean_of_kept(-out.logprobs, tokens != validation.IGNORED_TOKEN, count)",
        "loss = -out.logprobs.sum() / (1 if count is None else count)",
        "nothing_kept",
        "patched_without_items",
    ),
    Mutation(
        "TRL: cast_lm_head_to_fp32 is forgotten",
        "fastpg/integrations/trl.py",
        "fp32_head=self.settings.cast_lm_head_to_fp32",
        "fp32_head=False",
        "trl",
        "test_bf16",
    ),
    Mutation(
        "ranks need not agree on fp32_head",
        "fastpg/distributed/agreement.py",
        "int(head.fp32_head), ",
        "0, ",
        "vocab_parallel",
        "other and fp32_head",
    ),
]
