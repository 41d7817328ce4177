"""The folder that picture names are relative to and may not leave.

Data flow: a name in a row -> ``ImageRoot.resolve`` -> the path of a file, or ``InvalidRow`` with the reason.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mm.data.readers.invalid_row import InvalidRow, require_text

_MAX_NAME_BYTES = 255  # NAME_MAX of Linux' and macOS' file systems


class ImageRoot:
    """Resolves the names of pictures and videos.

    Args:
        root: Folder that names are relative to; an absolute name must be within it.
        follow_links: Whether symbolic links within the folder may lead out of it, as in the cache of Hugging Face's hub
            and in picture stores; ``..`` and absolute names never do.
        must_exist: Whether there must be such a file; if not, it is looked for when it is needed.
    """

    def __init__(self, root: Path, follow_links: bool = False, must_exist: bool = True) -> None:
        self.root, self.follow_links, self.must_exist = root.resolve(), follow_links, must_exist
        self._given = Path(os.path.abspath(root))
        self._known: dict[tuple[str, bool], Path] = {}

    def resolve(self, name: str, may_be_folder: bool = False) -> Path:
        """The file of this name.

        Args:
            name: Path relative to the root, or an absolute one within it.
            may_be_folder: Whether it may be a folder, as a video's frames are.

        Raises:
            InvalidRow: It is a URL, leads out of the root, is no possible path, or there is no such file.
        """
        if (name, may_be_folder) not in self._known:
            self._known[name, may_be_folder] = self._confined(name, may_be_folder)
        return self._known[name, may_be_folder]

    def _confined(self, name: str, may_be_folder: bool) -> Path:
        if "://" in name or name.startswith("data:"):
            raise InvalidRow(f"image is a URL: {name[:80]!r}, nothing is fetched from the network; download it first")
        try:
            path = (self.root / name).resolve()
            written = Path(os.path.normpath(self.root / name))  # as it is written: links are not followed
            inside = path.is_relative_to(self.root) or (self.follow_links and self._holds(written, name))
            if long := next((part for part in path.parts if len(os.fsencode(part)) > _MAX_NAME_BYTES), ""):
                raise InvalidRow(f"impossible image path: {long[:40]!r}... is longer than a file name can be")
            exists = not self.must_exist or path.is_file() or (may_be_folder and path.is_dir())
        except InvalidRow:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # too long, contains NUL, or circular links
            raise InvalidRow(f"impossible image path: {error}") from error
        if not inside:
            raise InvalidRow(f"image outside the image root: {name!r} leads to {path}{self._advice(written, name)}")
        if not exists:
            raise InvalidRow(
                f"missing image: {name!r} is {'no regular file' if path.exists() else 'not'} in {self.root}"
            )
        if may_be_folder and path.is_dir() and not self.follow_links:
            self._refuse_links_out(path)
        # As it is written, a link that later leads to another file is noticed.
        return written if self.follow_links and self._holds(written, name) else path

    def _refuse_links_out(self, folder: Path) -> None:
        """Refuse a folder of frames one of which is a link that leads out of the root."""
        for frame in folder.iterdir():
            if frame.is_symlink() and not frame.resolve().is_relative_to(self.root):
                what = f"image outside the image root: {frame.name!r} of {folder.name!r} leads to {frame.resolve()}"
                raise InvalidRow(f"{what} by a symbolic link; data.follow_links allows that")

    def _holds(self, written: Path, name: str) -> bool:
        """Whether a name stays in the folder before its links are followed."""
        return ".." not in Path(name).parts and any(written.is_relative_to(root) for root in (self.root, self._given))

    def _advice(self, written: Path, name: str) -> str:
        by_link = not self.follow_links and self._holds(written, name)
        if by_link:
            return " by a symbolic link; data.follow_links allows that"
        is_plain = ".." not in Path(name).parts and Path(name).is_absolute()
        return "; data.image_root names the folder that pictures are below" if is_plain else ""


def named_images(row: Mapping[str, Any], root: ImageRoot) -> tuple[Path, ...]:
    """The pictures that ``image`` or ``images`` of a row name, in order.

    Args:
        row: The row.
        root: Folder that the names are relative to.

    Raises:
        InvalidRow: Both are given, a name is no text, or it is no file of the folder.
    """
    given = [row[key] for key in ("image", "images") if row.get(key) is not None]
    if len(given) > 1:
        raise InvalidRow("two image lists: both 'image' and 'images' are given")
    names = given[0] if given else []
    return tuple(root.resolve(require_text(name, "image")) for name in (names if isinstance(names, list) else [names]))
