"""The nano data: real pictures with true text, built on this machine from installed packages (``python -m
lightning_mm.nano.data OUT``).

Data flow: ``catalogue``/``countries`` (what is true) + ``openmoji``/``stamps`` (cut-outs) -> ``splits`` -> ``studio``
(pictures) -> ``questions``/``flags`` (text) -> ``rows``/``probes``/``constraints`` -> ``build`` (files). Read them in
that order.
"""

from lightning_mm.nano.data.build import SMALL, Sizes, build_nano_data

__all__ = ["SMALL", "Sizes", "build_nano_data"]
