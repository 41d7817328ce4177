"""Export of trained models as folders that transformers and PEFT load without this package, with a model card.

Data flow: live model + processor -> ``export_full`` -> complete Hugging Face folder, adapters merged into the weights;
live model + names of trained tensors -> ``export_adapter`` -> PEFT adapter folder; ``Provenance`` -> README.md in
either folder, with the hub's header. ``verify`` then loads the folder in a new process and compares logits.

The live model is never changed: merging works on a copy of one adapted layer at a time, and the written model is a
plain one that shares all other tensors with it. A folder gets its name only when it is complete.
"""

import copy
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, ProcessorMixin

from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.core.io import is_absent_or_empty, staged_folder
from lightning_mm.models.export.base_files import BaseFiles, copy_processor, find_base_files
from lightning_mm.models.export.model_card import Provenance, write_card
from lightning_mm.models.export.weight_dtype import WrittenDtype, log_rounding, resolve_dtype, round_weights
from lightning_mm.models.lora import ADAPTER, adapted_modules


def export_full(
    model: nn.Module, processor: ProcessorMixin, out: Path | str, origin: Provenance, dtype: WrittenDtype = "auto"
) -> Path:
    """Write a complete folder: weights as safetensors, configs, processor with its chat template, model card.

    Adapters (LoRA, rsLoRA, DoRA, any ranks) are merged into the weights. A head that was tied to the embedding and has
    an adapter is written untied. The live model keeps its adapters. All small files of the base that loaders read are
    taken over, also those of parts that training does not need.

    Args:
        model: A transformers model, with or without adapters.
        processor: The model's processor (transformers).
        out: Folder to create; it must not exist or be empty.
        origin: Origin of the model; its base is where small files and dtype are taken from.
        dtype: Dtype of the written weights; 'auto' (default) is the base's, which trained weights are rounded to.

    Returns:
        ``out``.

    Raises:
        UserError: The model is quantized, a merged weight is not finite, a weight is too large for the dtype, or the
            folder is not empty or not writable.
    """
    _refuse_quantized(model)
    base = find_base_files(origin.base, origin.revision)
    target = resolve_dtype(dtype, model, origin.base, origin.revision)
    state, rounding = round_weights(_plain_state(model), target, _float32_parts(model, target))
    log_rounding(rounding)
    plain = _plain_model(model, state)
    with _staged_output(Path(out)) as folder:
        _set_dtype(plain.config, target)
        unchanged = _unchanged_generation_config(model, base)
        if unchanged is not None:  # what loads with a warning cannot always be saved again
            plain.generation_config = GenerationConfig()
        plain.save_pretrained(folder, state_dict=state)
        if unchanged is not None:
            shutil.copyfile(unchanged, folder / unchanged.name)
        copy_processor(processor, base, folder)
        write_card(folder, _licensed(origin, base), library="transformers")
    return Path(out)


def require_empty_output(out: Path, fix: str = "Name another folder, or remove this one.") -> None:
    """Raise UserError if an export to ``out`` would overwrite something.

    Args:
        out: Folder to create.
        fix: The error's advice.
    """
    if not is_absent_or_empty(out):
        raise UserError(f"{out} is taken.", "An export never overwrites.", fix)


def export_adapter(
    model: nn.Module,
    out: Path | str,
    origin: Provenance,
    fully_trained: Collection[str] = (),
    processor: ProcessorMixin | None = None,
) -> Path:
    """Write a PEFT folder that ``PeftModel.from_pretrained(base, out)`` loads.

    Tensors that were trained at full rank beside LoRA (a connector, norms) are written by PEFT's ``modules_to_save``,
    under the fully-qualified name of the module that owns them. All tensors keep the dtype that they trained in.

    Args:
        model: A transformers model with LoRA adapters.
        out: Folder to create; it must not exist or be empty.
        origin: The base model of the adapter, and facts for the model card.
        fully_trained: Names of parameters, as in the plain model, that were trained at full rank; none by default.
        processor: The model's processor, to be put beside the adapter; None (default): it is left to the base model.

    Returns:
        ``out``.

    Raises:
        UserError: PEFT alone could not restore this model (format 'model' can), or the folder is not empty or not
            writable.
    """
    if ADAPTER not in getattr(model, "peft_config", {}):
        raise _not_an_adapter("The model has no LoRA adapter.")
    from peft import get_peft_model_state_dict

    owners = _modules_to_save(model, fully_trained)
    base = find_base_files(origin.base, origin.revision)
    # save_embedding_layers would look the base up on the hub; all trained tensors are listed here.
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    for owner in owners:
        state |= {f"{owner}.{name}": tensor for name, tensor in model.get_submodule(owner).state_dict().items()}
    with _staged_output(Path(out)) as folder:
        tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        _adapter_config(model, owners, origin).save_pretrained(str(folder))
        if processor is not None:
            copy_processor(processor, base, folder)
        write_card(folder, _licensed(origin, base), library="peft")
    return Path(out)


def _adapter_config(model: Any, owners: list[str], origin: Provenance) -> Any:
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.base_model_name_or_path, config.revision = origin.base, origin.revision
    config.modules_to_save, config.inference_mode = owners or None, True
    return config


