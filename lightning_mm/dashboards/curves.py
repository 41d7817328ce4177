"""Which curves the report shows, from the values that were logged.

Data flow: metrics.csv -> (step, value) by key -> ``charts`` -> the drawings of the section Curves, in reading order.
"""

from collections.abc import Mapping

from lightning_mm.dashboards import names
from lightning_mm.dashboards.charts import Chart, Points, Series, line_chart, running_mean

Curves = Mapping[str, Points]


def charts(curves: Curves) -> list[Chart]:
    """The curves that have data, in reading order."""
    loss = curves.get(names.TRAIN_LOSS, [])
    smooth = len(loss) > 40
    mean = [Series("train, mean", running_mean(loss, max(5, len(loss) // 25)))] if smooth else []
    raw = Series("train", loss, "faint" if smooth else "accent")
    groups = sorted(key for key in curves if key.startswith(names.LEARNING_RATE + "/"))
    rates = [Series(g.removeprefix(names.LEARNING_RATE + "/"), curves[g], "accent", i) for i, g in enumerate(groups)]

    def of(key: str, label: str) -> list[Series]:
        return [Series(label, curves.get(key, []))]

    pictures = Series("of pictures", curves.get(names.IMAGE_TOKENS_PER_SECOND, []), "ink", 2)
    used = [
        Series("waiting for data", curves.get(names.DATA_WAIT, []), "ink", 2),
        Series("padding", curves.get(names.PADDING, []), "faint"),
        *of(names.MFU, "arithmetic (MFU)"),
    ]
    validation = Series("validation", curves.get(names.VAL_LOSS, []), "ink", 2)
    drawn = [
        line_chart("Loss", "nats per token", [raw, *mean, validation]),
        line_chart("Exact match", "share of answers", of(names.VAL_EXACT_MATCH, "validation"), share=True),
        line_chart("Token accuracy", "share of tokens", of(names.VAL_TOKEN_ACCURACY, "validation"), share=True),
        line_chart("Throughput", "answer tokens/s", of(names.SUPERVISED_TOKENS_PER_SECOND, "training"), zero=True),
        line_chart("Tokens", "tokens/s", [*of(names.TOKENS_PER_SECOND, "all"), pictures], zero=True),
        line_chart("Use of the device", "share", used, share=True),
        line_chart("Memory", "GiB, highest so far", of(names.PEAK_MEMORY, "largest of the ranks"), zero=True),
        line_chart("Gradient norm", "before clipping", of(names.GRAD_NORM, "all trained weights"), zero=True),
        line_chart("Learning rate", "per step", rates, zero=True),
    ]
    return [chart for chart in drawn if chart]
