"""Processors for pictures and video, on machines that can only do pictures.

The processors of Qwen-VL, InternVL and LLaVA-OneVision hold a video processor also where no video ever comes. Those of
transformers all need torchvision, and without it such a processor can neither be made nor loaded. Importing this module
mends that: where torchvision is absent, an optional video processor is left out. Where it is there, nothing changes.

Data flow: ``import lightning_mm.models.stills`` -> ``AutoProcessor.from_pretrained`` and the processors'
own classes work.
"""

import inspect
from typing import Any

import transformers
from transformers import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

_base: Any = ProcessorMixin
_all_parts = _base.get_attributes.__func__


def _parts_but_video(cls: type[ProcessorMixin]) -> list[str]:
    video = inspect.signature(cls.__init__).parameters.get("video_processor")
    left_out = "video_processor" if video is not None and video.default is None else None
    return [part for part in _all_parts(cls) if part != left_out]


if not is_torchvision_available():
    _base.get_attributes = classmethod(_parts_but_video)


def video_part(name: str) -> dict[str, Any]:
    """The video processor of that class, as an argument for a processor; nothing where there is no torchvision."""
    return {"video_processor": getattr(transformers, name)()} if is_torchvision_available() else {}
