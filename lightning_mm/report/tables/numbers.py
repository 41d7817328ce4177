"""Numbers as a reader sees them in figures and tables.

Data flow: values of a run's files -> ``short`` or ``percent`` -> text.
"""


def short(value: float) -> str:
    """A number in at most about six characters: 1.83, 12.4k, 2e-5."""
    size = abs(value)
    if size != 0 and (size < 1e-2 or size >= 1e9):
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):.3g}e{int(power)}"
    for limit, one, unit in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / one:.3g}{unit}"
    return f"{value:.0f}" if size >= 100 else f"{value:.3g}"


def percent(fraction: float) -> str:
    """A fraction as per cent, with a decimal where it is not whole."""
    return f"{100 * fraction:.1f}".removesuffix(".0") + "\u00a0%"
