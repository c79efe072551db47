"""A power cut at any moment of an artifact's writing: what the disk was told to keep is all there is, and it suffices.

Every `fsync` is noted with what it put on the disk. Before each change of the file system, and after the last, the
power is cut: the disk is rebuilt from what was synced, in two ways that a file system may choose from, and the stage
is run again on it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.lib.artifact.manifest import is_emptied
from tests.artifact.test_folder import CHANGES, NEW, OLD, _nothing_or_exit, is_whole, make

Image = dict[str, bytes | None]  # content by path; None for a folder


class Disk:
    """What is on the disk for certain: files as they were synced, and folders' lists of names."""

    def __init__(self, root: Path) -> None:
        self.root, self.contents, self.names, self.opened = root, {}, {}, []
        self.names[root.stat().st_ino] = {}

    def fsync(self, file: int) -> None:
        """Note what a file or folder holds; it stays open, so that no other gets its number."""
        path = Path(f"/proc/self/fd/{file}").readlink()
        number = os.fstat(file).st_ino
        self.opened.append(os.dup(file))
        if path.is_dir():
            self.names[number] = {each.name: (each.inode(), each.is_dir()) for each in os.scandir(path)}
        else:
            self.contents[number] = path.read_bytes()

    def with_all_names(self) -> Image:
        """Return the disk of a file system that keeps every change of a name, and of a file only what was synced."""
        image: Image = {}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            image[name] = None if path.is_dir() else self.contents.get(path.stat().st_ino, b"")
        return image

    def with_synced_names(self) -> Image:
        """Return the disk of a file system that keeps a name only once its folder was synced."""
        return dict(self.below(self.root.stat().st_ino, ""))

    def below(self, folder: int, prefix: str) -> Iterator[tuple[str, bytes | None]]:
        for name, (number, is_folder) in self.names.get(folder, {}).items():
            yield f"{prefix}{name}", None if is_folder else self.contents.get(number, b"")
            if is_folder:
                yield from self.below(number, f"{prefix}{name}/")


def cuts(monkeypatch, folder: Path, before: dict | None, way: str) -> list[Image]:
    """Run the stage, after one with other tables if there is a `before`; return the disk after a cut at each change."""
    folder.mkdir()
    disk, images = Disk(folder), []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk.fsync)
        if before:
            make(folder / "out", before)
        for name in CHANGES:
            real = getattr(os, name)

            def change(*given, real=real, **options):
                images.append(getattr(disk, way)())
                return real(*given, **options)

            patch.setattr(os, name, change)
        make(folder / "out", NEW)
    images.append(getattr(disk, way)())
    for file in disk.opened:
        os.close(file)
    return images


def rebuilt(folder: Path, image: Image) -> None:
    """Write the disk after a cut to a folder."""
    folder.mkdir()
    for name, content in sorted(image.items()):
        if content is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("way", ["with_all_names", "with_synced_names"])
@pytest.mark.parametrize("before", [None, OLD], ids=["first", "later"])
def test_after_a_power_cut_at_any_change_the_folder_is_absent_or_whole_and_the_next_run_ends_well(
    tmp_path, monkeypatch, before, way
):
    images = cuts(monkeypatch, tmp_path / "disk", before, way)
    assert len(images) > 12
    for number, image in enumerate(images):
        rebuilt(tmp_path / str(number), image)
        out = tmp_path / str(number) / "out"
        if out.exists():
            assert not is_emptied(out / "manifest.json")
            is_whole(out, *([before] if before else []), NEW)
        elif before:  # between two renames: the old one has another name, or the new one its folder's
            assert any((out.with_name(name) / "manifest.json").is_file() for name in ("out.replaced", "out.unfinished"))
        with _nothing_or_exit():
            make(out, NEW)
        is_whole(out, NEW)
        assert not out.with_name("out.replaced").exists()
    assert images[-1]["out/manifest.json"]


def test_without_its_syncs_an_artifact_would_not_outlive_a_power_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.lib.artifact.folder.sync_files", lambda folder: None)
    images = cuts(monkeypatch, tmp_path / "disk", None, "with_all_names")
    assert images[-1]["out/model/weights"] == b""  # so the disk of these tests does lose what was not synced
