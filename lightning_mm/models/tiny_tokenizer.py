"""A small byte-level BPE tokenizer, learned on the spot from the text below: no file, no network, the same every time.

Data flow: the text -> 384 tokens (256 bytes and 128 merges) + the family's special tokens -> ``tiny.build_tiny``.
"""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

NUM_LEARNED = 384
TEXT = """\
What is in the picture? There is a red circle on the left and a blue square on the right. How many circles are there?
There are two circles in the picture. Is the cat under the table? No, the cat is on the table, and the dog is under it.
What colour is the bird? The bird is green. Is this an animal, food, a vehicle, a household object, clothing or a plant?
An animal. What is the capital of the country with this flag? The capital is Paris. Answer with one word. Yes. No.
Describe the image. The image shows a small yellow boat on the water, with three white clouds above it.
"""


def tiny_tokenizer(
    named: Mapping[str, str], marks: Sequence[str] = (), *, add_bos: bool = False
) -> PreTrainedTokenizerFast:
    """Make the tokenizer of one family.

    Args:
        named: Special tokens by name: ``bos_token``, ``eos_token``, ``pad_token``, and others that processors ask for.
        marks: Further special tokens, such as those around a turn.
        add_bos: Put the first token before every text, as Llama's and Gemma's tokenizers do.
    """
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_LEARNED, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words.train_from_iterator(TEXT.splitlines(), trainer)
    words.add_special_tokens(list(dict.fromkeys([*named.values(), *marks])))
    if add_bos:
        bos = named["bos_token"]
        words.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, words.token_to_id(bos))]
                ),
            ]
        )
    common = {name: token for name, token in named.items() if name in ("bos_token", "eos_token", "pad_token")}
    others = {name: token for name, token in named.items() if name not in common}
    return PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=others, model_max_length=4096, **common)
