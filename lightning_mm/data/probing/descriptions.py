"""Which answers of a conversation are captions.

Data flow: a Sample without a caption of its own -> ``description`` -> ``scenes``.

The rule: one question, one answer; the question speaks of the picture and asks to describe it (a word of ``_ASKS``, and
not in a sentence such as "Is there a caption?"), or is of the type ``caption``; the answer has two words or more and is
no yes or no. Its first sentence is the caption.
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
_ASKS_OTHERWISE = re.compile(
    r"\W*(is|are|was|were|do|does|did|has|have|had|why|who|whose|when|where|which|how (many|much|old|often))\b",
    re.IGNORECASE,
)
_YES_OR_NO = re.compile(r"(yes\b|no\s*([,.;:!–—]|$))", re.IGNORECASE)
_SENTENCE = re.compile(r"[^.!?\n]+")
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
    asking = (part for part in _SENTENCE.findall(question) if not _ASKS_OTHERWISE.match(part))
    asked = any(_ASKS.search(part) for part in asking) and bool(_PICTURE.search(question))
    answer = answers[0].text.strip()
    first = " ".join(_SENTENCE_END.split(answer)[0].split()).rstrip(".")
    is_caption = (asked or answers[0].question_type == "caption") and not _YES_OR_NO.match(answer)
    return (first,) if is_caption and len(first.split()) >= 2 else ()
