"""The nano data: images composed from installed packages with exact annotations.

``python -m lightning_mm.nano.data OUT`` builds it.

Data flow: ``packages`` (archives), ``catalog``, ``flags`` (names, facts) -> ``hands``, ``tuxpaint`` (cut-outs) ->
``splits`` -> ``images`` (scenes) -> ``questions`` -> ``rows``, ``probes``, ``flags``, ``causal`` -> ``build`` (files).
"""

from lightning_mm.nano.data.build import SMALL, Sizes, build_nano_data

__all__ = ["SMALL", "Sizes", "build_nano_data"]
