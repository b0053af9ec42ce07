"""The demo's tokenizer: byte-level BPE, digits one by one, about one token a word."""

from __future__ import annotations

from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from loraplex.demo import chat
from loraplex.demo.corpus import tokenizer_texts


def train_tokenizer(vocabulary: int, positions: int, seed: int, samples: int = 4000) -> PreTrainedTokenizerFast:
    """Train on `samples` examples of every task. Encoding with special tokens puts `<s>` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(chat.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_texts(Random(f"{seed}/tokenizer"), samples), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{chat.BOS} $A",
        pair=f"{chat.BOS} $A $B",
        special_tokens=[(chat.BOS, chat.SPECIAL_TOKENS.index(chat.BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=chat.BOS,
        eos_token=chat.END,
        pad_token=chat.PAD,
        additional_special_tokens=[chat.SYSTEM, chat.USER, chat.ASSISTANT],
        chat_template=chat.TEMPLATE,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
