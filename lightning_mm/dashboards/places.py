"""What the sites of layers.csv are called: where in the model, or between which tokens, something was measured.

Data flow: the site of a row -> its words, for panels, matrices and W&B; an unknown site keeps its name.
"""

PLACES = {
    "": "",
    "last": "last token",
    "picture": "last token, picture",
    "text": "last token, caption",
    "image": "picture tokens",
    "object": "object tokens",
    "token": "one random token",
    "image~text": "picture and caption tokens",
    "skip": "whole layer skipped",
}
SITES = {"mlp": "MLP", "attention": "Attention", "residual": "Residual stream"}
"""What of a layer is put back, or taken away."""
CLASSES = {
    "image_early": "picture, early",
    "image_late": "picture, late",
    "constraint": "constraint",
    "question": "rest of question",
    "template": "template",
    "last": "last token",
}
"""What kinds of tokens a question with a picture has, in reading order; ``causal.questions`` says which is which."""

_ENDS = {"image": "picture", "constraint": "constraint", "question": "question", "last": "last token"}
_CUTS = {"": "", "pre": ", rest renormalised (pre)", "post": ", rest unchanged (post)"}
_PARTS = {"mlp": "MLP", "attention": "attention", "residual": "residual stream"}
_ASKED = {"image": "questions with a picture", "text": "questions in text"}
_HEADS: dict[str, tuple[str, dict[str, str]]] = {
    "cumulative": ("all layers up to this one", _ASKED),
    "sliding": ("layers about this one", _ASKED),
    "zero": ("output set to zero", _PARTS),
    "mean": ("output set to its mean", _PARTS | {"image": "picture tokens"}),
    **{site: (f"{words} put back", CLASSES) for site, words in SITES.items()},
}


def place(site: str) -> str:
    """The words of a site.

    Example:
        >>> place("image->constraint/pre"), place("zero/mlp"), place("my/own")
        ('picture to constraint, rest renormalised (pre)', 'output set to zero, MLP', 'my/own')
    """
    if site in PLACES:
        return PLACES[site]
    edge, _, kind = site.partition("/")
    start, arrow, end = edge.partition("->")
    if arrow and kind in _CUTS:
        return f"{_ENDS.get(start, start[:40])} to {_ENDS.get(end, end[:40])}{_CUTS[kind]}"
    if edge in _HEADS and kind:
        words, known = _HEADS[edge]
        return f"{words}, {known.get(kind, kind[:40])}"
    return site[:40]
