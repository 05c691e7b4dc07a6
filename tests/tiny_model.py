"""A model of a few thousand random weights, in the format of Hugging Face."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<unk>", "<user>", "<model>", "why", "is", "the", "sky", "blue", "light", "air", "who"]
CONTEXT = 97
TEMPLATE = (
    "{% for m in messages %}{{ ' <user> ' if m['role'] == 'user' else ' <model> ' }}"
    "{{ m['content'] }}{% endfor %}{{ ' <model> ' if add_generation_prompt }}"
)


def save(
    folder: Path,
    words: list[str] = WORDS,
    context: int = CONTEXT,
    template: str | None = TEMPLATE,
    **special: str,
) -> str:
    """`special`: which words the tokenizer leaves out of a text, as `unk_token`."""
    torch.manual_seed(83)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=12,
        intermediate_size=13,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=4,
        initializer_range=1.0,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)
