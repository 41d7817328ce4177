"""Which answers of a conversation are captions.

Data flow: a Sample without a caption of its own -> ``description`` -> ``scenes``.

The rule: one question, one answer; the question speaks of the picture and asks to describe it (a word of ``_ASKS``), or
is of the type ``caption``; the answer has two words or more. Its first sentence is the caption.
"""

import re

from lightning_mm.data.sample import IMAGE_MARK, Sample

RULE = (
    "the 'caption' of a row, else the first sentence of the answer where a single question asks to describe the picture"
)
_ASKS = re.compile(
    r"\b(descri|caption|depict|summar|narrat|portray|illustrat|explain|explanation|interpretation|account of|rundown"
    r"|analy[sz]|characteri|clarify|examine|break down|walk through|what (is|are|do you see|can you see) (in|on))",
    re.IGNORECASE,
)
_PICTURE = re.compile(r"\b(image|picture|photo|photograph|scene|snapshot)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


def description(sample: Sample) -> tuple[str, ...]:
    """The caption that an answer is, without its full stop; nothing where no answer is one.

    Example:
        >>> from lightning_mm.data.sample import Turn
        >>> turns = (Turn("user", "Describe the image."), Turn("assistant", "Two dogs on a beach. They play."))
        >>> description(Sample("1", turns))
        ('Two dogs on a beach',)
    """
    users = [turn for turn in sample.turns if turn.role == "user"]
    answers = [turn for turn in sample.turns if turn.role == "assistant"]
    if len(users) != 1 or len(answers) != 1:
        return ()
    question = users[0].text.replace(IMAGE_MARK, "")
    asked = bool(_ASKS.search(question) and _PICTURE.search(question)) or answers[0].question_type == "caption"
    first = " ".join(_SENTENCE_END.split(answers[0].text.strip())[0].split()).rstrip(".")
    return (first,) if asked and len(first.split()) >= 2 else ()
