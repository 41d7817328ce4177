"""Lightning data module: loaders for training, evaluation, generation and probing from the paths in a config.

Data flow: paths -> ``readers`` -> header check of the images -> ``collator`` behind ``dataloader`` -> Lightning's
loops; what is not used is in ``rejected_samples``.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Never

import lightning as L
import torch
from lightning.pytorch.loops.progress import _ProcessedTracker

from lightning_mm.core.choices import refuse_unknown
from lightning_mm.core.decisions import log_decision
from lightning_mm.core.errors import UserError
from lightning_mm.data.batch import Batch
from lightning_mm.data.batch_samplers import TokenBudgetSampler, length_batched_loader
from lightning_mm.data.collator import Collator, PromptCollator
from lightning_mm.data.dataloader import (
    CheckedDataLoader,
    Collate,
    ResumableDataLoader,
    evaluation_loader,
    training_loader,
)
from lightning_mm.data.example_batches import example_batch, random_batches
from lightning_mm.data.mixture import check_temperature
from lightning_mm.data.probe_sets.build import ENTAILMENT_PROMPT, open_probe_set, split_for_probes
from lightning_mm.data.probe_sets.collator import ProbeCollator, probe_loader
from lightning_mm.data.probe_sets.probe_set import ProbeSet
from lightning_mm.data.readers.rows import in_cache
from lightning_mm.data.rejected_samples import RejectedSamples
from lightning_mm.data.row_meter import RowMeter
from lightning_mm.data.row_table import RowTable
from lightning_mm.data.sample import (
    Sample,
    SampleQuestion,
    questions_of,
    sort_by_answer_length,
)
from lightning_mm.data.shared_images import ImageGroups, SharedImageCollator
from lightning_mm.data.split import SplitOptions
from lightning_mm.data.splits import Splits
from lightning_mm.data.stored_lengths import longest_needed, stored_token_lengths
from lightning_mm.data.streaming import check_streaming_trainer, refuse_with_streaming, streaming_loader
from lightning_mm.data.table import cache_folder
from lightning_mm.data.token_lengths import TokenLengths
from lightning_mm.models.pixel_bounds import PixelBounds
from lightning_mm.models.processor import ModelProcessor, load_processor, wrap_processor

DataSource = str | dict[str, Any] | list[str | dict[str, Any]] | None
"""A path, a source with options (arguments of ``Source``), or several of them."""
_ELSEWHERE = {
    "shuffle": "Training rows are shuffled with the seed: give seed=0.",
    "tokenizer": "Give processor=processor, which holds the tokenizer.",
    **dict.fromkeys(("train_file", "train_path", "train_data", "data", "path", "file"), 'Give train="train.json".'),
    **dict.fromkeys(("image_folder", "image_dir", "images", "root"), 'Give image_root="images".'),
}
"""What is meant by an argument that a user may guess."""


class MMDataModule(L.LightningDataModule):
    """Conversations about pictures, from files, folders and hub datasets in any of the forms that ``readers`` knows.

    Args:
        train: Training conversations: a file, a folder, a pattern or a hub name; a source with options
            (``{"path": ..., "weight": 2}``); or a list of these. In Python also rows, or a ``datasets.Dataset``.
        val: Validation conversations.
        test: Test conversations.
        predict: Questions; they need no answers.
        image_root: Folder that image paths are relative to and may not leave; the folder of each file if not given.
        batch_size: Conversations per device and step.
        max_tokens: In place of batch_size: as many conversations of like length per device and step as this number of
            tokens holds, pictures and padding included.
        group_by_length: Put conversations of like length into one batch, which saves padding.
        eval_batch_size: Conversations, or questions, per device and step of evaluation; as batch_size if not given.
        max_length: Longest conversation in tokens. A longer one loses its end, or falls out if image tokens or all of
            its answers would be lost. auto: as the longest training conversation needs, within the model's context.
        share_images: Whether training and validation rows with the same pictures are put into one batch, and what they
            have in common is computed once; batch_size and eval_batch_size then count pictures. Losses and gradients
            are those of each row alone, which is proved before the first step. See ``data.shared_images``.
        rows_per_image: With share_images: most rows of a picture in a batch; no limit if not given.
        num_workers: Processes per device that prepare batches.
        seed: Of the order of samples, and of which rows a source with a limit has.
        temperature: Above 0: the share of a training source is its weight times (rows * repeats)^(1 / temperature);
            1 if not given, .inf for shares that are the weights. See ``data.mixture``.
        max_bad_fraction: Stop if more rows than this fraction cannot be used.
        max_megapixels: Largest picture that is decoded.
        follow_links: Whether links in the image root may lead out of it, as in a store of linked files.
        fetch: Whether pictures named by http addresses are downloaded; a row with one is dropped if not.
        cache_dir: Folder that rows are kept in, once read; ``lightning_mm/data`` in ``$XDG_CACHE_HOME`` or ``~/.cache``
            if not given.
        min_pixels: Smallest width times height that the model sees; a smaller picture is enlarged. As its processor has
            it if not given.
        max_pixels: Largest width times height that the model sees; a larger picture is reduced. Fewer pixels are fewer
            tokens. As its processor has it if not given. Both are exported with the processor where that has options
            for them.
        max_images: Most pictures of a row, frames of videos not counted; a row with more falls out. No limit if not
            given.
        video_frames: Frames of a video that the model sees, evenly spaced in time.
        special_tokens: Special tokens of the tokenizer that texts may contain, such as those around boxes; a row with
            another one falls out.
        streaming: Read training rows as they are needed and keep no table of them, for what does not fit a disk; needs
            ``trainer.max_steps``. See ``data.streaming``.
        shuffle_buffer: With streaming: number of rows in memory among which the next one is drawn.
        generation_samples: How many validation questions, from the first on, are answered by generation; all if not
            given.
        processor: Folder or hub name of the model that the processor is loaded from, or a loaded processor; the
            module's if not given.
        revision: Commit, tag or branch of a hub processor.
        probes: Pictures to look inside the model with: rows with captions and objects, LLaVA's conversations, one of
            COCO's annotation files, or a probe set that was saved. Taken from val, or else test, if not given.
        probe_images: Most pictures that one look inside takes.
        probe_prompt: Asks whether a caption, put in the place of {caption}, is right about the picture.

    Attributes:
        rows: The rows of each split.
        reading: How files are read.
        arguments: The arguments as given, by name.
    """

    def __init__(
        self,
        train: DataSource = None,
        val: DataSource = None,
        test: DataSource = None,
        predict: DataSource = None,
        image_root: str | None = None,
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        max_length: int | Literal["auto"] | None = 2048,
        max_tokens: int | None = None,
        group_by_length: bool = False,
        share_images: bool = False,
        rows_per_image: int | None = None,
        num_workers: int = 2,
        seed: int = 0,
        max_bad_fraction: float = 0.01,
        max_megapixels: float = 40.0,
        follow_links: bool = False,
        fetch: bool = False,
        cache_dir: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_images: int | None = None,
        video_frames: int = 8,
        special_tokens: list[str] | None = None,
        temperature: float | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        generation_samples: int | None = None,
        processor: Any = "",
        revision: str | None = None,
        probes: str | None = None,
        probe_images: int = 64,
        probe_prompt: str = ENTAILMENT_PROMPT,
        **unknown: Never,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__", "unknown")}
        super().__init__()
        refuse_unknown(MMDataModule, unknown, _ELSEWHERE)
        self.arguments = arguments
        _refuse_below(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        _refuse_below(1, max_length=None if max_length == "auto" else max_length)
        _refuse_below(1, max_tokens=max_tokens, max_images=max_images, video_frames=video_frames)
        _refuse_below(1, rows_per_image=rows_per_image)
        if share_images:
            _refuse_with_sharing(
                max_tokens=max_tokens is not None, group_by_length=group_by_length, streaming=streaming
            )
        _refuse_below(2, probe_images=probe_images)
        _refuse_below(0, num_workers=num_workers, seed=seed, generation_samples=generation_samples)
        _refuse_below(0, shuffle_buffer=shuffle_buffer)
        check_temperature(temperature)
        if streaming:
            refuse_with_streaming(
                {
                    "data.max_tokens": (max_tokens is not None, "Give data.batch_size."),
                    "data.group_by_length": (group_by_length, "Leave it out."),
                    "data.temperature": (temperature is not None, "Give weights, which are the shares."),
                }
            )
        given = {"train": train, "val": val, "test": test, "predict": predict}
        cache = cache_folder(cache_dir)
        self.paths = {split: in_cache(each, image_root, split, cache) for split, each in given.items()}
        arguments.update(self.paths)
        self.image_root, self.processor, self.revision = image_root, processor, revision
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self._max_length: int | Literal["auto"] | None = max_length
        self.max_megapixels = max_megapixels
        self.max_tokens, self.group_by_length = max_tokens, group_by_length
        self.share_images, self.rows_per_image = share_images, rows_per_image
        self.bounds = PixelBounds(min_pixels, max_pixels)
        self.video_frames = video_frames
        self._row_options: dict[str, Any] = {
            "max_megapixels": max_megapixels,
            "max_images": max_images,
            "video_frames": video_frames,
            "special_tokens": tuple(special_tokens or ()),
        }
        self.num_workers, self.seed, self.generation_samples = num_workers, seed, generation_samples
        self.probes, self.probe_images, self.probe_prompt = probes, probe_images, probe_prompt
        self.streaming = streaming
        self.reading = SplitOptions(image_root, follow_links, fetch, cache_dir, max_megapixels, seed)
        self.rows = Splits(
            self.paths,
            self.reading,
            RejectedSamples(max_bad_fraction),
            temperature,
            shuffle_buffer if streaming else None,
        )
        self._probe_set: ProbeSet | None = None
        self._measured: tuple[ModelProcessor, TokenLengths] | None = None

    @property
    def max_length(self) -> int | None:
        """Longest conversation in tokens."""
        self.decide_max_length()
        assert self._max_length != "auto"
        return self._max_length

    @max_length.setter
    def max_length(self, value: int | None) -> None:
        self._max_length = value

    def decide_max_length(self) -> None:
        """Make a number of ``auto``; a collective call of all ranks, the first time."""
        if self._max_length != "auto":
            return
        context = self.processing.context_length
        if self.paths["train"] is None or self.streaming or not len(self.rows.table("train")):
            why = "training rows are streamed" if self.streaming else "there are no training rows"
            log_decision("data.max_length", context, f"auto: the model's context; {why}")
            self._max_length = context
            return
        with torch.device("cpu"):  # Lightning configures models with the accelerator as the default device
            self._max_length = longest_needed(self._whole_lengths, context)

    def resume_from(self, settings: Mapping[str, Any]) -> None:
        """Take what ``auto`` was from the settings of a checkpoint.

        Args:
            settings: Of a run, by option name.
        """
        if self._max_length == "auto" and "data.max_length" in settings:
            self._max_length = settings["data.max_length"]
            log_decision("data.max_length", self._max_length, "auto: as the checkpoint has it")

    @property
    def rejected_samples(self) -> RejectedSamples:
        """Rows and parts of rows that are not used, with reasons."""
        return self.rows.rejected

    @rejected_samples.setter
    def rejected_samples(self, value: RejectedSamples) -> None:
        self.rows = self.rows.reporting_to(value)

    def setup(self, stage: str) -> None:
        """Read the files of this stage, on every rank, so that errors show before the model is loaded.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            UserError: A file is missing or cannot be used, or too many of its rows cannot.
        """
        stage = getattr(stage, "value", stage)  # Lightning's TrainerFn, which would be printed as that
        if self.streaming and stage == "fit" and self.trainer is not None:
            check_streaming_trainer(self.trainer)
        needed = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,))
        self.rows.open(needed)
        for split in needed:
            if self.paths[split] is not None:
                self.samples(split)
            elif split != "val" or stage == "validate":
                raise UserError(f"data.{split} is not set.", f"{stage} needs it.", f"Give --data.{split} FILE.")
            else:
                log_decision("data.val", "no validation during fit", "data.val is not set")

    @property
    def processing(self) -> ModelProcessor:
        """The model's processor: this data module's own, or that of the module in training."""
        found = self.processor if isinstance(self.processor, ModelProcessor) else self._unbounded_processing
        found.bound_pixels(self.bounds)
        return found

    @property
    def _unbounded_processing(self) -> ModelProcessor:
        return self._own_processing if self.processor else self._module_processing

    @property
    def _module_processing(self) -> ModelProcessor:
        module = None if self.trainer is None else self.trainer.lightning_module
        if not isinstance(found := getattr(module, "processing", None), ModelProcessor):
            raise UserError(
                "data.processor is not set.",
                "The model's processor makes the batches, and there is no MMModule to take it from.",
                'Give MMDataModule(..., processor="org/name").',
            )
        return found

    @cached_property
    def _own_processing(self) -> ModelProcessor:
        if isinstance(self.processor, (str, Path)):
            return load_processor(str(self.processor), self.revision)
        return wrap_processor(self.processor, self._module_processing.config)

    def without_limits(self) -> "MMDataModule":
        """A copy that reads its splits anew, and goes on however few of their rows can be used: to look at them."""
        made = copy.copy(self)
        made.rows = self.rows.without_limits(RejectedSamples(self.rejected_samples.max_bad_fraction))
        made.streaming, made._measured = False, None
        vars(made).pop("_train_groups", None)
        return made

    def train_dataloader(self) -> ResumableDataLoader:
        """Training batches in the order of (seed, epoch)."""
        collate = self._wrapped_collator(self.samples("train"))
        options: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed, "num_workers": self.num_workers}
        if self.streaming:
            loader = streaming_loader(self.rows.stream, collate, **options)
        else:
            loader = self._table_loader(collate, **options)
        if self.trainer is not None:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
            assert isinstance(progress, _ProcessedTracker)
            loader.processed = lambda: progress.processed
        return loader

    def _table_loader(self, collate: Collate, **options: Any) -> ResumableDataLoader:
        samples = self.rows.table("train")
        if self.share_images:
            groups = self._train_groups
            groups.log()
            options |= {"fingerprint": groups.fingerprint, "mixture": self.rows.mixture_of(groups.per_source)}
            return training_loader(groups, SharedImageCollator(collate), **options)
        options |= {"fingerprint": samples.fingerprint, "mixture": self.rows.mixture}
        if self.max_tokens is None and not self.group_by_length:
            return training_loader(samples, collate, **options)
        return length_batched_loader(samples, collate, self._lengths, max_tokens=self.max_tokens, **options)

    @cached_property
    def _train_groups(self) -> ImageGroups:
        return ImageGroups(self.rows.table("train"), self.rows_per_image)

    @property
    def rows_per_batch(self) -> float:
        """Average number of conversations in a training batch of one rank."""
        if self.share_images:
            return self.batch_size * self._train_groups.mean_size
        if self.max_tokens is None:
            return float(self.batch_size)
        return self.rows.mixture.num_rows / len(
            TokenBudgetSampler(self._lengths, self.max_tokens, self.seed, mixture=self.rows.mixture)
        )

    @property
    def _lengths(self) -> TokenLengths:
        """Lengths of the training conversations in tokens of the processor in use, within ``max_length``."""
        whole = self._whole_lengths
        return replace(whole, tokens=whole.tokens.clamp(1, self.max_length))

    @property
    def _whole_lengths(self) -> TokenLengths:
        """Lengths of the training conversations before any is cut, measured once."""
        if self._measured is None or self._measured[0] is not self.processing:
            lengths = stored_token_lengths(
                self.rows.table("train"),
                self.processing,
                cache_folder(self.reading.cache),
                max_megapixels=self.max_megapixels,
                video_frames=self.video_frames,
            )
            self._measured = self.processing, lengths
        return self._measured[1]

    def val_dataloader(self) -> list[CheckedDataLoader]:
        """Batches for the loss, then questions for generation; an empty list where ``val`` is not set."""
        if self.paths["val"] is None:
            # Lightning takes an empty list for no validation, and warns of it as of a loader without batches.
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
        return self._evaluation("val", self.generation_samples)

    def test_dataloader(self) -> list[CheckedDataLoader]:
        """Batches for the loss, questions for generation, and the same questions with gray images."""
        questions = self.questions("test")
        return [*self._evaluation("test", None), self._loader(questions, self._prompt_collator(blank_images=True))]

    def predict_dataloader(self) -> CheckedDataLoader:
        """Questions for generation."""
        return self._loader(self.questions("predict"), self._prompt_collator())

    def samples(self, split: str) -> Sequence[Sample]:
        """The usable conversations of train, val, test or predict, in file order; empty without a file.

        Of a stream, the first rows of each source.
        """
        return self.rows.samples(split)

    def question_types(self, split: str) -> tuple[str, ...]:
        """Types of the split's questions, sorted; equal on every rank."""
        return tuple(sorted({sample.turns[index].question_type for sample, index in self.questions(split)}))

    def questions(self, split: str, limit: int | None = None) -> tuple[SampleQuestion, ...]:
        """The questions of a split in file order, at most ``limit`` (None: all)."""
        return questions_of(self.samples(split), limit)

    def question_loader(self, split: str, blank_images: bool = False, limit: int | None = None) -> CheckedDataLoader:
        """Questions of a split for generation, short answers first.

        Args:
            split: train, val, test or predict.
            blank_images: Whether images are replaced by gray ones.
            limit: Number of questions, from the first of the file on; None takes all.
        """
        return self._loader(sort_by_answer_length(self.questions(split, limit)), self._prompt_collator(blank_images))

    def probe_set(self) -> ProbeSet:
        """The rows to probe the model with: drawn once with a fixed seed, equal on every rank.

        Raises:
            UserError: There is no file to draw from, or nothing in it can be probed.
        """
        if self._probe_set is None:
            self._probe_set = self.draw_probe_set(self.probe_images)
        return self._probe_set

    def draw_probe_set(self, max_pictures: int) -> ProbeSet:
        """A probe set of this module's pictures; see ``probe_set``.

        Args:
            max_pictures: Largest number of pictures.
        """
        return open_probe_set(
            self.probes or self._probe_source(split_for_probes(self.paths)),
            self.image_root,
            self.rejected_samples,
            max_pictures=max_pictures,
            prompt=self.probe_prompt,
            max_megapixels=self.max_megapixels,
        )

    def _probe_source(self, split: str) -> str | Sequence[Sample]:
        """The file of a split where it may hold more than conversations, else its rows."""
        path = self.paths[split]
        return path if isinstance(path, str) and path.endswith((".json", ".jsonl")) else self.samples(split)

    def probe_loader(self, probe_set: ProbeSet) -> CheckedDataLoader:
        """This rank's share of a probe set, each row once over all ranks, rows of similar length together."""
        collator = ProbeCollator(self.processing, self.max_length, max_megapixels=self.max_megapixels)
        return probe_loader(probe_set.rows, collator, batch_size=self.eval_batch_size, num_workers=self.num_workers)

    def sample_batches(self, count: int, size: int = 4) -> list[Batch]:
        """Random training batches, drawn with the seed, to measure gradients with; empty without training data.

        Args:
            count: Number of batches.
            size: Conversations per batch.
        """
        samples = self.samples("train")
        made = random_batches(samples, self.collator(samples), count, size, self.seed)
        self.rejected_samples.add((rejection for batch in made for rejection in batch.rejected), "train")
        return [batch for batch in made if batch.num_supervised]

    def example_batch(self, count: int = 1) -> Batch:
        """A batch of the first conversations with images, to measure a step with; of others where these are unusable.

        Args:
            count: Number of conversations, or fewer where there are fewer.

        Raises:
            UserError: No file is given, or none of the rows tried can be used.
        """
        split = next((split for split, path in self.paths.items() if path is not None), None)
        if split is None:
            raise UserError("There is no data.", "No file is given.", "Give --data.train FILE.")
        return example_batch(self.samples(split), self.collator(), count)

    def _evaluation(self, split: str, limit: int | None) -> list[CheckedDataLoader]:
        samples, questions = self.samples(split), sort_by_answer_length(self.questions(split, limit))
        loaders = [self._conversation_loader(samples)] if samples else []
        return loaders + ([self._loader(questions, self._prompt_collator())] if questions else [])

    def _conversation_loader(self, samples: Sequence[Sample]) -> CheckedDataLoader:
        collate = self._wrapped_collator(samples)
        if not (self.share_images and isinstance(samples, RowTable)):
            return self._loader(samples, collate)
        return self._loader(ImageGroups(samples, self.rows_per_image), SharedImageCollator(collate))

    def shared_example(self) -> Batch | None:
        """A training batch of rows that share pictures, to prove sharing with; None where no rows do."""
        groups = self._train_groups
        found = [number for number, rows in enumerate(groups.groups[:_SHARED_TRIED]) if len(rows) > 1]
        batch = SharedImageCollator(self.collator())([groups[number] for number in found[:2]]) if found else None
        if batch is None or batch.shared is None:
            why = "no rows have the same picture" if not found else "what they have in common ends before the picture"
            log_decision("data.share_images", "no effect", f"{why} among the first {_SHARED_TRIED} groups")
            return None
        return batch

    def _loader(self, dataset: Sequence[Any], collate: Callable[..., Any]) -> CheckedDataLoader:
        return evaluation_loader(dataset, collate, batch_size=self.eval_batch_size, num_workers=self.num_workers)

    def _wrapped_collator(self, samples: Sequence[Sample]) -> Callable[..., Any]:
        """Makes training or validation batches: the collator, or what the module's ``wrap_collator`` returns."""
        collator = self.collator(samples)
        if isinstance(samples, RowTable) and not samples.all_videos_checked:
            collator.require_decoder()
        module = None if self.trainer is None else self.trainer.lightning_module
        wrap: Callable[[Collator], Callable[..., Any]] | None = getattr(module, "wrap_collator", None)
        return collator if wrap is None else wrap(collator)

    def collator(self, reserve: Sequence[Sample] = ()) -> Collator:
        """Makes training batches of this model; ``reserve`` stands in where all rows of a batch are unusable."""
        return Collator(self.processing, self.max_length, reserve=reserve, **self._row_options)

    def row_meter(self, processing: ModelProcessor) -> RowMeter:
        """The collator of training batches, with a processor like the model's, that keeps the length of a row."""
        return RowMeter(processing, self.max_length, **self._row_options)

    def _prompt_collator(self, blank_images: bool = False) -> PromptCollator:
        return PromptCollator(self.processing, self.max_length, blank_images=blank_images, **self._row_options)


_SHARED_TRIED = 1000
"""Groups, from the first on, among which rows that share a picture are looked for."""


def _refuse_with_sharing(**options: bool) -> None:
    for name, is_set in options.items():
        if is_set:
            raise UserError(
                f"data.share_images and data.{name} do not go together.",
                "Rows with the same picture come in one batch, whatever their lengths, and all rows must be known.",
                f"Leave data.{name} out, and give data.batch_size, in pictures.",
            )


def _refuse_below(least: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise UserError(f"data.{name} is {value}.", f"It is {least} or more.", f"Give --data.{name} {least}.")
