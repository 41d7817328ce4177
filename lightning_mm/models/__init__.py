"""The room of transformers, PEFT and bitsandbytes: whatever their next release changes is changed here."""

import logging

# On import bitsandbytes reports the optional kernels that it did not find; nothing here asks for them.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
