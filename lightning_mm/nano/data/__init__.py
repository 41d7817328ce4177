"""The nano data: images composed from installed packages with exact annotations.

``python -m lightning_mm.nano.data OUT`` builds it.

Data flow: ``catalog``, ``flags`` (names, facts) + ``openmoji``, ``tuxpaint`` (cut-outs) -> ``build`` (splits) ->
``images`` (scenes) -> ``questions``, ``flags`` (text) -> ``rows``, ``probes``, ``causal`` -> ``build`` (files).
"""

from lightning_mm.nano.data.build import SMALL, Sizes, build_nano_data

__all__ = ["SMALL", "Sizes", "build_nano_data"]
