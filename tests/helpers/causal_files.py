"""What a causal run leaves, in small: a planted effect of the MLP at layer 3 and the constraint's last token."""

from lightning_mm.core.layer_table import LayerRow

LAYERS = 6
TEXT = [" In", " which", " city", " is", " the", " Tower", "?"]
KINDS = ["question"] * 4 + ["constraint"] * 2 + ["last"]


def trace_of(images=8, layers=LAYERS, tokens=TEXT, kinds=KINDS, **changed):
    """An item of traces.json: 0.6 at layer 3 and the last constraint token, -0.3 at layer 1 and the first token."""
    early = max(0, images - 2)
    texts, classes = [""] * images + list(tokens), ["image_early"] * early + ["image_late"] * (images - early)
    classes += kinds
    values = [[0.0] * len(texts) for _ in range(layers)]
    best = max((i for i, kind in enumerate(classes) if kind == "constraint"), default=len(texts) - 1)
    values[min(3, layers - 1)][best] = 0.6
    if layers > 1 and len(texts) > 1:
        values[1][images if tokens else 0] = -0.3
    told = {"id": "q0", "text": "In which city is the Tower?", "constraint": "the Tower", "image": None, "site": "mlp"}
    told |= {"measure": "nie", "window": "p2:1", "target": " Paris", "p_clean": 0.9, "p_corrupt": 0.1}
    told |= {"layers": list(range(layers)), "tokens": texts, "classes": classes, "values": values}
    return told | {"positions": list(range(len(texts)))} | changed


def traced_rows(step=0, sites=("mlp", "attention", "residual"), layers=LAYERS):
    """Rows ``trace`` of layers.csv: the MLP brings back 0.5 at layer 3, constraint; attention nothing that is clear."""
    rows = []
    for site in sites:
        for layer in range(layers):
            for kind in ("last", "constraint", "image_late", "template"):
                value = 0.5 if (site, layer, kind) == ("mlp", 3, "constraint") else 0.01 * layer
                value = 1.0 if site == "residual" and kind == "last" else value
                where = (step, "causal", "trace", f"{site}/{kind}", layer)
                if kind == "template":
                    rows.append(LayerRow(*where, undefined="no such token <b>"))
                else:
                    rows.append(LayerRow(*where, value, low=value - 0.1, high=value + 0.1, null=0.0, n=40))
    return rows


def effects(step=0, layers=LAYERS):
    """Rows of the other measures, one site each and both kinds of cuts."""
    sites = {
        "flow": ["image->constraint", "constraint->last"],
        "knockout": ["question->last/post", "question->last/pre"],
        "knockout_accuracy": ["question->last/pre"],
        "knockout_kl": ["question->last/pre"],
        "transplant": ["cumulative/image", "sliding/text"],
        "ablation": ["skip", "zero/mlp", "zero/attention", "mean/image"],
    }
    return [
        LayerRow(step, "causal", name, site, layer, v, low=v - 0.05, high=v + 0.05, null=0.0, n=40)
        for name, places in sites.items()
        for site in places
        for layer in range(layers)
        for v in [(-1 if name in ("knockout", "ablation") else 1) * (0.7 if layer == 4 else 0.1)]
    ]


def overlay_of(image="a.png", layer=2, grid=(4, 6), words=None, **changed):
    """An item of pictures.json whose strongest cell is row 2, column 5."""
    rows, columns = grid
    weights = [[0.1] * columns for _ in range(rows)]
    weights[min(1, rows - 1)][min(4, columns - 1)] = 0.8
    told = {"id": "q0", "text": "Which city?", "image": image, "what": f"contribution to the constraint, layer {layer}"}
    told |= {"layer": layer, "grid": [rows, columns], "weights": weights}
    return told | ({"words": words} if words else {}) | changed
