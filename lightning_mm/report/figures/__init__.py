"""Charts, heat maps and maps of traces in Vega-Lite, built through altair and rendered without a browser."""
