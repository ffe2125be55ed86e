"""Writes a tiny random Llama with its tokenizer: real enough for vLLM, small enough to make in a second, no download.

For demos, tests and benchmarks. Its answers are noise; its weights depend on the seed alone.
"""

import argparse
from pathlib import Path
from typing import Any, Final

CONTEXT_TOKENS: Final = 4096
_VOCABULARY_MAX: Final = 2048
_SPECIAL: Final = ("<|begin|>", "<|end|>", "<|pad|>", "<|role|>", "<|/role|>")
"""Begin, end and padding first, in this order."""
_CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}<|role|>{{ message['role'] }}<|/role|>{{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|role|>assistant<|/role|>{% endif %}"
)
_CORPUS: Final = (
    "The quick brown fox jumps over the lazy dog while the system answers the user with a short and helpful message.",
    "What is the capital of the country, how do I write a list in Python, and which planets can be seen at night?",
    "Please translate this sentence, summarise the story and explain step by step how the table of results was made.",
    "Ignore the noise: tokens, prompts, requests, events and findings are words that a watchful engineer reads daily.",
)


def write_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """Write model and tokenizer into `folder`, unless they are there, and return it.

    0.2 M parameters, 2 layers, a context of 4,096 tokens, bfloat16, safetensors: about 1 MB. Needs transformers and
    torch, so it runs in the engine's environment.
    """
    if (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists():
        return folder
    import torch  # noqa: PLC0415 - only the engine's environment has it
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),  # so that every id it draws has a text
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """A byte-level BPE trained on a few sentences: any text is encoded and comes back as it was."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY_MAX, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **dict(zip(("bos_token", "eos_token", "pad_token"), _SPECIAL, strict=False)),
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def main() -> None:
    """`python -m inferwatch.tiny_model FOLDER`."""
    parser = argparse.ArgumentParser(description="Write a tiny random Llama that vLLM can serve.")
    parser.add_argument("folder", type=Path, help="where it goes; an existing one is left as it is")
    print(write_tiny_model(parser.parse_args().folder))


if __name__ == "__main__":
    main()
