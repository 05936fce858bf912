"""What disks and kills do to files."""

from pathlib import Path


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of the byte `at`."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def flip_first(path: Path) -> None:
    flip(path, 0)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def drop_checksum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").unlink()


def empty_checksum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").write_text("")


DAMAGES = [flip, flip_first, truncate, drop_checksum, empty_checksum]
