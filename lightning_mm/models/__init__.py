"""Models and processors: the only package that imports transformers, PEFT and bitsandbytes."""

import logging

# On import bitsandbytes reports missing optional kernels, which are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