def _licensed(origin: Provenance, base: BaseFiles) -> Provenance:
    return replace(origin, license=origin.license or base.license)


def _float32_parts(model: Any, dtype: torch.dtype) -> frozenset[str]:
    """Parts of names of the tensors that transformers holds in float32 whatever dtype the model has."""
    always = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    half = getattr(model, "_keep_in_fp32_modules", None) or ()
    return frozenset(always) | (frozenset(half) if dtype == torch.float16 else frozenset())


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    """State the dtype in a config and in those of its parts, which some loaders read instead."""
    config.dtype = dtype
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            part.dtype = dtype


def _unchanged_generation_config(model: Any, base: BaseFiles) -> Path | None:
    """The base's generation_config.json, if it says what the live model's generation config does."""
    path = base.model_files.get("generation_config.json")
    if path is None:
        return None
    known = GenerationConfig.from_pretrained(path.parent, path.name)
    return path if _settings(known) == _settings(model.generation_config) else None


def _settings(config: GenerationConfig) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "_from_model_config")}


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict with adapters merged; all other tensors share memory with the live model."""
    every = adapted_modules(model)
    adapted = {name: layer for name, layer in every.items() if not name.endswith(".base_layer")}
    inside = tuple(f"{name}." for name in adapted)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    for name, layer in adapted.items():
        state |= {f"{name}.{key}": tensor for key, tensor in _merge_adapter(name, layer).state_dict().items()}
    if adapted:
        log_decision("export", f"{len(every)} adapters merged", "a complete folder has plain weights")
    return state


def _merge_adapter(name: str, layer: Any) -> nn.Module:
    twin = merged = copy.deepcopy(layer)
    try:
        while hasattr(merged, "base_layer"):  # a module with several adapted parameters is wrapped several times
            merged.merge(safe_merge=True)
            merged = merged.base_layer
    except ValueError as error:
        raise UserError(
            f"The adapter of {name} cannot be merged.",
            "Merging it gives weights that are not finite.",
            "Export an earlier checkpoint; training went astray before this one.",
        ) from error
    return twin.get_base_layer()


def _plain_model(model: Any, state: dict[str, Tensor]) -> Any:
    """A model of the same class, without adapters or hooks, that holds exactly the tensors of ``state``."""
    config = copy.deepcopy(model.config)
    if _tied(model) and not _tied_in(model, state):
        config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = False
        log_decision(
            "export", "head untied from embedding", "they were one tensor; an adapter changed only one of the two"
        )
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.generation_config = copy.deepcopy(model.generation_config)
    # save_pretrained maps tensor names back to those of the loaded checkpoint.
    plain._weight_conversions = getattr(model, "_weight_conversions", None)
    return plain


def _tied(model: Any) -> bool:
    embedding, head = _embedding_and_head(model)
    return head is not None and head.weight is embedding.weight


def _tied_in(model: Any, state: dict[str, Tensor]) -> bool:
    names = {id(module): name for name, module in model.named_modules()}
    first, second = (state[f"{names[id(end)]}.weight"] for end in _embedding_and_head(model))
    return first.data_ptr() == second.data_ptr()


def _embedding_and_head(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _modules_to_save(model: nn.Module, parameters: Collection[str]) -> list[str]:
    """Names of the modules that own these parameters, none inside another, for PEFT's ``modules_to_save``."""
    names = {name.rpartition(".")[0] for name in parameters}
    owners = sorted(name for name in names if not any(name.startswith(f"{other}.") for other in names))
    adapted = adapted_modules(model)
    for owner in owners:
        module = model.get_submodule(owner)
        if owner == "" or any(name.startswith(f"{owner}.") or name == owner for name in adapted):
            raise _not_an_adapter(f"{owner or 'The model'} itself holds fully trained tensors, and has LoRA inside.")
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise _not_an_adapter(f"{owner} holds fully trained tensors, but is a list: PEFT cannot replace it.")
        if any(module is end for end in _embedding_and_head(model)) and _tied(model):
            raise _not_an_adapter("The token embedding was fully trained, and the head is tied to it.")
        # PEFT matches names by their ends.
        if strays := [n for n, _ in model.named_modules() if n != owner and n.endswith(owner)]:
            raise _not_an_adapter(f"PEFT would take {strays[0]} for {owner}, which was fully trained.")
    return owners


def _not_an_adapter(why: str) -> UserError:
    return UserError("This model cannot be written as an adapter.", why, "Use format 'model', a complete folder.")


def _refuse_quantized(model: nn.Module) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError(
            "A quantised model cannot be exported as a complete folder.",
            "Its frozen weights are held in 4 or 8 bits; the originals are in the base model.",
            "lightning-mm export puts the trained tensors on them; from Python, load with quantization='none'.",
        )


@contextmanager
def _staged_output(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out``, renamed to it on success and removed on failure."""
    require_empty_output(out)
    try:
        with staged_folder(out) as folder:
            yield folder
            _share_permissions(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out} cannot be written.", str(error), "Free space there, or name a folder you may write to."
        ) from error


def _share_permissions(folder: Path) -> None:
    """Give all files the mode of README.md: safetensors makes its files readable for the owner only."""
    mode = (folder / "README.md").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
