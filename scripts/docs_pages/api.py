"""The page of the Python API: every public name, by mkdocstrings.

Data flow: ``lightning_mm.__all__`` -> one ``:::`` block per name.
"""

import lightning_mm

_GROUPS = {
    "Train": ("MMModule", "MMDataModule", "Backbone", "OptimizerSettings", "LoRA"),
    "Policies": (
        "TuningPolicy",
        "TuningPlan",
        "PerRegion",
        "IntermediateOnly",
        "LoRAOnMiddle",
        "Full",
        "ConnectorOnly",
        "EarlyLayers",
        "LateLayers",
        "UniformSparse",
        "RandomLayers",
        "apply_policy",
        "resolve_layers",
    ),
}
_HEAD = """# Python API

Every name here is imported from the package: `from lightning_mm import MMModule`. Importing the package alone loads
neither torch nor transformers. Whatever the command line does is one of these functions.
"""


def page() -> str:
    """Markdown: groups of names, the rest in alphabetical order."""
    grouped = {name for names in _GROUPS.values() for name in names}
    rest = tuple(name for name in lightning_mm.__all__ if name not in grouped)
    functions = tuple(name for name in rest if name[0].islower())
    groups = {**_GROUPS, "Verbs": functions, "Callbacks, options and results": tuple(n for n in rest if n[0].isupper())}
    lines = [_HEAD]
    for title, names in groups.items():
        lines.append(f"## {title}\n")
        for name in names:
            lines.append(f"::: {lightning_mm._HOME[name]}.{name}\n    options:\n      heading_level: 3\n")
    return "\n".join(lines)
