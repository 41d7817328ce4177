"""Small builds of the nano data: with every hand that was fetched, and with OpenMoji alone.

Data flow: packages on this machine -> ``build_nano_data`` -> folders that the tests of one worker share.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_mm.nano.data import SMALL, build_nano_data
from lightning_mm.nano.data.hands import PYTHON_PACKAGES
from lightning_mm.nano.data.packages import DEFAULT, FETCH, archive, cache_folder
from lightning_mm.nano.data.splits import load_sources


def require_hands() -> None:
    """Skip where the archives have not been fetched."""
    absent = [hand for hand in DEFAULT if archive(hand) is None]
    if absent:
        pytest.skip(f"not fetched: {', '.join(absent)}; run: {FETCH}")


FETCHED = cache_folder()
"""The user's own folder: while tests run, caches are elsewhere."""


@pytest.fixture(scope="session", autouse=True)
def _packages() -> None:
    """The archives that the user has fetched are there for the tests; without OpenMoji all of them are skipped."""
    if FETCHED.is_dir():
        cache_folder().parent.mkdir(parents=True, exist_ok=True)
        cache_folder().symlink_to(FETCHED)
    missing = [package for module, package in PYTHON_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.fixture
def no_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which nothing was fetched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_sources.cache_clear()
    yield
    load_sources.cache_clear()


@pytest.fixture(scope="session")
def all_hands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small build from every hand."""
    require_hands()
    return build_nano_data(tmp_path_factory.mktemp("nano") / "data", sizes=SMALL)


@pytest.fixture(scope="session")
def one_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small build from OpenMoji alone."""
    folder = tmp_path_factory.mktemp("nano-alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        load_sources.cache_clear()
        out = build_nano_data(folder / "data", sizes=SMALL)
    load_sources.cache_clear()
    return out


@pytest.fixture(scope="session", params=["all_hands", "one_hand"])
def built(request: pytest.FixtureRequest) -> Path:
    """Either of the two builds."""
    return Path(request.getfixturevalue(request.param))
